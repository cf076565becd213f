from __future__ import annotations

import jax
import numpy as np
import pytest
from sklearn.decomposition import PCA

import jaxear
from jaxear.assessment.coders import LinearCoder, ModelCoder, encode_all
from jaxear.errors import UserError


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), dtype=np.uint8)


def test_linear_coder_is_scikit_learns_pca(images):
    coder = LinearCoder.fit(images[:5], 3)
    reference = PCA(3).fit(images[:5].reshape(5, -1) / 255)
    codes = encode_all(coder, images)
    expected = reference.transform(images.reshape(7, -1) / 255)
    np.testing.assert_allclose(np.abs(codes), np.abs(expected), atol=1e-4)
    decoded = np.clip(reference.inverse_transform(expected), 0, 1).reshape(images.shape)
    np.testing.assert_allclose(coder.decode(codes), decoded, atol=1e-4)
    assert (coder.numbers, codes.shape) == (3, (7, 3))


def test_linear_coder_has_no_more_numbers_than_images_allow(images):
    coder = LinearCoder.fit(images[:5], 64)
    assert coder.numbers == 4
    np.testing.assert_allclose(
        coder.decode(encode_all(coder, images[:5])), images[:5] / 255, atol=1e-4
    )
    with pytest.raises(UserError, match="two training images"):
        LinearCoder.fit(images[:1], 64)


def test_model_coder_is_the_model(finished):
    model = jaxear.load_model(finished)
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    coder = ModelCoder(model, "tiny")
    mu, logvar = jax.jit(model.encode)(images / np.float32(255))
    code = coder.encode(images)
    np.testing.assert_allclose(code.mean, mu, atol=1e-4)
    np.testing.assert_allclose(code.logvar, logvar, atol=1e-4)
    np.testing.assert_allclose(coder.decode(code.mean), jax.jit(model.decode)(mu), atol=1e-4)
    assert coder.numbers == 8
