"""Principal components by exact methods, and Minka's choice of their number.

All of it runs in float64 whatever the input's type (call it inside `jax.enable_x64(True)`):
squaring float32 data would leave half of its digits, and a float32 SVD cannot tell apart components
whose variances differ by less than 1e-6.
"""

from __future__ import annotations

from collections.abc import Callable
from math import lgamma, log, pi
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.sparse.linalg import LinearOperator, svds

from jaxear.pca.moments import mean_of

_HIGHEST = jax.lax.Precision.HIGHEST


class Spectrum(NamedTuple):
    """Variances along the principal directions, descending, and the directions on demand.

    variances: [r], float64. directions: k -> the first k directions [k, d] as rows, orthonormal, of
    any sign. total: variance of the data, the sum of all variances including those left out.
    """

    variances: np.ndarray
    directions: Callable[[int], np.ndarray]
    total: float


@jax.jit
def _centre(X: jax.Array, mean: jax.Array) -> jax.Array:
    return X.astype(jnp.float64) - mean


def svd_spectrum(X: np.ndarray) -> tuple[np.ndarray, Spectrum]:
    """Mean and all min(n, d) components of X [n, d], by a singular value decomposition."""
    mean = mean_of(X)
    centred = _centre(X, mean)
    _, sigma, vt = jnp.linalg.svd(centred, full_matrices=False)
    variances = np.asarray(sigma) ** 2 / (len(X) - 1)
    return mean, Spectrum(variances, _first(vt), float(variances.sum()))


def covariance_spectrum(scatter: np.ndarray, n_samples: int) -> Spectrum:
    """The min(n, d) components of n samples whose centred outer products sum to scatter [d, d]."""
    values, vectors = jnp.linalg.eigh(jnp.asarray(scatter) / (n_samples - 1))
    rank = min(n_samples, len(scatter))
    variances = np.maximum(np.asarray(values)[::-1][:rank], 0.0)
    return Spectrum(
        variances, _first(vectors[:, ::-1].T), float(np.trace(scatter)) / (n_samples - 1)
    )


def gram_spectrum(X: np.ndarray) -> tuple[np.ndarray, Spectrum]:
    """Mean and all n components of X [n, d], n < d, from the inner products of its rows [n, n]."""
    mean = mean_of(X)
    centred = _centre(X, mean)
    gram = jnp.matmul(centred, centred.T, precision=_HIGHEST) / (len(X) - 1)
    values, vectors = jnp.linalg.eigh(gram)
    variances = np.maximum(np.asarray(values)[::-1], 0.0)

    def directions(k: int) -> np.ndarray:
        # The columns are orthogonal with norms in descending order; QR keeps the directions of the
        # leading ones and completes those without variance to an orthonormal set, where dividing by
        # the norm would give noise.
        projected = jnp.matmul(centred.T, vectors[:, ::-1][:, :k], precision=_HIGHEST)
        return np.asarray(jnp.linalg.qr(projected)[0]).T

    return mean, Spectrum(variances, directions, float(np.trace(np.asarray(gram))))


class _Products(LinearOperator):
    """Products of a matrix in JAX with vectors on the host, for ARPACK."""

    def __init__(self, matrix: jax.Array):
        super().__init__(np.dtype(matrix.dtype), matrix.shape)
        self._matrix = matrix

    def _matvec(self, x: np.ndarray) -> np.ndarray:
        return np.asarray(_matvec(self._matrix, x))

    def _rmatvec(self, x: np.ndarray) -> np.ndarray:
        return np.asarray(_matvec(self._matrix.T, x))


@jax.jit
def _matvec(matrix: jax.Array, vector: jax.Array) -> jax.Array:
    return jnp.matmul(matrix, vector, precision=_HIGHEST)


def arpack_spectrum(
    X: np.ndarray, k: int, tol: float, random_state: np.random.RandomState
) -> tuple[np.ndarray, Spectrum]:
    """Mean and the first k < min(n, d) components of X [n, d], by ARPACK's Lanczos iteration.

    ARPACK runs on the host and asks for products with the data, which are computed in JAX. tol:
    relative accuracy of the singular values, 0 for machine precision.
    """
    mean = mean_of(X)
    centred = _centre(X, mean)
    operator = _Products(centred)
    start = random_state.uniform(-1, 1, size=min(centred.shape))
    _, sigma, vt = svds(operator, k=k, tol=tol, v0=start)  # pyright: ignore[reportArgumentType]
    variances = sigma[::-1] ** 2 / (len(X) - 1)
    total = float(jnp.sum(centred**2)) / (len(X) - 1)
    return mean, Spectrum(variances, _first(np.asarray(vt)[::-1]), total)


def _first(directions: jax.Array | np.ndarray) -> Callable[[int], np.ndarray]:
    return lambda k: np.asarray(directions[:k])


def minka_dimension(variances: np.ndarray, n_samples: int) -> int:
    """The number of components, 1 to d - 1, with the largest evidence by Laplace's approximation.

    variances: [d], descending, all of them. Source: T. P. Minka, "Automatic choice of
    dimensionality for PCA", NIPS 2000, equations 76 to 80. The double sum over pairs of eigenvalues
    is split into running sums, so that all dimensions together cost d^2 and not d^4.
    """
    d, tiny = len(variances), 1e-15
    ranks = np.arange(1, d)
    upper = np.triu(np.ones((d, d), bool), 1)

    def log_pairs(values: np.ndarray) -> np.ndarray:
        """log |values_i - values_j| where i < j, else 0."""
        return np.where(upper, np.log(np.maximum(np.abs(values[:, None] - values), 1e-300)), 0.0)

    inverse = 1.0 / np.maximum(variances, 1e-150)
    gaps = np.cumsum(log_pairs(variances).sum(axis=1))[ranks - 1]
    inverse_gaps = np.cumsum(log_pairs(inverse).sum(axis=0))[ranks - 1]

    evidence = np.full(d - 1, -np.inf)
    for i, k in enumerate(ranks):
        if variances[k - 1] < tiny:
            break  # a direction without variance cannot be a component, nor can any after it
        noise = max(tiny, variances[k:].mean())
        sizes = (d - np.arange(k)) / 2.0
        prior = -k * log(2.0) + sum(map(lgamma, sizes)) - log(pi) * sizes.sum()
        fit = -n_samples / 2.0 * (np.log(variances[:k]).sum() + log(noise) * (d - k))
        free = d * k - k * (k + 1) / 2.0
        to_noise = (d - k) * np.log(np.maximum(1.0 / noise - inverse[:k], 1e-300)).sum()
        hessian = gaps[i] + inverse_gaps[i] + to_noise + free * log(n_samples)
        evidence[i] = (
            prior
            + fit
            + log(2.0 * pi) * (free + k) / 2.0
            - hessian / 2.0
            - k * log(n_samples) / 2.0
        )
    return int(ranks[np.argmax(evidence)])
