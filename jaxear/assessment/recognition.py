"""How well codes tell whose ear it is, of several coders on the same ears."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jaxear.assessment.measures import OVER_SUBJECTS, Estimate
from jaxear.errors import UserError
from jaxear.identity import Comparisons, bootstrap_subjects, verification_rate

# Relative to the largest; below it a direction of the codes is a collapsed one, or rounding noise.
SMALLEST_VARIANCE = 1e-4
MOST_IMAGES = 3000  # their four million pairs are compared a thousand times
FAR_GRID = np.geomspace(1e-4, 1, 201)
WHITENED = ("rank1", "eer", "auc", "vr_at_far_1_percent", "vr_at_far_0_1_percent")
CENTRED = ("rank1", "eer")
NAMES = (*WHITENED, *(f"{name}_centred" for name in CENTRED))


class Recognition(NamedTuple):
    """Figures and curves by coder.

    Attributes:
        estimates: coder -> measure -> figure; "difference" is the first coder's minus the second's.
        curves: coder -> "cmc": share [r] of probes up to rank 1, 2, ...; "roc": share of genuine
            pairs accepted at the false acceptance rates `far`; each with its "low" and "high".
        reason: why there are none; empty where there are.
        note: what else is to be known.
    """

    estimates: dict[str, dict[str, Estimate]]
    curves: dict[str, dict[str, dict[str, list[float]]]]
    reason: str = ""
    note: str = ""


def standardize(codes: np.ndarray, training: np.ndarray, *, whiten: bool) -> np.ndarray:
    """Codes ready for the cosine, by the statistics of the training ears' codes alone.

    Centred: an angle is measured from the mean ear. Whitened: each principal direction of the
    training codes is scaled to unit variance, so that the comparison does not depend on the units
    and axes that a code happens to have, and coders compare alike. The cosine of whitened codes is
    the "Mahalanobis cosine" of Beveridge et al., "The CSU Face Identification Evaluation System"
    (2005), the best of the distances that they try on eigenfaces. Directions with less than 1e-4 of
    the largest variance are left out.

    Args:
        codes: [n, d].
        training: [m, d], two at least.
        whiten: False centres only.

    Returns:
        float64 [n, k], k <= d; or [n, d] where they are centred only.
    """
    training = training.astype(np.float64)
    mean = training.mean(axis=0)
    centred = codes.astype(np.float64) - mean
    if not whiten:
        return centred
    _, singular, axes = np.linalg.svd(training - mean, full_matrices=False)
    variances = np.square(singular) / (len(training) - 1)
    kept = variances > SMALLEST_VARIANCE * variances[0]
    return centred @ axes[kept].T / np.sqrt(variances[kept])


def recognize(
    codes: Mapping[str, np.ndarray], training: Mapping[str, np.ndarray], subjects: np.ndarray
) -> Recognition:
    """Identification and verification by the codes of two coders, and the difference.

    Intervals are over subjects, the same draws for both coders, so that those of the difference are
    of paired figures. Of more than 3,000 images some subjects are drawn at random.

    Args:
        codes: coder -> codes of the ears [n, d].
        training: coder -> codes of training ears [m, d].
        subjects: whose each ear is, [n].
    """
    subjects = np.asarray(subjects)
    rows = drawn_rows(subjects)
    names, note = list(codes), ""
    if len(rows) < len(subjects):
        drawn, of = len(np.unique(subjects[rows])), len(np.unique(subjects))
        note = f"identity: {len(rows)} ears of {drawn} of the {of} subjects, drawn at random"
        subjects = subjects[rows]
    try:
        whitened, centred = (
            {
                name: Comparisons(
                    standardize(codes[name][rows], training[name], whiten=whiten), subjects
                )
                for name in names
            }
            for whiten in (True, False)
        )
    except UserError as error:
        return Recognition({}, {}, str(error), note)

    plain = whitened[names[0]].metrics()
    ranks, scalars = len(plain["cmc"]), len(NAMES)

    def figures(weights: np.ndarray | None = None) -> np.ndarray:
        rows = [_figures(whitened[name], centred[name], weights) for name in names]
        return np.stack([*rows, rows[0] - rows[1]])

    values = figures()
    low, high = bootstrap_subjects(figures, subjects)
    probes, pairs = plain["probes"], plain["genuine_pairs"]

    def estimate(name: str, value: float, low: float, high: float) -> Estimate:
        n, of = (probes, "probes") if name.startswith("rank1") else (pairs, "genuine pairs")
        return Estimate(float(value), float(low), float(high), OVER_SUBJECTS, n, of)

    estimates = {
        coder: {
            name: estimate(name, values[i, j], low[i, j], high[i, j])
            for j, name in enumerate(NAMES)
        }
        for i, coder in enumerate((*names, "difference"))
    }
    if plain["impostor_pairs"] < 1000:
        refused = Estimate(
            None, n=pairs, of="genuine pairs",
            note=f"{plain['impostor_pairs']} impostor pairs: 0.1 % of them is less than one",
        )  # fmt: skip
        for figure in estimates.values():
            figure["vr_at_far_0_1_percent"] = refused
    resolved = FAR_GRID * plain["impostor_pairs"] >= 1
    curves = {}
    for i, coder in enumerate(names):
        parts = {"value": values[i], "low": low[i], "high": high[i]}
        curves[coder] = {
            "cmc": {k: v[scalars : scalars + ranks].tolist() for k, v in parts.items()},
            "roc": {
                "far": FAR_GRID[resolved].tolist(),
                **{k: v[scalars + ranks :][resolved].tolist() for k, v in parts.items()},
            },
        }
    return Recognition(estimates, curves, "", note)


def _figures(whitened: Comparisons, centred: Comparisons, weights: np.ndarray | None) -> np.ndarray:
    """The figures `NAMES`, the CMC, and the ROC curve at `FAR_GRID`, in one vector."""
    metrics, others = whitened.metrics(weights), centred.metrics(weights)
    far, vr = metrics["roc_far"], metrics["roc_vr"]
    scalars = [metrics[name] for name in WHITENED] + [others[name] for name in CENTRED]
    return np.concatenate([scalars, metrics["cmc"], verification_rate(far, vr, FAR_GRID)])


def drawn_rows(subjects: np.ndarray, most: int = MOST_IMAGES, seed: int = 0) -> np.ndarray:
    """Rows of all ears; or of whole subjects, drawn at random until there are `most`."""
    names, numbers = np.unique(subjects, return_inverse=True)
    if len(subjects) <= most:
        return np.arange(len(subjects))
    order = np.random.default_rng(seed).permutation(len(names))
    counts = np.bincount(numbers)[order]
    kept = order[np.cumsum(counts) - counts < most]
    return np.flatnonzero(np.isin(numbers, kept))
