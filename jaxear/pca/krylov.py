"""Leading components by block Krylov iteration, for data in memory or read anew in each pass.

The centred rows A [n, d] are met only through products. Starting from A^T G with G random, each
step multiplies the newest block of an orthonormal basis by A^T A and adds the result to the basis;
the best approximations that the basis holds (Ritz values and vectors) are the components. That is
the randomized method of Halko, Martinsson and Tropp ("Finding structure with randomness", SIAM
Review 53, 2011) keeping all its power iterates instead of the last, analysed by Musco and Musco
("Randomized block Krylov methods for stronger and faster approximate singular value decomposition",
NeurIPS 2015); blocks much narrower than the number of components need the fewest products for an
accuracy (Meyer, Musco and Musco, "On the unreasonable effectiveness of single vector Krylov methods
for low-rank approximation", SODA 2024).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.exceptions import ConvergenceWarning

from jaxear.pca.batches import Source, Spreader, all_processes
from jaxear.pca.moments import gather_moments, join_processes, mean_of

DEFAULT_TOLERANCE = 1e-6
_HIGHEST = (
    jax.lax.Precision.HIGHEST
)  # float32 products in full float32: no TF32 or bf16 on accelerators


class Operator(Protocol):
    """Centred rows A [n, d] seen through their products, each of which reads the data once."""

    shape: tuple[int, int]
    dtype: Any

    def sketch(self, width: int) -> jax.Array:
        """A^T G [d, width] for a random normal G."""
        ...

    def product(self, V: jax.Array) -> jax.Array:
        """A^T A V [d, w] for V [d, w]."""
        ...

    def gram(self, V: jax.Array) -> np.ndarray:
        """(A V)^T (A V) [w, w], summed in float64."""
        ...


class Plan(NamedTuple):
    """Width of a block, most columns of the basis, and when to stop before (None: never)."""

    width: int
    columns: int
    tolerance: float | None


def leading_components(operator: Operator, k: int, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """The k largest eigenvalues of A^T A [k], descending, and their eigenvectors [k, d] as rows.

    With a tolerance, stops when the extrapolated relative error of every eigenvalue is below it,
    and warns (ConvergenceWarning) if the columns run out first. A basis of min(n, d) columns spans
    all of the data. Ritz values never exceed the eigenvalues: what an early stop misses is
    explained variance left out, never invented.
    """
    limit = min(operator.shape)
    columns = min(plan.columns, limit)
    basis = [_extend([], operator.sketch(min(plan.width, columns)))]
    filled = basis[0].shape[1]
    projected = np.zeros((columns, columns))  # basis^T A^T A basis, block tridiagonal
    progress = _Progress(k, plan.tolerance, float(jnp.finfo(operator.dtype).eps))
    while True:
        image = operator.product(basis[-1])
        newest = slice(filled - basis[-1].shape[1], filled)
        projected[newest, newest] = _inner(basis[-1], image)
        if progress.converged(projected[:filled, :filled]) or filled == columns:
            break
        basis.append(_extend(basis, image[:, : columns - filled]))
        added = slice(filled, filled + basis[-1].shape[1])
        projected[added, newest] = _inner(basis[-1], image)  # eigh reads the lower triangle alone
        filled = added.stop
    if progress.error > (plan.tolerance or np.inf) and filled < limit:
        warnings.warn(
            f"With {filled} basis vectors the explained variances are accurate to about "
            f"{progress.error:.0e} of their size, not to {plan.tolerance:.0e}: raise n_oversamples "
            "or set iterated_power, or tol to what you need.",
            ConvergenceWarning,
            stacklevel=2,
        )
    vectors = np.linalg.eigh(projected[:filled, :filled])[1][:, ::-1]
    ritz = _combine(basis, vectors[:, : k + plan.width].astype(operator.dtype))
    # Ritz values of A^T A carry rounding of the size of the largest eigenvalue, norms of A V only
    # of their own size.
    ritz = _extend([], ritz)
    values, rotation = np.linalg.eigh(operator.gram(ritz))
    directions = _combine([ritz], rotation[:, ::-1][:, :k].astype(operator.dtype))
    return np.maximum(values[::-1][:k], 0.0), np.asarray(directions).T


class _Progress:
    """Watches the k largest Ritz values grow and extrapolates what they still lack."""

    def __init__(self, k: int, tolerance: float | None, eps: float):
        self.k, self.tolerance, self.eps = k, tolerance, eps
        self.error = np.inf
        self._next, self._values, self._change = k, None, None

    def converged(self, projected: np.ndarray) -> bool:
        """Take in the projected matrix [m, m]; whether the error left is below the tolerance."""
        m = len(projected)
        if self.tolerance is None or m < self._next:
            return False
        # Every few columns are enough: the eigenvalues of a large projection cost as much as a
        # step.
        self._next = m + max(1, self.k // 2)
        values = np.linalg.eigvalsh(projected)[::-1][: self.k]
        if self._values is not None:
            # Below this no rise can be told from rounding.
            noise = 10 * self.eps * values[0]
            rise = np.maximum(values - self._values - noise, 0.0)
            change = float(np.max(rise / np.maximum(values, noise + np.finfo(float).tiny)))
            if self._change is not None:
                # The changes shrink geometrically or faster: what is still to come sums to less
                # than their series.
                ratio = change / self._change if self._change > 0 else 0.0
                self.error = change * ratio / (1 - ratio) if ratio < 1 else np.inf
            self._change = change
        self._values = values
        return self.error <= self.tolerance


@jax.jit
def _times(A: jax.Array, V: jax.Array) -> jax.Array:
    return jnp.matmul(A, V, precision=_HIGHEST)


@jax.jit
def _gram(Y: jax.Array) -> jax.Array:
    """Y^T Y, summed in float64."""
    return _inner(Y.astype(jnp.float64), Y.astype(jnp.float64))


@jax.jit
def _inner(Q: jax.Array, W: jax.Array) -> jax.Array:
    return jnp.matmul(Q.T, W, precision=_HIGHEST)


@jax.jit
def _remove(W: jax.Array, Q: jax.Array) -> jax.Array:
    """W without its part in the span of the orthonormal Q."""
    return W - jnp.matmul(Q, jnp.matmul(Q.T, W, precision=_HIGHEST), precision=_HIGHEST)


@jax.jit
def _add_product(acc: jax.Array, Q: jax.Array, S: jax.Array) -> jax.Array:
    return acc + jnp.matmul(Q, S, precision=_HIGHEST)


def _combine(basis: list[jax.Array], weights: np.ndarray) -> jax.Array:
    """[Q_0, Q_1, ...] @ weights."""
    out = jnp.zeros((basis[0].shape[0], weights.shape[1]), basis[0].dtype)
    start = 0
    for Q in basis:
        out = _add_product(out, Q, weights[start : start + Q.shape[1]])
        start += Q.shape[1]
    return out


def _extend(basis: list[jax.Array], W: jax.Array) -> jax.Array:
    """An orthonormal block that adds the span of W to that of the basis."""
    # Twice: once leaves rounding amplified by the cancellation, and where W has nothing new
    # (low-rank data) QR fills in columns of its own that are not yet orthogonal to the basis.
    for _ in range(2):
        for Q in basis:
            W = _remove(W, Q)
        W = _orthonormalise(W)
    return W


def _orthonormalise(W: jax.Array) -> jax.Array:
    """An orthonormal basis of the columns of W."""
    # Products instead of Householder reflections, which wait for each other column by column; two
    # rounds of this are as orthogonal as QR (CholeskyQR2, Yamamoto et al., ETNA 44, 2015) unless W
    # is close to rank-deficient.
    values, vectors = np.linalg.eigh(np.asarray(_gram(W)))
    if values[0] <= 1e-10 * values[-1]:
        return jnp.linalg.qr(W)[0]
    return _combine([W], (vectors / np.sqrt(values)).astype(W.dtype))


class InMemory:
    """The rows X [n, d] of an array, centred once and kept on the default device."""

    def __init__(self, X: np.ndarray, random_state: np.random.RandomState):
        self.shape, self.dtype = X.shape, X.dtype
        self._random_state = random_state
        self.mean = mean_of(X)
        self._rows = _centre(X, self.mean)
        self.total = float(_sum_of_squares(self._rows))
        # XLA on a CPU copies a transposed factor anew for every product, which takes as long as the
        # product.
        on_cpu = jax.default_backend() == "cpu"
        self._columns = jnp.transpose(self._rows) if on_cpu else None

    def sketch(self, width: int) -> jax.Array:
        noise = self._random_state.standard_normal((self.shape[0], width)).astype(self.dtype)
        return self._transposed_times(jnp.asarray(noise))

    def product(self, V: jax.Array) -> jax.Array:
        return self._transposed_times(_times(self._rows, V))

    def gram(self, V: jax.Array) -> np.ndarray:
        return np.asarray(_gram(_times(self._rows, V)))

    def _transposed_times(self, Y: jax.Array) -> jax.Array:
        return _inner(self._rows, Y) if self._columns is None else _times(self._columns, Y)


@jax.jit
def _centre(X: jax.Array, mean: jax.Array) -> jax.Array:
    """Rows less the float64 mean, rounded to their own type only then."""
    return (X.astype(jnp.float64) - mean).astype(X.dtype)


@jax.jit
def _sum_of_squares(A: jax.Array) -> jax.Array:
    return jnp.sum(A.astype(jnp.float64) ** 2)


class Streamed:
    """The rows of a repeatable source, a pass over it for each product, on all devices.

    A first pass takes the mean and the total variance, exactly. float32 and integers of up to 16
    bits are then centred in float64 and multiplied in float32, other types in float64.
    """

    def __init__(self, source: Source, random_state: np.random.RandomState):
        dtypes = set()

        def blocks() -> Iterator[np.ndarray]:
            for batch in source.blocks():
                dtypes.add(np.asarray(batch).dtype)
                yield np.asarray(batch)

        moments = join_processes(gather_moments(blocks(), trace_only=True))
        self.mean, self.total = moments.mean, float(moments.scatter)
        self.shape = (int(moments.count), len(self.mean))
        narrow = np.can_cast(np.result_type(*dtypes), np.float32)
        self.dtype = np.dtype(np.float32 if narrow else np.float64)
        self._source, self._spread = source, Spreader()
        self._shift = self._spread.replicate(self.mean)
        # Each process draws its own numbers for its own rows; the rest must be equal on all of
        # them.
        self._noise = np.random.default_rng([random_state.randint(2**31), jax.process_index()])

    def sketch(self, width: int) -> jax.Array:
        def noise(rows: jax.Array) -> jax.Array:
            numbers = self._noise.standard_normal((*rows.shape[:2], width), np.float32)
            return self._spread.put(numbers.astype(self.dtype, copy=False))

        return self._pass(_sketch_step, (self.shape[1], width), self.dtype, noise)

    def product(self, V: jax.Array) -> jax.Array:
        spread_V = self._spread.replicate(V)
        return self._pass(_product_step, V.shape, self.dtype, lambda _: spread_V)

    def gram(self, V: jax.Array) -> np.ndarray:
        spread_V = self._spread.replicate(V)
        width = V.shape[1]
        return np.asarray(self._pass(_gram_step, (width, width), np.float64, lambda _: spread_V))

    def _pass(
        self,
        step: Callable[..., jax.Array],
        shape: tuple[int, ...],
        dtype: Any,
        factor: Callable[[jax.Array], jax.Array],
    ) -> jax.Array:
        """Sum step(acc, centred rows, factor) over all batches, devices and processes."""
        acc = self._spread.zeros(*shape, dtype=dtype)
        for batch in self._source.blocks():
            rows, counts = self._spread(np.asarray(batch))
            # Waiting keeps one batch in flight; queued steps would hold all of theirs in memory.
            acc = jax.block_until_ready(step(acc, rows, counts, self._shift, factor(rows)))
        return jnp.asarray(all_processes(np.asarray(acc).sum(axis=0)).sum(axis=0))


def _centre_rows(rows: jax.Array, counts: jax.Array, mean: jax.Array, dtype: Any) -> jax.Array:
    """Rows [g, r, d] less the mean, zero beyond the first counts [g] of each group."""
    mask = (jnp.arange(rows.shape[1]) < counts[:, None])[..., None]
    return jnp.where(mask, rows.astype(jnp.float64) - mean, 0.0).astype(dtype)


@partial(jax.jit, donate_argnums=0)
def _sketch_step(acc, rows, counts, mean, G):
    A = _centre_rows(rows, counts, mean, acc.dtype)
    return acc + jnp.einsum("grd,grw->gdw", A, G, precision=_HIGHEST)


@partial(jax.jit, donate_argnums=0)
def _product_step(acc, rows, counts, mean, V):
    A = _centre_rows(rows, counts, mean, acc.dtype)
    projections = jnp.einsum("grd,dw->grw", A, V, precision=_HIGHEST)
    return acc + jnp.einsum("grd,grw->gdw", A, projections, precision=_HIGHEST)


@partial(jax.jit, donate_argnums=0)
def _gram_step(acc, rows, counts, mean, V):
    A = _centre_rows(rows, counts, mean, V.dtype)
    projections = jnp.einsum("grd,dw->grw", A, V, precision=_HIGHEST).astype(acc.dtype)
    return acc + jnp.einsum("grv,grw->gvw", projections, projections, precision=_HIGHEST)
