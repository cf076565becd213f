"""How well codes tell whose ear an image shows: identification, verification, their uncertainty.

The figures are those of Jain, Flynn & Ross (eds.), "Handbook of Biometrics" (2008), chapter 1, in
the selection that studies of ears report: Emeršič, Štruc & Peer, "Ear recognition: More than a
survey" (2017); Emeršič et al., "The Unconstrained Ear Recognition Challenge" (2017). Codes compare
by their cosine similarity. All is numpy; memory grows with the square of the number of images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxear.errors import UserError

MAX_RANK = 20


def identity_metrics(codes: np.ndarray, subjects: np.ndarray) -> dict[str, Any]:
    """How well codes [n, d] tell subjects [n] apart.

    Identification, leave-one-out: each image whose subject has another is a probe; all other images
    are the gallery, those of single-image subjects among them. A probe's rank is the number of
    subjects with an image at least as similar to it as the most similar one of its own subject
    (which counts itself; ties count against the probe).

    Verification: each pair of images is a genuine comparison, of one subject, or an impostor one.
    A threshold accepts the pairs at least as similar; FAR is the share of impostor pairs accepted,
    VR (1 - FRR) that of genuine ones.

    Returns:
        rank1: share of probes of rank 1.
        cmc: cumulative match characteristic: shares of probes of rank 1, 2, ... up to 20, or to the
            number of subjects.
        eer: equal error rate, where FAR = FRR on the ROC curve, linear between its points.
        auc: area under the ROC curve, VR over FAR.
        vr_at_far_1_percent, vr_at_far_0_1_percent: the highest VR at which FAR is no higher, of
            the thresholds there are. With fewer than 1000 impostor pairs the latter is at FAR 0.
        roc_far, roc_vr: the corners of the ROC curve.
        probes, genuine_pairs, impostor_pairs: how many there were.

    Raises:
        UserError: fewer than two subjects, none with two images, or a code that is not finite.
    """
    return Comparisons(codes, subjects).metrics()


class Comparisons:
    """All comparisons of a set of codes, made and sorted once, for figures of any weighting.

    Arguments and errors are those of `identity_metrics`.
    """

    def __init__(self, codes: np.ndarray, subjects: np.ndarray):
        codes = np.asarray(codes, np.float64)
        if not np.isfinite(codes).all():
            raise UserError("Identity metrics need finite codes; some of these are not.")
        names, numbers = np.unique(np.asarray(subjects), return_inverse=True)
        counts = np.bincount(numbers)
        if len(names) < 2 or counts.max() < 2:
            raise UserError(
                "Identity metrics need two subjects at least and two images of one of them; there "
                f"are {len(names)} subjects, with {counts.max(initial=0)} images at most."
            )
        codes = codes / np.maximum(np.linalg.norm(codes, axis=1, keepdims=True), 1e-12)
        # As float32, similarities that differ by rounding alone are equal.
        similarity = (codes @ codes.T).astype(np.float32)
        self.n_images, self.n_subjects = len(codes), len(names)
        self.probes = np.flatnonzero(counts[numbers] > 1)
        self.ranks = _ranks(similarity, numbers)[self.probes]

        first, second = (i.astype(np.int32) for i in np.triu_indices(len(codes), 1))
        scores = similarity[first, second]
        order = np.argsort(-scores)
        scores, self.first, self.second = scores[order], first[order], second[order]
        self.genuine = numbers[self.first] == numbers[self.second]
        self.pieces = _straight_pieces(scores, self.genuine)

    def metrics(self, weights: np.ndarray | None = None) -> dict[str, Any]:
        """The figures of `identity_metrics`, where subjects count more or less often.

        The gallery stays as it is: without some of the subjects it would be an easier one.

        Args:
            weights: how often each image's subject counts, [n], the same for all of its images. Its
                probes and genuine pairs count so often, an impostor pair as often as the product of
                its two subjects' says. All once by default.

        Returns:
            As `identity_metrics`; figures of which no comparison counts are nan.
        """
        weights = np.ones(self.n_images) if weights is None else np.asarray(weights, np.float64)
        far, vr = self._roc(weights)
        cmc = self._cmc(weights[self.probes])
        return {
            "rank1": float(cmc[0]),
            "cmc": cmc,
            "eer": float(np.interp(0.0, far - (1.0 - vr), far)),
            "auc": float(np.trapezoid(vr, far)),
            "vr_at_far_1_percent": float(verification_rate(far, vr, 0.01)),
            "vr_at_far_0_1_percent": float(verification_rate(far, vr, 0.001)),
            "roc_far": far,
            "roc_vr": vr,
            "probes": len(self.probes),
            "genuine_pairs": int(np.sum(self.genuine)),
            "impostor_pairs": int(np.sum(~self.genuine)),
        }

    def _cmc(self, weights: np.ndarray) -> np.ndarray:
        ranks = np.arange(1, min(MAX_RANK, self.n_subjects) + 1)
        total = weights.sum()
        if total == 0:
            return np.full(len(ranks), np.nan)
        return (self.ranks <= ranks[:, None]) @ weights / total

    def _roc(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """FAR and VR from the threshold that accepts nothing to that which accepts all."""
        first = weights[self.first]
        genuine = np.where(self.genuine, first, 0.0)
        impostor = np.where(self.genuine, 0.0, first * weights[self.second])
        rates = []
        for pairs in (impostor, genuine):
            accepted = np.append(0.0, np.cumsum(np.add.reduceat(pairs, self.pieces)))
            if accepted[-1] == 0:
                return np.full(2, np.nan), np.full(2, np.nan)
            rates.append(accepted / accepted[-1])
        return rates[0], rates[1]


def _straight_pieces(scores: np.ndarray, genuine: np.ndarray) -> np.ndarray:
    """Where the straight pieces of the ROC curve begin, among pairs sorted by falling score [p].

    Pairs of equal score are one piece, since a threshold accepts all of them or none; so are
    neighbours that are all genuine or all impostors. Weights change the length of a piece alone.
    """
    runs = np.flatnonzero(np.append(True, np.diff(scores) != 0))
    share = np.add.reduceat(genuine, runs, dtype=np.int64) / np.diff(np.append(runs, len(scores)))
    mixed = (share > 0) & (share < 1)
    return runs[np.append(True, mixed[1:] | (share[1:] != share[:-1]))]


def _ranks(similarity: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """The rank of each image as a probe of all others; meaningless where its subject has no other.

    Args:
        similarity: of each two images, [n, n].
        numbers: whose each image is, from 0, none left out, [n].
    """
    others = similarity.copy()
    np.fill_diagonal(others, -np.inf)
    order = np.argsort(numbers, kind="stable")
    starts = np.searchsorted(numbers[order], np.arange(numbers.max() + 1))
    nearest = np.maximum.reduceat(others[:, order], starts, axis=1)  # image, subject
    own = nearest[np.arange(len(numbers)), numbers]
    return np.sum(nearest >= own[:, None], axis=1)


def verification_rate(far: np.ndarray, vr: np.ndarray, limit: Any) -> np.ndarray:
    """The highest VR of a ROC curve at which FAR is no higher than a limit, or each of several."""
    return vr[np.searchsorted(far, limit, side="right") - 1]


def bootstrap_subjects(
    fn: Callable[[np.ndarray], Any], subjects: np.ndarray, n: int = 1000, seed: int = 0
) -> tuple[Any, Any]:
    """95 % interval of a figure, for other subjects drawn from the same population.

    Subjects are drawn with replacement, each with all of its images, as these are not independent:
    the subsets bootstrap of Bolle, Ratha & Pankanti, "Error analysis of pattern recognition
    systems" (2004); the interval runs from the 2.5th to the 97.5th percentile.

    No image is ever copied: a draw is told to `fn` as how often each image's subject was drawn. So
    a subject drawn twice counts twice with the comparisons it has, and meets itself in no new ones:
    neither an image with itself as a genuine pair, nor the same ear twice as an impostor pair.

        comparisons = Comparisons(codes, subjects)
        low, high = bootstrap_subjects(lambda w: comparisons.metrics(w)["eer"], subjects)
        low, high = bootstrap_subjects(lambda w: np.average(psnr, weights=w), subjects)

    Args:
        fn: weights [images], whole numbers from 0, the same for all images of a subject -> the
            figure, or an array of several.
        subjects: whose each image is, [images].
        n: draws.
        seed: decides the draws.

    Returns:
        The ends of the interval, of the shape of what `fn` returns. Draws for which a figure is nan
        (no genuine pair in them, say) are left out of its interval.
    """
    names, numbers = np.unique(np.asarray(subjects), return_inverse=True)
    draws = np.random.default_rng(seed).multinomial(
        len(names), np.full(len(names), 1 / len(names)), size=n
    )
    values = np.asarray([fn(draw[numbers]) for draw in draws])
    low, high = np.nanpercentile(values, [2.5, 97.5], axis=0)
    return low, high
