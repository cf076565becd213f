"""The estimator: scikit-learn's PCA with fit, transform and inverse_transform in JAX."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.sparse import issparse
from sklearn import decomposition
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_array, check_is_fitted, validate_data

from jaxear.errors import UserError
from jaxear.pca import krylov, spectra
from jaxear.pca.batches import Source, is_rows, open_source, row_blocks
from jaxear.pca.moments import Moments, gather_moments, join_processes, merge
from jaxear.pca.spectra import Spectrum

SOLVERS = (
    "auto",
    "full",
    "covariance_eigh",
    "covariance",
    "gram",
    "arpack",
    "randomized",
    "stream",
)
FLOATS: Any = [np.float64, np.float32]
EXACT_STREAM_FEATURES = 4096
"""Up to here `stream` gathers the second moments: 128 MiB, and seconds for their eigenvectors."""
LARGEST_MOMENTS_FEATURES = 32_768
"""Beyond it the second moments alone take 8 GiB and their eigenvectors hours."""


class PCAError(UserError, ValueError):
    """What was given cannot be fitted or transformed; a ValueError too, as scikit-learn raises."""


class PCA(decomposition.PCA):
    """Principal component analysis in JAX, on any device, with scikit-learn's interface.

    Parameters, attributes and errors are those of `sklearn.decomposition.PCA`; score,
    score_samples, get_covariance, get_precision and get_feature_names_out are inherited from it.
    Input is never overwritten. JAX's own configuration is left as it is: float64 is switched on for
    the time of a call only.

    Parameters
    ----------
    n_components : int, float, "mle" or None
        Components to keep: that many; the fewest that explain more than this share of the variance;
        Minka's choice; all.
    copy : bool
        Without effect (see above).
    whiten : bool
        Scale the scores to unit variance.
    svd_solver : str
        - "full": singular value decomposition in float64.
        - "gram", "covariance", "covariance_eigh": one method under three names. Eigenvectors of the
          smaller of the two product matrices, n x n or d x d, in float64.
        - "randomized": randomized block Krylov iteration in the input's own precision (see
          `jaxear.pca.krylov`).
        - "arpack": ARPACK's Lanczos iteration, the products computed in JAX.
        - "stream": batch by batch, for data larger than memory. Up to 4,096 features, or where
          n_components is not an int, or the batches can be read only once: mean and second moments
          in one pass, then their eigenvectors, exact to float64. Otherwise the mean and total
          variance are exact, and the components come from block Krylov iteration, one pass for each
          product, holding a few times n_components vectors of d numbers.
        - "auto": as scikit-learn chooses; "stream" for a memory map, an iterator, a list of batches
          or a function.
    tol : float
        Relative accuracy of the singular values for "arpack" (0: machine precision), and of each
        explained variance for "randomized" and Krylov streams (0: 1e-6).
    iterated_power : int or "auto"
        "randomized" and Krylov streams: with "auto" iterate until `tol` is met, warning if that
        takes over 8 (n_components + n_oversamples) vectors; an int q takes (q + 1) (n_components +
        n_oversamples) of them, the products of q power iterations.
    n_oversamples : int
        See iterated_power.
    power_iteration_normalizer : str
        Accepted for compatibility; every block is always orthonormalised.
    random_state : int, RandomState or None
        Start vectors of "randomized", "arpack" and Krylov streams. Multi-process streams need the
        same int everywhere.
    batch_size : int or None
        Rows per batch where arrays are streamed or transformed; None for 2^24 numbers.

    Notes
    -----
    Streams take an array or memory map, an HDF5 or Zarr data set, a list of batches [n, d], an
    iterator, a data loader, or a function that returns a new iterator. uint8 stays uint8 until it
    is on the device. Batches are spread over all local devices. In a program of several processes
    (`jax.process_count() > 1`) fitting a stream is a collective operation: every process calls it
    with its own rows and receives the components of all rows.

    Errors a user can cause are PCAError (a ValueError) or scikit-learn's own ValueError and
    TypeError.
    """

    _parameter_constraints: dict = {  # noqa: RUF012  (declared so by scikit-learn)
        **decomposition.PCA._parameter_constraints,
        "svd_solver": [str],
        "batch_size": [int, np.integer, None],
    }

    def __init__(
        self,
        n_components=None,
        *,
        copy=True,
        whiten=False,
        svd_solver="auto",
        tol=0.0,
        iterated_power="auto",
        n_oversamples=10,
        power_iteration_normalizer="auto",
        random_state=None,
        batch_size=None,
    ):
        super().__init__(
            n_components,
            copy=copy,
            whiten=whiten,
            svd_solver=svd_solver,
            tol=tol,
            iterated_power=iterated_power,
            n_oversamples=n_oversamples,
            power_iteration_normalizer=power_iteration_normalizer,
            random_state=random_state,
        )
        self.batch_size = batch_size

    def fit(self, X: Any, y: Any = None) -> PCA:
        """Find the components of X [n, d], or of a stream of batches; y is ignored."""
        self._check_parameters()
        self._moments = None
        if issparse(X):
            check_array(X)  # raises scikit-learn's error for input that has to be dense
        streamed = not is_rows(X) or isinstance(X, np.memmap)
        with jax.enable_x64(True):
            if self.svd_solver == "stream" or (self.svd_solver == "auto" and streamed):
                return self._fit_stream(open_source(X, self.batch_size))
            if not is_rows(X):
                raise PCAError(
                    f"svd_solver={self.svd_solver!r} needs an array of rows, got "
                    f"{type(X).__name__}: use svd_solver='stream' for batches."
                )
            table: Any = X
            table = validate_data(self, table, dtype=FLOATS)
            return self._fit_array(table)

    def fit_transform(self, X: Any, y: Any = None) -> np.ndarray:
        """Fit X [n, d] and return its scores [n, k]; for batches, fit, then transform each."""
        if not is_rows(X):
            raise PCAError(
                f"fit_transform needs an array of rows, got {type(X).__name__}: "
                "call fit, then transform each batch."
            )
        return self.fit(X, y).transform(X)

    def partial_fit(self, X: Any, y: Any = None) -> PCA:
        """Add the rows of X [n, d] to those of earlier calls; y is ignored.

        Exact: the result is that of one fit of all rows. Keeps d x d numbers between the calls and
        solves the eigenproblem in each. After a fit it starts anew, with a warning. In a program of
        several processes each keeps to its own rows.
        """
        self._check_parameters()
        moments = getattr(self, "_moments", None)
        if moments is None and hasattr(self, "components_"):
            warnings.warn(
                "fit keeps no second moments, so partial_fit starts anew with these rows alone.",
                UserWarning,
                stacklevel=2,
            )
        rows: Any = validate_data(self, X, dtype=FLOATS, reset=moments is None)
        self._fit_svd_solver = "stream"
        with jax.enable_x64(True):
            new = gather_moments(row_blocks(rows, self.batch_size))
            total = new if moments is None else merge(moments, new)
            self._finish_moments(total, rows.dtype)
        self._moments = total
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Scores [n, k] of X [n, d], block by block: a memory map of uint8 stays one."""
        check_is_fitted(self)
        rows: Any = validate_data(self, X, dtype="numeric", reset=False)
        variances = self.explained_variance_
        # Directions without variance would be divided by zero.
        scale = np.maximum(np.sqrt(variances), np.finfo(variances.dtype).eps)
        weights = self.components_.T / scale if self.whiten else self.components_.T
        return self._map_rows(_project, rows, weights)

    def inverse_transform(self, X: Any) -> np.ndarray:
        """Points [n, d] in feature space that have the scores X [n, k]."""
        check_is_fitted(self)
        scores: Any = check_array(X, input_name="X", dtype=FLOATS)
        given, expected = scores.shape[1], len(self.components_)
        if given != expected:
            raise PCAError(f"X has {given} scores per row, this PCA has {expected} components.")
        weights = self.components_
        if self.whiten:
            weights = weights * np.sqrt(self.explained_variance_)[:, None]
        return self._map_rows(_reconstruct, scores, weights)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.array_api_support = False
        tags.input_tags.sparse = False
        return tags

    def _check_parameters(self) -> None:
        self._validate_params()
        if self.svd_solver not in SOLVERS:
            raise PCAError(
                f"The 'svd_solver' parameter of PCA must be one of {SOLVERS}, "
                f"got {self.svd_solver!r}."
            )
        if self.batch_size is not None and self.batch_size < 1:
            raise PCAError(
                f"The 'batch_size' parameter of PCA must be at least 1, got {self.batch_size}."
            )

    def _fit_array(self, X: np.ndarray) -> PCA:
        n, d = X.shape
        solver = self._fit_svd_solver = self._choose_solver(n, d)
        k = self._check_n_components(n, d)
        if solver in ("arpack", "randomized"):
            random_state = check_random_state(self.random_state)
            if solver == "arpack":
                mean, spectrum = spectra.arpack_spectrum(X, k, self.tol, random_state)
                return self._finish(mean, spectrum, n, X.dtype)
            operator = krylov.InMemory(X, random_state)
            return self._finish_krylov(operator, k, X.dtype, narrowing=4)
        if solver == "full":
            mean, spectrum = spectra.svd_spectrum(X)
        elif n < d:
            mean, spectrum = spectra.gram_spectrum(X)
        else:
            return self._finish_moments(gather_moments(row_blocks(X, self.batch_size)), X.dtype)
        return self._finish(mean, spectrum, n, X.dtype)

    def _choose_solver(self, n: int, d: int) -> str:
        """The solver for an array [n, d]; "auto" by the rules of scikit-learn 1.5 and later."""
        if self.svd_solver != "auto":
            return self.svd_solver
        if d <= 1000 and n >= 10 * d:
            return "covariance_eigh"
        k = min(n, d) if self.n_components is None else self.n_components
        if max(n, d) > 500 and k != "mle" and 1 <= k < 0.8 * min(n, d):
            return "randomized"
        return "full"

    def _check_n_components(self, n: int, d: int) -> Any:
        """n_components for data [n, d], None resolved; raises what the solver cannot give."""
        solver, k, most = self._fit_svd_solver, self.n_components, min(n, d)
        if n < 2:
            raise PCAError(
                "Found data with 1 sample, while a minimum of 2 is required to have a variance."
            )
        truncated = solver in ("arpack", "randomized")
        if k is None:
            return most - 1 if solver == "arpack" else most
        if k == "mle":
            if truncated:
                raise PCAError(f"n_components={k!r} cannot be a string with svd_solver={solver!r}")
            if n < d:
                raise PCAError("n_components='mle' is only supported if n_samples >= n_features")
        elif not truncated <= k <= most:
            raise PCAError(
                f"n_components={k!r} must be between {int(truncated)} and "
                f"min(n_samples, n_features)={most} with svd_solver={solver!r}"
            )
        elif solver == "arpack" and k == most:
            raise PCAError(
                f"n_components={k!r} must be strictly less than "
                f"min(n_samples, n_features)={most} with svd_solver={solver!r}"
            )
        return k

    def _fit_stream(self, source: Source) -> PCA:
        self._fit_svd_solver = "stream"
        dtypes: list[np.dtype] = []

        def checked() -> Iterator[np.ndarray]:
            for block in source.blocks():
                batch: Any = validate_data(self, block, dtype="numeric", reset=not dtypes)
                if batch.shape[1] > LARGEST_MOMENTS_FEATURES and not by_krylov:
                    raise PCAError(
                        f"The second moments of {batch.shape[1]} features do not fit in memory. "
                        "Give n_components as an int, and the rows as an array, a memory map or a "
                        "function that returns a new iterator."
                    )
                dtypes.append(batch.dtype)
                yield batch

        k: Any = self.n_components
        by_krylov = source.repeatable and isinstance(k, (int, np.integer)) and k > 0
        if by_krylov:
            first = next(iter(source.blocks()), None)
            by_krylov = first is not None and np.shape(first)[-1] > EXACT_STREAM_FEATURES
        if not by_krylov:
            moments = join_processes(gather_moments(checked()))
            return self._finish_moments(moments, _result_dtype(dtypes))
        operator = krylov.Streamed(Source(checked, True), check_random_state(self.random_state))
        return self._finish_krylov(operator, int(k), _result_dtype(dtypes), narrowing=2)

    def _finish_moments(self, moments: Moments, dtype: Any) -> PCA:
        n = int(moments.count)
        self._check_n_components(n, len(moments.mean))
        return self._finish(moments.mean, spectra.covariance_spectrum(moments.scatter, n), n, dtype)

    def _finish_krylov(self, operator: Any, k: int, dtype: Any, narrowing: int) -> PCA:
        """Fit by block Krylov iteration in blocks of (k + n_oversamples) / narrowing columns."""
        n, d = operator.shape
        self._check_n_components(n, d)
        sketch = k + self.n_oversamples
        power: Any = self.iterated_power
        auto = power == "auto"
        plan = krylov.Plan(
            # Below 32 columns a product hardly gets cheaper, and wide blocks also find variances
            # that occur several times.
            width=max(-(-sketch // narrowing), min(sketch, 32)),
            columns=max(8 * sketch, 256) if auto else (power + 1) * sketch,
            tolerance=(self.tol or krylov.DEFAULT_TOLERANCE) if auto else None,
        )
        values, directions = krylov.leading_components(operator, k, plan)
        spectrum = Spectrum(values / (n - 1), lambda k: directions[:k], operator.total / (n - 1))
        return self._finish(operator.mean, spectrum, n, dtype)

    def _finish(self, mean: np.ndarray, spectrum: Spectrum, n: int, dtype: Any) -> PCA:
        """Set the attributes of a fit on n samples, in `dtype`."""
        d, variances = len(mean), spectrum.variances
        ratios = variances / spectrum.total
        wanted: Any = self.n_components
        if wanted == "mle":
            k = spectra.minka_dimension(variances, n)
        elif wanted is None:
            k = len(variances)
        elif 0 < wanted < 1:
            k = int(np.searchsorted(np.cumsum(ratios), wanted, side="right")) + 1
        else:
            k = int(wanted)
        left = min(n, d) - k
        # Tipping and Bishop's noise is the mean variance of the directions left out.
        noise = max(0.0, spectrum.total - variances[:k].sum()) / left if left else 0.0
        components = spectrum.directions(k)
        # scikit-learn's convention for signs: the entry of largest magnitude is positive.
        largest = np.take_along_axis(components, np.abs(components).argmax(axis=1)[:, None], axis=1)
        self.components_ = np.ascontiguousarray(components * np.sign(largest), dtype)
        self.explained_variance_ = variances[:k].astype(dtype)
        self.explained_variance_ratio_ = ratios[:k].astype(dtype)
        self.singular_values_ = np.sqrt(variances[:k] * (n - 1)).astype(dtype)
        self.mean_ = np.asarray(mean, dtype)
        self.noise_variance_ = np.dtype(dtype).type(noise)
        self.n_components_, self.n_samples_ = k, n
        return self

    def _map_rows(self, function: Any, X: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """function(rows, mean, weights) for blocks of X, in the wider type of X and components."""
        single = X.dtype == np.float32 and self.components_.dtype == np.float32
        dtype = np.float32 if single else np.float64
        out = np.empty((len(X), weights.shape[1]), dtype)
        with jax.enable_x64(True):
            mean, matrix = jnp.asarray(self.mean_, dtype), jnp.asarray(weights, dtype)
            start = 0
            for rows in row_blocks(X, self.batch_size):
                out[start : start + len(rows)] = function(jnp.asarray(rows, dtype), mean, matrix)
                start += len(rows)
        return out


@jax.jit
def _project(rows: jax.Array, mean: jax.Array, weights: jax.Array) -> jax.Array:
    # Centring first keeps the digits that a large mean would cancel in the product.
    return jnp.matmul(rows - mean, weights, precision=jax.lax.Precision.HIGHEST)


@jax.jit
def _reconstruct(scores: jax.Array, mean: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.matmul(scores, weights, precision=jax.lax.Precision.HIGHEST) + mean


def _result_dtype(dtypes: list[np.dtype]) -> np.dtype:
    """float32 if all batches are, else float64, as for arrays."""
    single = all(dtype == np.float32 for dtype in dtypes)
    return np.dtype(np.float32 if single else np.float64)
