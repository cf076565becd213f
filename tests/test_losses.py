import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxear import losses
from jaxear.config import LossConfig

RNG = np.random.default_rng(0)
IMAGES, OTHERS = jnp.asarray(RNG.uniform(size=(2, 2, 16, 16, 3)), jnp.float32)
MU, LOGVAR = jnp.asarray(RNG.normal(size=(2, 2, 5)), jnp.float32)
MAPS = jnp.asarray(RNG.normal(size=(4, 2, 4, 4, 8)), jnp.float32)


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
    features = MAPS[0]
    np.testing.assert_allclose(losses.perceptual(3 * features, features), 0, atol=1e-6)
    np.testing.assert_allclose(losses.perceptual(-features, features), 4, atol=1e-4)


def test_perceptual_is_the_mean_over_maps():
    expected = [losses.perceptual(MAPS[i], MAPS[i + 2]) for i in (0, 1)]
    together = losses.perceptual((MAPS[0], MAPS[1]), (MAPS[2], MAPS[3]))
    np.testing.assert_allclose(together, sum(expected) / 2, rtol=1e-6)


def test_hidden_pixels_count_as_configured():
    visible = jnp.ones((2, 16, 16)).at[0, :8].set(0)
    everywhere = jnp.abs(OTHERS - IMAGES)

    def l1(**changes):
        weights = losses.pixel_weights(LossConfig(**changes), 16, 16, visible)
        return losses.l1(OTHERS, IMAGES, weights)

    np.testing.assert_allclose(l1(), everywhere.mean((1, 2, 3)), rtol=1e-6)
    unseen = l1(occlusion_weight=0.0)
    np.testing.assert_allclose(unseen[0], everywhere[0, 8:].mean(), rtol=1e-6)
    np.testing.assert_allclose(unseen[1], everywhere[1].mean(), rtol=1e-6)
    some = l1(occlusion_weight=0.5)
    expected = (0.5 * everywhere[0, :8].mean() + everywhere[0, 8:].mean()) / 1.5
    np.testing.assert_allclose(some[0], expected, rtol=1e-6)


def test_pixel_weights_have_mean_one_in_each_image():
    visible = jnp.asarray(np.random.default_rng(0).uniform(size=(3, 16, 16)) < 0.7, jnp.float32)
    config = LossConfig(center_weight=2.0, occlusion_weight=0.2)
    weights = losses.pixel_weights(config, 16, 16, visible)
    np.testing.assert_allclose(jnp.mean(weights, axis=(1, 2)), 1, rtol=1e-5)
    hidden = losses.pixel_weights(LossConfig(occlusion_weight=0.0), 16, 16, 0 * visible)
    np.testing.assert_array_equal(hidden, 0)


def test_free_bits_remove_the_pull_on_dimensions_below_them():
    mu, logvar = jnp.full((4, 2), 0.1), jnp.zeros((4, 2))
    assert losses.kl_divergence(mu, logvar, free_bits=0.5).mean() == pytest.approx(1.0)

    @partial(jax.jit, static_argnums=0)
    @partial(jax.grad, argnums=1)
    def pull_of(free_bits, mu):
        return losses.kl_divergence(mu, logvar, free_bits).mean()

    np.testing.assert_allclose(pull_of(0.5, mu), 0, atol=1e-7)
    pull = pull_of(0.0, mu)
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


def khosla(mu, subjects, temperature):
    """Equation 2 of Khosla et al. (2020), image by image."""
    codes = mu / np.linalg.norm(mu, axis=1, keepdims=True)
    values = []
    for i, subject in enumerate(subjects):
        others = [a for a in range(len(codes)) if a != i]
        positives = [p for p in others if subjects[p] == subject]
        total = sum(np.exp(codes[i] @ codes[a] / temperature) for a in others)
        terms = [np.log(np.exp(codes[i] @ codes[p] / temperature) / total) for p in positives]
        values.append(-np.mean(terms) if terms else 0.0)
    return values


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_supervised_contrastive_is_khosla_equation_2(temperature):
    mu = np.random.default_rng(0).normal(size=(7, 5))
    subjects = np.asarray([3, 1, 3, 2, 1, 3, 0])
    ours = losses.supervised_contrastive(jnp.asarray(mu), jnp.asarray(subjects), temperature)
    np.testing.assert_allclose(ours, khosla(mu, subjects, temperature), rtol=1e-5)
    assert ours[3] == ours[6] == 0


def test_images_without_a_positive_pull_on_nothing():
    for subjects in (jnp.arange(4), jnp.arange(1)):
        mu = np.random.default_rng(0).normal(size=(len(subjects), 3)).astype(np.float32)
        pull = jax.jit(jax.grad(lambda m, s: losses.supervised_contrastive(m, s, 0.1).sum()))(
            mu, subjects
        )
        np.testing.assert_array_equal(pull, 0)


def test_the_contrastive_term_is_added_with_its_weight():
    arrays = {"reconstruction": OTHERS, "target": IMAGES, "mu": MU, "logvar": LOGVAR}
    subjects = jnp.asarray([4, 4])
    plain, _ = losses.objective(LossConfig(), **arrays, kl_weight=0.1)
    config = LossConfig(contrastive_weight=0.3, contrastive_temperature=0.7)
    loss, terms = losses.objective(config, **arrays, kl_weight=0.1, subjects=subjects)
    expected = losses.supervised_contrastive(MU, subjects, 0.7).mean()
    np.testing.assert_allclose(terms["contrastive"], expected)
    np.testing.assert_allclose(loss, plain + 0.3 * expected, rtol=1e-6)
    with pytest.raises(AssertionError, match="subjects"):
        losses.objective(config, **arrays, kl_weight=0.1)


def test_a_batch_cut_over_devices_has_the_loss_and_gradients_of_the_whole():
    """`jax.vmap` with a named axis has the collectives of `jax.pmap`, and needs one device."""
    config = LossConfig(
        edge_weight=1.0, center_weight=1.0, occlusion_weight=0.3, free_bits=0.09,
        contrastive_weight=2.0,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    batch = {
        "target": rng.uniform(size=(8, 16, 16, 3)).astype(np.float32),
        "visible": (rng.uniform(size=(8, 16, 16)) < 0.8).astype(np.float32),
        "inputs": rng.normal(0, 0.7, (8, 5)).astype(np.float32),
        "subjects": np.asarray([0, 1, 2, 0, 1, 3, 2, 0]),
    }
    params = {"mu": jnp.eye(5) * 0.6, "gain": jnp.asarray(0.8)}

    def loss(params, batch, axis_name=None):
        mu = batch["inputs"] @ params["mu"]
        return losses.objective(
            config,
            reconstruction=params["gain"] * batch["target"],
            target=batch["target"],
            visible=batch["visible"],
            subjects=batch["subjects"],
            mu=mu,
            logvar=0.1 * mu - 0.3,
            kl_weight=100.0,
            axis_name=axis_name,
        )

    def on_one_device(params, batch):
        return jax.lax.pmean(jax.grad(loss, has_aux=True)(params, batch, "devices"), "devices")

    parts = jax.tree.map(lambda x: x.reshape(4, 2, *x.shape[1:]), batch)
    on_four = jax.vmap(on_one_device, in_axes=(None, 0), axis_name="devices")
    cut = jax.jit(on_four)(params, parts)
    whole = jax.jit(jax.grad(loss, has_aux=True))(params, batch)
    _, terms = whole
    mu = 0.6 * batch["inputs"]
    logvar = 0.1 * mu - 0.3
    kl = np.mean(0.5 * (mu**2 + np.exp(logvar) - 1 - logvar), axis=0)
    assert kl.min() < 0.09 < kl.max()
    assert terms["contrastive"] > 0
    jax.tree.map(lambda c, w: np.testing.assert_allclose(c[0], w, rtol=1e-6, atol=1e-6), cut, whole)
