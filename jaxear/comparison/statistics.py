"""How sure a figure of a row, or a difference of two rows, is: over subjects and over seeds.

A row's figure is the mean over its seeds. Two things make it uncertain:

- the subjects measured, who are a sample: they are drawn with replacement, with all of their images
  (`jaxear.identity.bootstrap_subjects`). Every run of a study is measured with the same draws, so
  that a difference of two rows is a paired one, draw by draw;
- the seeds trained with. Two or three of them cannot be resampled to any purpose; their variance is
  taken as equal in all rows and pooled over them, as in an analysis of variance, and contributes a
  draw of Student's t with as many degrees of freedom as it is estimated with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

DRAWS = 2000
LEVEL = 0.95
ALPHA = 0.05


class Replicates(NamedTuple):
    """A measure of the runs of one row: `values` of its seeds [s]; `draws` [s, b], what they are
    for drawn subjects."""

    values: np.ndarray
    draws: np.ndarray

    def log(self) -> Replicates:
        """On the scale on which a ratio is a difference."""
        return Replicates(np.log(self.values), np.log(np.maximum(self.draws, 1e-12)))


class SeedVariance(NamedTuple):
    """Variance between seeds, and with how many degrees of freedom it is known; none: unknown."""

    variance: float
    freedom: int


class Estimated(NamedTuple):
    """A figure with its 95 % interval, and the draws [b] behind it."""

    value: float
    low: float
    high: float
    draws: np.ndarray


def subject_draws(subjects: Sequence[str] | np.ndarray, draws: int = DRAWS) -> np.ndarray:
    """How often each image's subject is drawn, [draws, images].

    The same for the same subjects, whatever the order of their images.
    """
    names, numbers = np.unique(np.asarray(subjects), return_inverse=True)
    n = len(names)
    counts = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=draws)
    return counts[:, numbers]


def drawn(figure: Callable[[np.ndarray], float], weights: np.ndarray) -> np.ndarray:
    """A figure for every draw: weights [b, images] -> [b]."""
    return np.asarray([figure(draw) for draw in weights])


def seed_variance(values: Sequence[np.ndarray]) -> SeedVariance:
    """Pooled over rows: the values of the seeds of each, [s]."""
    squares = sum(float(np.square(v - np.mean(v)).sum()) for v in values if len(v))
    freedom = sum(len(v) - 1 for v in values if len(v))
    return SeedVariance(squares / freedom if freedom else 0.0, freedom)


def of_row(row: Replicates, between: SeedVariance, most: float = np.inf) -> Estimated:
    """The figure of one row, whose interval ends at `most`, which it cannot exceed."""
    figure = _estimated(row.values, row.draws, between)
    return figure._replace(high=min(figure.high, most))


def of_difference(a: Replicates, b: Replicates, between: SeedVariance) -> Estimated:
    """The figure of row a minus that of row b, of the seeds that both have, which are the first."""
    n = min(len(a.values), len(b.values))
    twice = between._replace(variance=2 * between.variance)
    return _estimated(a.values[:n] - b.values[:n], a.draws[:n] - b.draws[:n], twice)


def _estimated(values: np.ndarray, draws: np.ndarray, between: SeedVariance) -> Estimated:
    over = draws.mean(axis=0)
    if between.freedom:
        t = np.random.default_rng(1).standard_t(between.freedom, size=len(over))
        over = over + np.sqrt(between.variance / len(values)) * t
    outside = 50 * (1 - LEVEL)
    low, high = np.percentile(over, [outside, 100 - outside])
    return Estimated(float(np.mean(values)), float(low), float(high), over)


def p_above(draws: np.ndarray, bound: float) -> float:
    """One-sided: how likely draws that are not above the bound are."""
    return float((1 + np.sum(draws <= bound)) / (1 + len(draws)))


def p_below(draws: np.ndarray, bound: float) -> float:
    """One-sided: how likely draws that are not below the bound are."""
    return float((1 + np.sum(draws >= bound)) / (1 + len(draws)))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values of several tests, corrected so that no false finding at all has a chance above
    alpha (Holm, "A simple sequentially rejective multiple test procedure", 1979)."""
    ordered = sorted(p_values, key=lambda name: p_values[name])
    corrected, largest = {}, 0.0
    for i, name in enumerate(ordered):
        largest = max(largest, min(1.0, (len(ordered) - i) * p_values[name]))
        corrected[name] = largest
    return corrected
