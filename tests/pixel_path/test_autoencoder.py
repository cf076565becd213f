"""The network between scores and code: linear at first, and codes that fit what is decoded."""

from __future__ import annotations

import jax
import numpy as np
from flax import nnx

from jaxear.pixel_path.autoencoder import ScoreAutoencoder

DEVIATIONS = np.linspace(3, 0.5, 10).astype(np.float32)


def coder(scale: float) -> ScoreAutoencoder:
    """One whose corrections are random and, by `scale`, so large."""
    rngs = nnx.Rngs(0)
    coder = ScoreAutoencoder(10, 4, width=32, rngs=rngs)
    for part in (coder.encoder, coder.decoder):
        shape = part.out.kernel.shape
        part.out.kernel[...] = scale * jax.random.normal(rngs.params(), shape)
    return coder


def scores(n: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(n, 10)).astype(np.float32)


def error(coder: ScoreAutoencoder, code: jax.Array, scores: np.ndarray) -> np.ndarray:
    return np.sum(((np.asarray(coder.decode(code)) - scores) * DEVIATIONS) ** 2, axis=1)


def test_it_starts_linear():
    straight, x = coder(0.0), scores(5)
    np.testing.assert_array_equal(straight.encode(x), x[:, :4])
    np.testing.assert_array_equal(straight.decode(x[:, :4]), np.pad(x[:, :4], ((0, 0), (0, 6))))
    np.testing.assert_allclose(straight.fit_code(x, DEVIATIONS), x[:, :4], atol=1e-6)


def test_a_code_that_was_fitted_is_nearer_and_never_further():
    bent, x = coder(0.1), scores(50)
    before = error(bent, bent.encode(x), x)
    after = error(bent, jax.jit(bent.fit_code)(x, DEVIATIONS), x)
    assert np.all(after <= before * (1 + 1e-5))
    assert after.mean() < 0.8 * before.mean()


def test_dropout_is_of_training_alone():
    bent, x = coder(0.1), scores(5)
    key = jax.random.key(0)
    assert np.any(np.asarray(bent.encode(x, key)) != np.asarray(bent.encode(x)))
