"""Shares of variance: true ones are found, nothing is found in noise, errors are what they say."""

from __future__ import annotations

import numpy as np
import pytest

from jaxear.eigenears.shares import Regression, best_degree, polynomials


def drawn(seed: int, n: int, causes: int = 6) -> tuple[np.ndarray, np.random.Generator]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, causes)), rng


def regression_on(x: np.ndarray, y: np.ndarray) -> Regression:
    return Regression({str(i): polynomials(column) for i, column in enumerate(x.T)}, y)


def test_polynomials_are_orthonormal_and_blind_to_units():
    x = np.random.default_rng(0).normal(size=200)
    columns = polynomials(x)
    np.testing.assert_allclose(columns.T @ columns / 200, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(columns.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(polynomials(1e4 + 1e-2 * x), columns, atol=1e-6)
    np.testing.assert_allclose(np.corrcoef(columns[:, 0], x)[0, 1], 1)


def test_values_that_say_little_have_few_polynomials():
    assert not polynomials(np.full(50, 0.1)).any()
    two_values = polynomials(np.arange(50) % 2)
    assert two_values[:, 0].any()
    assert not two_values[:, 1:].any()


def test_outliers_do_not_take_the_fit_over():
    x, _ = drawn(5, 400, causes=1)
    y = x.copy()
    x[:8, 0], y[:8] = np.geomspace(50, 5000, 8) * np.resize([1, -1], 8), 0
    regression = regression_on(x, y)
    assert regression.share(regression.predicted()).value > 0.9


def test_known_shares_are_found_and_add_up():
    x, rng = drawn(1, 3000)
    z = polynomials(x[:, 1])[:, 1]
    wave = np.sin(1.5 * x[:, 2])
    wave /= wave.std()
    y = np.sqrt(0.4) * x[:, 0] + np.sqrt(0.2) * z + np.sqrt(0.15) * wave
    y = (y + np.sqrt(0.25) * rng.normal(size=3000))[:, None]
    regression = regression_on(x, y)
    parts = regression.contributions()
    found = {name: regression.share(part) for name, part in parts.items()}
    true = {"0": 0.4, "1": 0.2, "2": 0.15}
    for name, share in found.items():
        # A cubic follows this wave to 98 %.
        assert abs(share.value[0] - true.get(name, 0.0)) < 4 * share.error[0] + 0.003, name
    together = regression.share(regression.predicted())
    np.testing.assert_allclose(together.value, sum(share.value for share in found.values()))
    assert abs(together.value[0] - 0.75) < 0.04


def test_noise_has_no_share_where_a_fit_would_claim_one():
    x, rng = drawn(2, 150)
    noise = rng.normal(size=(150, 300))
    regression = regression_on(x, noise)
    share = regression.share(regression.predicted())
    assert abs(share.value.mean()) < 0.01
    assert np.mean(share.value < 0) > 0.3
    design = np.concatenate([polynomials(column) for column in x.T], axis=1)
    fitted = design @ np.linalg.lstsq(design, noise)[0]
    assert np.mean(fitted.var(axis=0) / noise.var(axis=0)) > 0.1  # 18 columns, 150 images
    # The standard errors are as wide as these 300 shares scatter.
    assert 0.7 < share.error.mean() / share.value.std() < 1.4


def test_what_does_not_vary_has_no_share():
    x, _ = drawn(3, 100)
    regression = regression_on(x, np.full((100, 1), 2.0))
    share = regression.share(regression.predicted())
    assert share.value == 0
    assert share.error == 0


def test_correlated_causes_share_what_they_explain():
    x, rng = drawn(4, 2000, causes=2)
    causes = {
        "a": polynomials(x[:, 0]),
        "copy": polynomials(3 * x[:, 0] - 1),
        "b": polynomials(x[:, 1]),
        "nothing": polynomials(np.zeros(2000)),
    }
    y = np.sqrt([0.6, 0.3]) @ x.T + np.sqrt(0.1) * rng.normal(size=2000)
    parts, together = Regression(causes, y[:, None]).fair_shares()
    np.testing.assert_allclose(sum(parts.values()), together.value)
    np.testing.assert_allclose(parts["a"], parts["copy"], atol=1e-6)
    np.testing.assert_allclose(parts["a"], 0.3, atol=0.04)
    np.testing.assert_allclose(parts["b"], 0.3, atol=0.04)
    np.testing.assert_allclose(parts["nothing"], 0, atol=1e-9)


@pytest.mark.parametrize(("n", "degree"), [(3, 0), (12, 1), (30, 2), (36, 3), (10_000, 3)])
def test_degree_falls_with_the_images_there_are(n, degree):
    assert best_degree(n, n_causes=3) == degree
