"""What the document behind the study predicts ("SAM vs ImageNet Backbones"), as hypotheses.

Each claim is data: which figure of which rows, and what it would have to be. Verdicts:

- supported, refuted: the figure lies within, or outside, what is claimed, and a test says that this
  is no accident of the subjects and seeds, after correction for the number of claims tested (Holm).
  What is no sample's figure (parameters, memory, time) has no test: every seed must agree.
- not testable here: a row that it needs was not run, or the data are of another kind, or they do
  not decide; the reason says which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxear.comparison.measurement import MEASURES
from jaxear.comparison.plan import FINE_TUNED, FROZEN, PRETRAINED, SCRATCH, TITLES, Row
from jaxear.comparison.statistics import (
    ALPHA,
    Estimated,
    Replicates,
    holm,
    of_difference,
    of_row,
    p_above,
    p_below,
    seed_variance,
)

SUPPORTED, REFUTED, NOT_TESTABLE = "supported", "refuted", "not testable here"
DOCUMENT_EPOCHS = 60  # that it would train for


class Need(NamedTuple):
    """A row that a claim is about; `weights` None: those there are, as the claim is of the
    architecture and its cost alone."""

    backbone: str
    weights: str | None = PRETRAINED
    mode: str = FINE_TUNED


@dataclass(frozen=True)
class Claim:
    """A prediction of the document.

    Attributes:
        key: its name.
        section: of the document.
        text: what is claimed.
        measure: of `MEASURES`.
        left, right: the figure is that of the first row, or its difference from the second's, or
            its ratio to it.
        kind: of the figure.
        low, high: what it would have to lie between; None is no bound.
        photographs, epochs: what else its test needs: photographs, and so many epochs of training;
            for claims of how good a system is, not of how two differ.
        synthetic: it needs synthetic ears.
    """

    key: str
    section: str
    text: str
    measure: str
    left: Need
    right: Need | None = None
    kind: Literal["value", "difference", "ratio"] = "difference"
    low: float | None = None
    high: float | None = None
    photographs: bool = False
    epochs: int = 0
    synthetic: bool = False


SAM, RESNET = Need("sam_vit_b"), Need("resnet50")
EFFICIENTNET, CONVNEXT = Need("efficientnet_b3"), Need("convnextv2_tiny")
MOBILENET = Need("mobilenetv3_large_100")


def _any(need: Need) -> Need:
    return need._replace(weights=None)


def _level(key: str, need: Need, measure: str, low: float, high: float) -> Claim:
    shown = MEASURES[measure]
    digits = 0 if shown.times == 100 or measure == "psnr" else 2
    bounds = f"{low * shown.times:.{digits}f} to {high * shown.times:.{digits}f} {shown.unit}"
    return Claim(
        key, "6", f"{TITLES[need.backbone]} reaches {shown.title} of {bounds.strip()}", measure,
        need, None, "value", low, high, photographs=True, epochs=DOCUMENT_EPOCHS,
    )  # fmt: skip


CLAIMS: tuple[Claim, ...] = (
    Claim(
        "sam_psnr_gain", "6", "SAM reconstructs at least 5 dB better than ResNet-50",
        "psnr", SAM, RESNET, low=5.0,
    ),
    Claim(
        "sam_ssim_gain", "6", "SAM's SSIM is at least 0.15 above ResNet-50's",
        "ssim", SAM, RESNET, low=0.15,
    ),
    Claim(
        "sam_edges", "1, 4", "SAM, trained on boundaries, keeps edges better than ResNet-50",
        "edge", SAM, RESNET, low=0.0,
    ),
    Claim(
        "sam_frozen", "4", "What SAM has learned, left frozen, reconstructs better than what "
        "ResNet-50 has", "psnr", SAM._replace(mode=FROZEN), RESNET._replace(mode=FROZEN), low=0.0,
    ),
    Claim(
        "sam_pc1_ratio", "6", "SAM's first component explains twice as much as ResNet-50's",
        "pc1", SAM, RESNET, "ratio", low=2.0,
    ),
    Claim(
        "sam_first5", "6", "SAM's first five components explain at least 25 points more than "
        "ResNet-50's", "first5", SAM, RESNET, low=0.25,
    ),
    Claim(
        "sam_anatomy_pc1", "5", "SAM's first component is mostly anatomy",
        "anatomy_pc1", SAM, None, "value", low=0.5, synthetic=True,
    ),
    Claim(
        "resnet_no_anatomy", "5", "ResNet-50's first component holds no anatomy (10 % at most)",
        "anatomy_pc1", RESNET, None, "value", high=0.1, synthetic=True,
    ),
    Claim(
        "sam_anatomy", "5", "SAM's first components hold more anatomy than ResNet-50's",
        "anatomy", SAM, RESNET, low=0.0, synthetic=True,
    ),
    _level("sam_psnr", SAM, "psnr", 27.0, 32.0),
    _level("sam_ssim", SAM, "ssim", 0.85, 0.92),
    _level("sam_pc1", SAM, "pc1", 0.15, 0.25),
    _level("sam_first5_level", SAM, "first5", 0.70, 0.80),
    _level("resnet_psnr", RESNET, "psnr", 22.0, 24.0),
    _level("resnet_ssim", RESNET, "ssim", 0.65, 0.75),
    _level("resnet_pc1", RESNET, "pc1", 0.08, 0.12),
    _level("resnet_first5_level", RESNET, "first5", 0.35, 0.45),
    Claim(
        "efficientnet_resnet", "7", "EfficientNet-B3 is better than ResNet-50",
        "psnr", EFFICIENTNET, RESNET, low=0.0,
    ),
    Claim(
        "efficientnet_sam", "7", "EfficientNet-B3 is worse than SAM",
        "psnr", EFFICIENTNET, SAM, high=0.0,
    ),
    Claim(
        "mobilenet_resnet", "7", "MobileNetV3 reconstructs worse than ResNet-50",
        "psnr", MOBILENET, RESNET, high=0.0,
    ),
    Claim(
        "convnext_resnet", "7", "ConvNeXt V2, pretrained by masked reconstruction, is better than "
        "ResNet-50", "psnr", CONVNEXT, RESNET, low=0.0,
    ),
    Claim(
        "convnext_sam", "7", "ConvNeXt V2 is the second best, below SAM",
        "psnr", CONVNEXT, SAM, high=0.0,
    ),
    *(
        Claim(
            f"pretraining_{backbone}", "1, 4",
            f"What {TITLES[backbone]} learned before makes its reconstructions better",
            "psnr", Need(backbone), Need(backbone, SCRATCH), low=0.0,
        )
        for backbone in ("sam_vit_b", "resnet50", "efficientnet_lite0", "mobilenetv3_large_100",
                         "convnextv2_tiny")
    ),
    Claim(
        "grid", "3", "SAM keeps twice as fine a grid as ResNet-50",
        "grid", _any(SAM), _any(RESNET), "ratio", 1.95, 2.05,
    ),
    Claim(
        "architecture_edges", "3", "SAM's architecture alone, from scratch, keeps edges better "
        "than ResNet-50's", "edge", Need("sam_vit_b", SCRATCH), Need("resnet50", SCRATCH), low=0.0,
    ),
    Claim(
        "parameters", "8", "SAM has 86/25.6 = 3.4 times ResNet-50's parameters (3 to 4)",
        "parameters", _any(SAM), _any(RESNET), "ratio", 3.0, 4.0,
    ),
    Claim(
        "memory", "8", "Training SAM takes twice ResNet-50's memory (1.5 to 2.5 times)",
        "peak_bytes", _any(SAM), _any(RESNET), "ratio", 1.5, 2.5,
    ),
    Claim(
        "epoch", "8", "An epoch takes 25 % longer with SAM than with ResNet-50 (10 to 50 %)",
        "seconds_per_epoch", _any(SAM), _any(RESNET), "ratio", 1.1, 1.5,
    ),
    Claim(
        "latency", "8", "Encoding takes 1.6 times as long with SAM as with ResNet-50 (1.2 to 2)",
        "encode_ms", _any(SAM), _any(RESNET), "ratio", 1.2, 2.0,
    ),
    Claim(
        "mobilenet_latency", "7", "MobileNetV3 encodes faster than ResNet-50",
        "encode_ms", _any(MOBILENET), _any(RESNET), "ratio", high=1.0,
    ),
    Claim(
        "mobilenet_memory", "7", "MobileNetV3 trains in less memory than ResNet-50",
        "peak_bytes", _any(MOBILENET), _any(RESNET), "ratio", high=1.0,
    ),
    Claim(
        "sam_large_memory", "10", "SAM ViT-L takes twice SAM ViT-B's memory (1.5 to 2.5 times)",
        "peak_bytes", Need("sam_vit_l", None), _any(SAM), "ratio", 1.5, 2.5,
    ),
    Claim(
        "hybrid_epoch", "9", "SAM and ResNet-50 together take twice the time of SAM alone "
        "(1.5 to 2.5 times)", "seconds_per_epoch", Need("hybrid", None), _any(SAM), "ratio",
        1.5, 2.5,
    ),
)  # fmt: skip


class Runs(NamedTuple):
    """What claims are judged by.

    Attributes:
        replicates: row -> measure -> its seeds; rows without a finished run are missing.
        reasons: why a row has none.
        photographs: whether the ears are photographs; synthetic ones else.
        epochs: the fewest that any row was trained for.
    """

    replicates: Mapping[Row, Mapping[str, Replicates]]
    reasons: Mapping[Row, str]
    photographs: bool
    epochs: int


def judge_all(runs: Runs, claims: Sequence[Claim] = CLAIMS) -> list[dict[str, Any]]:
    """Every claim with its verdict.

    Returns:
        Per claim, for JSON: key, section, text, measure, kind, low, high; rows, the labels of those
        compared; verdict and reason; where the rows were run: effect, effect_low, effect_high (95 %
        interval; for what is no sample's figure the range over seeds) and, where it was tested, p
        and p_holm, two-sided.
    """
    judged = [_measured(claim, runs) for claim in claims]
    tested = {j["key"]: j["p"] for j in judged if j.get("p") is not None}
    corrected = holm(tested)
    for one in judged:
        if one["key"] not in corrected:
            continue
        one["p_holm"] = corrected[one["key"]]
        if one["p_holm"] >= ALPHA:
            one["verdict"] = NOT_TESTABLE
            one["reason"] = (
                "the data do not decide: more subjects, seeds or a larger budget are needed"
            )
    return judged


def _measured(claim: Claim, runs: Runs) -> dict[str, Any]:
    """A claim with its figure, and the verdict as if it were the only one."""
    result: dict[str, Any] = {
        "key": claim.key, "section": claim.section, "text": claim.text, "measure": claim.measure,
        "kind": claim.kind, "low": claim.low, "high": claim.high, "rows": [],
        "verdict": NOT_TESTABLE, "reason": "",
    }  # fmt: skip
    rows, reason = _rows(claim, runs)
    result["rows"] = [row.label for row in rows]
    if reason := reason or _unfit(claim, runs):
        return result | {"reason": reason}
    parts = [runs.replicates[row][claim.measure] for row in rows]
    if claim.kind == "ratio":
        parts = [part.log() for part in parts]
    if not MEASURES[claim.measure].sampled:
        return result | _agreed(claim, parts)
    between = seed_variance(
        [
            (of[claim.measure].log() if claim.kind == "ratio" else of[claim.measure]).values
            for of in runs.replicates.values()
            if claim.measure in of
        ]
    )
    figure = (
        of_row(parts[0], between, MEASURES[claim.measure].most)
        if len(parts) == 1
        else of_difference(parts[0], parts[1], between)
    )
    shown = _shown(claim, figure.value, figure.low, figure.high)
    if not between.freedom:
        return result | shown | {"reason": "with one seed, how much seeds differ is not known"}
    p, inside = _test(claim, figure)
    return result | {
        **shown,
        "p": p,
        "verdict": SUPPORTED if inside else REFUTED,
    }


def _rows(claim: Claim, runs: Runs) -> tuple[list[Row], str]:
    """The rows that a claim compares; or why that cannot be."""
    needs = [need for need in (claim.left, claim.right) if need is not None]
    open_start = any(need.weights is None for need in needs)
    rows: list[Row] = []
    reasons: list[str] = []
    for weights in (
        (PRETRAINED, SCRATCH) if open_start else (None,)
    ):  # a cost is compared between rows that start alike
        rows = [Row(n.backbone, n.weights or str(weights), n.mode) for n in needs]
        lacking = [row for row in rows if claim.measure not in runs.replicates.get(row, {})]
        if not lacking:
            return rows, ""
        reasons = [_why(claim, row, runs) for row in lacking]
    return rows, "; ".join(dict.fromkeys(reasons))


def _why(claim: Claim, row: Row, runs: Runs) -> str:
    if row in runs.replicates:
        if claim.synthetic and runs.photographs:
            return "anatomy can be told apart on synthetic ears alone"
        return f"{MEASURES[claim.measure].title} was not measured of {row.label}"
    reason = runs.reasons.get(row, "not part of this study")
    return f"{row.label}: {reason.split(', run ')[0]}"


def _unfit(claim: Claim, runs: Runs) -> str:
    """Why the data cannot test a claim whose rows are there."""
    if claim.photographs and not runs.photographs:
        return "it speaks of photographs; these are synthetic ears"
    if runs.epochs < claim.epochs:
        return f"it speaks of {claim.epochs} epochs of training; here there were {runs.epochs}"
    return ""


def _shown(claim: Claim, value: float, low: float, high: float) -> dict[str, float]:
    figures = np.exp([value, low, high]) if claim.kind == "ratio" else [value, low, high]
    return dict(zip(("effect", "effect_low", "effect_high"), map(float, figures), strict=True))


def _bounds(claim: Claim) -> tuple[float, float]:
    low = -np.inf if claim.low is None else claim.low
    high = np.inf if claim.high is None else claim.high
    if claim.kind == "ratio":
        return float(np.log(low) if low > 0 else -np.inf), float(np.log(high))
    return float(low), float(high)


def _test(claim: Claim, figure: Estimated) -> tuple[float, bool]:
    """Two-sided p of the side of the bounds that the figure lies on; whether that is inside."""
    low, high = _bounds(claim)
    if figure.value < low:
        p = p_below(figure.draws, low)
    elif figure.value > high:
        p = p_above(figure.draws, high)
    else:
        p = max(
            p_above(figure.draws, low) if np.isfinite(low) else 0.0,
            p_below(figure.draws, high) if np.isfinite(high) else 0.0,
        )
    return min(1.0, 2 * p), low <= figure.value <= high


def _agreed(claim: Claim, parts: Sequence[Replicates]) -> dict[str, Any]:
    """The verdict on what is no sample's figure: that of every seed, if they agree."""
    n = min(len(part.values) for part in parts)
    values = parts[0].values[:n] - (parts[1].values[:n] if len(parts) > 1 else 0.0)
    low, high = _bounds(claim)
    inside = (low <= values) & (values <= high)
    shown = _shown(claim, float(values.mean()), float(values.min()), float(values.max()))
    if inside.all() or not inside.any():
        return shown | {"verdict": SUPPORTED if inside.all() else REFUTED}
    return shown | {"reason": "the seeds do not agree"}
