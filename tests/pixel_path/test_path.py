"""The pixel path: PCA at first, better than PCA where ears lie on a curve, fixed in training."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from sklearn import decomposition

import jaxear
from jaxear.config import TrainConfig
from jaxear.data.pipeline import load_split
from jaxear.eigenears import EigenEars, without_pose
from jaxear.errors import UserError
from jaxear.model import create_vae
from jaxear.pixel_path import PixelPath, fit_pixel_path
from jaxear.train import train
from tests.training.tiny import TINY_SAM, optimized, tiny, without_eigenears

SIZE = 16
CONFIG = TrainConfig(
    image_size=SIZE, weights="none", backbone_options=TINY_SAM, latent_dim=3, head_width=64,
    decoder_channels=(8,), pixel_components=12, pixel_steps=0,
)  # fmt: skip


def blobs(n, seed=0):
    """A bright spot at random places: two numbers make it, but not linearly."""
    x, y = np.random.default_rng(seed).uniform(5, 10, (2, n, 1, 1))
    columns, rows = np.arange(SIZE), np.arange(SIZE)[:, None]
    grey = 200 * np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / 12)
    return np.repeat(grey[..., None], 3, axis=-1).astype(np.uint8)


def fitted(images, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    path = PixelPath(
        config.pixel_components, config.latent_dim, (SIZE, SIZE), width=128, rngs=nnx.Rngs(0)
    )
    fit_pixel_path(path, images, config, progress=False)
    return path


def reconstruct(path, images):
    scores = path.encode(jnp.asarray(images, jnp.float32) / 255)
    return np.asarray(path.decode(scores * path.spread)).reshape(len(images), -1)


def test_without_its_network_it_is_linear_pca():
    images, others = blobs(60), blobs(20, seed=1)
    pca = decomposition.PCA(3, svd_solver="full").fit(images.reshape(60, -1) / 255.0)
    expected = pca.inverse_transform(pca.transform(others.reshape(20, -1) / 255.0))
    np.testing.assert_allclose(reconstruct(fitted(images), others), expected, atol=1e-4)


@pytest.mark.slow
def test_its_network_beats_linear_pca_on_images_never_seen():
    images, others = blobs(400), blobs(100, seed=1)
    target = others.reshape(100, -1) / 255.0
    with optimized():
        error = {
            steps: np.mean((reconstruct(fitted(images, pixel_steps=steps), others) - target) ** 2)
            for steps in (0, 600)
        }
    assert error[600] < 0.5 * error[0]


def test_codes_keep_the_spread_of_the_scores():
    images = blobs(60)
    path = fitted(images)
    codes = path.encode(jnp.asarray(images, jnp.float32) / 255) * path.spread
    pca = decomposition.PCA(3, svd_solver="full").fit(images.reshape(60, -1) / 255.0)
    ratios = pca.explained_variance_ / pca.explained_variance_[0]
    np.testing.assert_allclose(np.var(codes, axis=0, ddof=1), ratios, rtol=1e-3)


def test_a_model_starts_from_its_pixel_path():
    model = create_vae(CONFIG, SIZE, rngs=nnx.Rngs(0))
    fit_pixel_path(model.pixels, blobs(60), CONFIG, progress=False)
    images = jnp.asarray(blobs(5, seed=2), jnp.float32) / 255
    expected = np.clip(reconstruct(model.pixels, blobs(5, seed=2)), 0, 1)
    found, (_, logvar) = nnx.jit(lambda m, x: (m.reconstruct(x), m.encode(x)))(model, images)
    np.testing.assert_allclose(np.reshape(found, (5, -1)), expected, atol=1e-6)
    np.testing.assert_allclose(  # the same share of each component's own spread
        logvar - 2 * np.log(model.pixels.spread), -8, atol=0.2
    )


@pytest.mark.slow
def test_training_moves_the_rest_and_not_the_path(photographs, tmp_path):
    config = tiny(
        photographs, tmp_path / "run", epochs=1, aug_shift=0.1,
        pixel_components=16, pixel_steps=100, pixel_registration=True,
    )  # fmt: skip
    with without_eigenears():
        train(config, progress=False)
    model = jaxear.load_model(config.run_dir, checkpoint="latest")
    images = load_split(config, "train", progress=False).images
    direct = PixelPath(16, 8, (32, 32), registered=True, rngs=nnx.Rngs(0))
    fit_pixel_path(direct, images, dataclasses.replace(config, pixel_steps=0), progress=False)
    np.testing.assert_allclose(model.pixels.deviations[...], direct.deviations[...], rtol=1e-5)
    assert np.any(np.asarray(model.pixels.network.decoder.out.kernel[...]) != 0)
    assert np.any(np.asarray(model.decoder.out.kernel[...]) != 0)


def test_eigenears_in_one_pose_have_no_component_that_moves_the_ear():
    config = dataclasses.replace(CONFIG, latent_dim=8, pixel_registration=True)
    model = create_vae(config, SIZE, rngs=nnx.Rngs(0))
    assert model.n_pose == 4
    codes = np.random.default_rng(0).normal(size=(30, 8)).astype(np.float32)
    still = without_pose(model, codes)
    np.testing.assert_array_equal(still[:, 4:], codes[:, 4:])
    eigenears = EigenEars.fit_codes(model, still, n_components=4)
    np.testing.assert_allclose(eigenears.components_[:, :4], 0, atol=1e-6)
    np.testing.assert_allclose(eigenears.mean_, codes.mean(axis=0), atol=1e-6)
    unregistered = create_vae(CONFIG, SIZE, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="--pixel-registration"):
        without_pose(unregistered, codes)


def test_too_few_images_and_too_few_components_are_errors():
    with pytest.raises(UserError, match="set --pixel-components to 9 at most, or augment"):
        fitted(blobs(10))
    with pytest.raises(UserError, match="latent_dim must be above 4, the numbers of a pose"):
        train(dataclasses.replace(CONFIG, pixel_registration=True), progress=False)
    with pytest.raises(UserError, match="pixel_components must be 0"):
        train(dataclasses.replace(CONFIG, pixel_components=2), progress=False)
