import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxear import losses
from jaxear.config import LossConfig

IMAGES = jax.random.uniform(jax.random.key(0), (2, 16, 16, 3))
OTHERS = jax.random.uniform(jax.random.key(1), (2, 16, 16, 3))
MU = jax.random.normal(jax.random.key(2), (2, 5))
LOGVAR = jax.random.normal(jax.random.key(3), (2, 5))


@pytest.mark.parametrize("term", [losses.l1, losses.mse, losses.dissimilarity, losses.edge])
def test_terms_are_zero_for_equal_images_and_positive_otherwise(term):
    np.testing.assert_allclose(term(IMAGES, IMAGES), 0, atol=1e-6)
    assert (term(OTHERS, IMAGES) > 1e-3).all()
    assert term(OTHERS, IMAGES).shape == (2,)


def test_center_weights_have_mean_one_and_peak_at_the_centre():
    weights = losses.center_weights(17, 17, 3.0)
    assert weights.mean() == pytest.approx(1, abs=1e-6)
    assert weights.argmax() == 8 * 17 + 8
    assert weights[8, 8] / weights[0, 0] == pytest.approx(4, rel=0.1)
    np.testing.assert_allclose(losses.center_weights(8, 8, 0.0), 1, atol=1e-6)


def test_center_weights_make_central_errors_count_more():
    weights = losses.center_weights(16, 16, 3.0)
    blank = jnp.zeros((1, 16, 16, 3))
    centre, corner = blank.at[:, 8, 8].set(1), blank.at[:, 0, 0].set(1)
    assert losses.mse(centre, blank, weights) > 3 * losses.mse(corner, blank, weights)


def test_perceptual_ignores_the_scale_of_features():
    features = jax.random.normal(jax.random.key(4), (2, 4, 4, 8))
    np.testing.assert_allclose(losses.perceptual(3 * features, features), 0, atol=1e-6)
    np.testing.assert_allclose(losses.perceptual(-features, features), 4, atol=1e-4)


def test_free_bits_remove_the_pull_on_dimensions_below_them():
    mu, logvar = jnp.full((4, 2), 0.1), jnp.zeros((4, 2))
    assert losses.kl_divergence(mu, logvar, free_bits=0.5).mean() == pytest.approx(1.0)
    pull = jax.grad(lambda m: losses.kl_divergence(m, logvar, free_bits=0.5).mean())(mu)
    np.testing.assert_allclose(pull, 0, atol=1e-7)
    pull = jax.grad(lambda m: losses.kl_divergence(m, logvar).mean())(mu)
    assert (pull > 0).all()


def test_objective_is_the_weighted_sum_of_its_terms():
    config = LossConfig(
        mse_weight=0.5, l1_weight=2, ssim_weight=3, edge_weight=4, perceptual_weight=5
    )
    features = (MU[:, None, None], LOGVAR[:, None, None])
    loss, terms = losses.objective(
        config, reconstruction=OTHERS, target=IMAGES, mu=MU, logvar=LOGVAR, kl_weight=0.7,
        features=features,
    )  # fmt: skip
    expected = (
        0.5 * losses.mse(OTHERS, IMAGES).mean()
        + 2 * losses.l1(OTHERS, IMAGES).mean()
        + 3 * losses.dissimilarity(OTHERS, IMAGES).mean()
        + 4 * losses.edge(OTHERS, IMAGES).mean()
        + 5 * losses.perceptual(*features).mean()
    )
    np.testing.assert_allclose(terms["reconstruction"], expected, rtol=1e-6)
    kl = losses.kl_divergence(MU, LOGVAR).mean()
    np.testing.assert_allclose(loss, expected + 0.7 * kl / IMAGES[0].size, rtol=1e-6)


def test_terms_of_weight_zero_are_left_out():
    config = dataclasses.replace(LossConfig(), ssim_weight=0.0)
    _, terms = losses.objective(
        config, reconstruction=OTHERS, target=IMAGES, mu=MU, logvar=LOGVAR, kl_weight=0.0
    )
    assert "ssim" not in terms
    assert "mse" in terms
