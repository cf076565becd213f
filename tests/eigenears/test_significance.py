import numpy as np
import pytest

from jaxear.eigenears import significance
from jaxear.eigenears.significance import (
    along_one_column,
    confidence_intervals,
    parallel_analysis,
    variance_shares,
)
from jaxear.pca import PCA


def normal(spectrum, n, seed=0, images=1):
    """Codes of n subjects, so many images of each, whose variances are the spectrum, rotated."""
    rng = np.random.default_rng(seed)
    d = len(spectrum)
    subjects = np.repeat(np.arange(n), images)
    own = rng.normal(size=(n, d))[subjects] * 0.8**0.5
    each = rng.normal(size=(n * images, d)) * 0.2**0.5
    rotation = np.linalg.qr(rng.normal(size=(d, d)))[0]
    return (own + each) * np.sqrt(spectrum) @ rotation, subjects


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (300, 200), (150, 400)], ids=str)
def test_shares_are_those_of_pca(shape):
    rows = np.random.default_rng(0).normal(size=shape) * np.linspace(3, 0.5, shape[1])
    expected = PCA(5, svd_solver="full").fit(rows).explained_variance_ratio_
    np.testing.assert_allclose(variance_shares(rows.astype(np.float32), 5), expected, rtol=2e-4)


@pytest.mark.parametrize("shape", [(30, 8), (9, 30)], ids=str)
def test_weights_are_how_often_a_row_counts(shape):
    rng = np.random.default_rng(0)
    rows, weights = rng.normal(size=shape) + 3, rng.integers(0, 4, shape[0])
    copies = np.repeat(rows, weights, axis=0)
    np.testing.assert_allclose(
        variance_shares(rows, 4, weights), variance_shares(copies, 4), rtol=1e-9
    )


def test_directions_that_are_not_there_have_no_share():
    rows = np.random.default_rng(0).normal(size=(3, 2))
    shares = variance_shares(rows, 4)
    assert shares[:2].sum() == pytest.approx(1)
    np.testing.assert_array_equal(shares[2:], 0)
    np.testing.assert_array_equal(variance_shares(np.ones((5, 3)), 2), 0)


def coverage(spectrum, n, images, repeats):
    truth = np.sort(spectrum)[::-1][:3] / np.sum(spectrum)
    held = np.zeros(3)
    for seed in range(repeats):
        codes, subjects = normal(spectrum, n, seed, images)
        low, high = confidence_intervals(codes, subjects, 3, draws=80, seed=seed).T
        held += (low <= truth) & (truth <= high)
    return held / repeats


def test_intervals_hold_the_populations_shares():
    # Of 100 right intervals of 95 %, fewer than 88 hold the truth once in 250 times; 80 draws and
    # 60 subjects make them a little too short.
    assert (coverage(0.6 ** np.arange(8), 60, 1, 100) >= 0.86).all()


def test_images_of_one_subject_are_not_new_evidence():
    spectrum = 0.6 ** np.arange(8)
    codes, subjects = normal(spectrum, 40, images=6)
    by_subject = np.ptp(confidence_intervals(codes, subjects, 3), axis=1)
    by_image = np.ptp(confidence_intervals(codes, np.arange(240), 3), axis=1)
    assert (by_subject > 1.4 * by_image).all()
    assert (coverage(spectrum, 40, 6, 60) >= 0.83).all()


def test_intervals_point_towards_the_truth_where_dimensions_outnumber_subjects():
    spectrum = 0.9 ** np.arange(100)
    truth = (spectrum / spectrum.sum())[0]
    codes, subjects = normal(spectrum, 50)
    measured = variance_shares(codes, 1)[0]
    low, high = confidence_intervals(codes, subjects, 1)[0]
    assert truth < 0.85 * measured
    assert low < truth < high


def test_intervals_lie_around_what_was_measured_and_within_0_and_1():
    codes, subjects = normal([50, 1, 1e-3, 1e-9], 12)
    shares = variance_shares(codes, 4)
    low, high = confidence_intervals(codes, subjects, 4).T
    assert ((low >= 0) & (low <= shares + 1e-7) & (shares <= high + 1e-7) & (high <= 1)).all()
    again = confidence_intervals(codes, subjects, 4)
    np.testing.assert_array_equal(again, np.stack([low, high], axis=1))


def test_two_subjects_tell_nothing_of_others():
    codes, _ = normal(np.ones(4), 10)
    assert np.isnan(confidence_intervals(codes, np.arange(10) % 2, 2)).all()


def test_wide_codes_have_the_intervals_of_all_their_columns(monkeypatch):
    # The first 20 coordinates leave an eighth of the variance out or more, which counts, too.
    codes, subjects = normal(np.append([30, 20, 12, 8], np.full(116, 0.2)), 120)
    expected = confidence_intervals(codes, subjects, 4, draws=40)
    monkeypatch.setattr(significance, "MAX_COLUMNS", 100)
    monkeypatch.setattr(significance, "LEADING", 20)
    found = confidence_intervals(codes, subjects, 4, draws=40)
    np.testing.assert_allclose(found, expected, rtol=0.03)


@pytest.mark.parametrize("n", [200, 60])
def test_so_many_components_are_real_as_there_are(n):
    codes, _ = normal(np.append([30, 20, 12], np.ones(80)), n)
    found = parallel_analysis(codes, 8)
    assert found.n_real == 3
    np.testing.assert_allclose(found.p_values[:3], 1 / 101)
    assert (found.p_values[3:] > 0.05).all()
    shares = variance_shares(codes, 8)
    assert (shares[:3] > found.chance[:3]).all()
    assert shares[3] < found.chance[3]


def test_components_along_single_columns_cannot_be_told_from_chance():
    rng = np.random.default_rng(0)
    codes = rng.normal(size=(400, 40)) * np.append([8.0, 7.0, 6.0], np.ones(37))
    rotation, _ = np.linalg.qr(rng.normal(size=(40, 40)))
    found = []
    for columns in (codes, codes @ rotation):
        components = np.linalg.svd(columns - columns.mean(axis=0))[2][:3]
        found.append((along_one_column(components).all(), parallel_analysis(columns, 3).n_real))
    assert found == [(True, 0), (False, 3)]


def test_noise_is_called_real_once_in_twenty_times():
    rng = np.random.default_rng(0)
    codes = rng.normal(size=(200, 40, 6)) * np.linspace(1, 3, 6)
    first = [parallel_analysis(c, 1, permutations=39, seed=i).n_real for i, c in enumerate(codes)]
    assert 0.01 < np.mean(first) < 0.1  # 0.05 +- 2.6 standard errors


def test_chance_of_wide_codes_lies_above_that_of_all_columns(monkeypatch):
    codes, _ = normal(np.append([300, 150], np.ones(150)), 70)
    full = parallel_analysis(codes, 5, permutations=40)
    monkeypatch.setattr(significance, "MAX_COLUMNS", 100)
    some = parallel_analysis(codes, 5, permutations=40)
    assert full.n_real == some.n_real == 2
    assert (some.chance > full.chance).all()
    assert (some.chance < 1.6 * full.chance).all()
