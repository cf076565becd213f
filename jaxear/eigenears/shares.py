"""How much of one thing follows from others: shares of variance, measured on held-out ears.

Regressions are ordinary least squares on polynomials, additive over the causes. A share is the
covariance of what a cause predicts, for ears that the regression has not seen, with what is there,
over the variance of what is there. Least squares is unbiased, so is the share: 0 on average for a
cause that plays no part, where the R2 of a fit with p columns to n ears would be p / n, and below 0
about as often as above. For independent causes it is the first-order Sobol index (Sobol, "Global
sensitivity indices for nonlinear mathematical models", 2001), as far as a polynomial of `DEGREE`
can follow the cause: shares of several causes add up, and what is missing to 1 is noise, other
causes, and what causes only do together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import combinations
from math import comb
from typing import NamedTuple

import numpy as np

DEGREE = 3  # an angle of light acts through its sine and cosine, a pigment through its exponential
FOLDS = 10
IMAGES_PER_COLUMN = 4  # fewer, and the shares are lost in their standard errors


class Shares(NamedTuple):
    """Shares of variance and their standard errors, each [k], one per thing that is explained."""

    value: np.ndarray
    error: np.ndarray


def polynomials(values: np.ndarray, degree: int = DEGREE) -> np.ndarray:
    """Values [n] as orthonormal columns [n, degree]: their linear, quadratic, ... part.

    First they are cut off at 4 standard deviations from the median, as the middle 68 % of them tell
    these, lest one outlier steer the fit. Columns that say nothing new are 0: all of a constant's,
    all but the first of two values'.
    """
    values = np.asarray(values, np.float64)
    columns = np.zeros((len(values), degree))
    tiny = 1e-9 * (1 + np.abs(values).max())
    if values.std() < tiny:
        return columns
    low, middle, high = np.quantile(values, [0.16, 0.5, 0.84])
    spread = (high - low) / 2
    z = (values - middle) / (spread if spread > tiny else values.std())
    z = np.clip(z, -4, 4)
    basis = [np.full(len(z), len(z) ** -0.5)]
    for power in range(1, degree + 1):
        column = z**power
        length = np.linalg.norm(column)
        for _ in range(2):  # Gram-Schmidt, twice for accuracy
            for known in basis:
                column = column - known * (known @ column)
        if np.linalg.norm(column) > 1e-6 * length:
            basis.append(column / np.linalg.norm(column))
            columns[:, power - 1] = basis[-1]
    return columns * len(z) ** 0.5


def best_degree(n_images: int, n_causes: int) -> int:
    """The highest degree up to `DEGREE` that so many images can carry; 0 where none can."""
    return min(DEGREE, n_images // (IMAGES_PER_COLUMN * n_causes))


class Regression:
    """What each cause contributes to each target, predicted for the tenth of the ears left out.

    Args:
        causes: {name: columns [n, c]}, as `polynomials` makes them.
        targets: [n, k].
        seed: decides which ears are left out together.
    """

    def __init__(self, causes: Mapping[str, np.ndarray], targets: np.ndarray, *, seed: int = 0):
        self._targets = targets - targets.mean(axis=0)
        self._columns: dict[str, np.ndarray] = {}
        start = 0
        for name, columns in causes.items():
            self._columns[name] = np.arange(start, start + columns.shape[1])
            start += columns.shape[1]
        self._names = list(causes)
        x = np.concatenate(list(causes.values()), axis=1)
        n = len(targets)
        fold = np.random.default_rng(seed).permutation(np.arange(n) % min(FOLDS, n))
        self._folds = []
        for inside in (fold == number for number in range(fold.max() + 1)):
            mean = x[~inside].mean(axis=0)
            seen = x[~inside] - mean
            moment = seen.T @ self._targets[~inside]
            self._folds.append((inside, x[inside] - mean, seen.T @ seen, moment))

    def contributions(self, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
        """{name: [n, k]}, of a regression on these causes alone (on all of them by default)."""
        names = self._names if names is None else list(names)
        if not names:
            return {}
        chosen = np.concatenate([self._columns[name] for name in names])
        ends = np.cumsum([len(self._columns[name]) for name in names])
        parts = {name: np.empty_like(self._targets) for name in names}
        for inside, held_out, gram, moment in self._folds:
            # Columns of 0 get weight 0.
            weights = np.linalg.lstsq(gram[np.ix_(chosen, chosen)], moment[chosen])[0]
            for name, own in zip(names, np.split(weights, ends[:-1]), strict=True):
                parts[name][inside] = held_out[:, self._columns[name]] @ own
        return parts

    def predicted(self, names: Iterable[str] | None = None) -> np.ndarray:
        """The sum of these causes' `contributions`, [n, k]."""
        parts = self.contributions(names).values()
        return sum(parts, np.zeros_like(self._targets))

    def share(self, predicted: np.ndarray) -> Shares:
        """How much of each target something predicted [n, k] for held-out ears explains.

        The standard error is that of a ratio of two means over the ears.
        """
        y = self._targets
        total = np.sum(y**2, axis=0)
        inverse = np.divide(1.0, total, out=np.zeros_like(total), where=total > 0)
        value = np.sum(predicted * y, axis=0) * inverse
        deviation = predicted * y - value * y**2
        return Shares(value, np.linalg.norm(deviation, axis=0) * inverse)

    def fair_shares(self) -> tuple[dict[str, np.ndarray], Shares]:
        """Each cause's part [k] in what all explain together, and that, for correlated causes.

        A cause's part is what it adds to the share explained, averaged over all orders in which the
        causes can be added (Lindeman, Merenda & Gold, "Introduction to Bivariate and Multivariate
        Analysis", 1980, section 4.3; in game theory, Shapley's value). The parts add up.
        """
        n = len(self._names)
        explained: dict[frozenset[str], np.ndarray] = {}
        for size in range(n + 1):
            for names in map(frozenset, combinations(self._names, size)):
                explained[names] = self.share(self.predicted(names)).value
        parts = {name: np.zeros(self._targets.shape[1]) for name in self._names}
        for names, without in explained.items():
            for name in parts.keys() - names:
                orders = n * comb(n - 1, len(names))
                parts[name] += (explained[names | {name}] - without) / orders
        return parts, self.share(self.predicted())
