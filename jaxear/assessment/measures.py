"""The measures: what each is called, how it is defined, and those that each ear has one of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxear.assessment.coders import Coder
from jaxear.assessment.stability import (
    BRIGHTER_BY,
    JPEG_QUALITY,
    NOISE_SD,
    PERTURBATIONS,
    SHIFT_PIXELS,
    distance_between_subjects,
)
from jaxear.data.pipeline import padded_batches
from jaxear.identity import bootstrap_subjects
from jaxear.inference import BATCH_SIZE, as_float
from jaxear.metrics import edge_preservation, kl_per_dimension, ms_ssim, psnr, ssim
from jaxear.perceptual import Judge, lpips_style_distance


class Measure(NamedTuple):
    """How a measure is shown and explained; `digits` are those after the point."""

    title: str
    group: Literal["reconstruction", "code", "stability", "identity", "time"]
    definition: str
    better: Literal["higher", "lower", ""] = ""
    digits: int = 3
    unit: str = ""


class Estimate(NamedTuple):
    """A measured value; `low` and `high` bound it, None where there is no telling.

    Attributes:
        value: None where it could not be measured; then `note` says why.
        interval: what low and high are.
        n: how many it is made of, `of` what.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    interval: str = ""
    n: int = 0
    of: str = "ears"
    note: str = ""


OVER_SUBJECTS = "95 %, bootstrap over subjects"

_CHANGES = {
    "shift": f"moved to the right by {SHIFT_PIXELS} pixel (its border repeated)",
    "jpeg": f"through JPEG of quality {JPEG_QUALITY}",
    "noise": f"with Gaussian noise of standard deviation {NOISE_SD}/255",
    "brightness": f"brighter by {BRIGHTER_BY}/255",
}

MEASURES: Mapping[str, Measure] = {
    "psnr": Measure(
        "PSNR (dB)", "reconstruction",
        "-10 log10 of the mean squared error of an ear, pixels in [0, 1]",
        "higher", 2, "dB",
    ),
    "ssim": Measure(
        "SSIM", "reconstruction",
        "structural similarity, 11x11 Gaussian window, sigma 1.5 (Wang et al. 2004)",
        "higher",
    ),
    "ms_ssim": Measure(
        "MS-SSIM", "reconstruction",
        "multi-scale SSIM (Wang, Simoncelli & Bovik 2003) at as many of its five scales as the "
        "images have room for (four at 128 pixels), exponents scaled to the same sum",
        "higher",
    ),
    "edge": Measure(
        "edges kept", "reconstruction",
        "edge preservation: correlation of the Sobel gradients g, r of the two luminances, "
        "sum(g.r) / sqrt(sum |g|^2 sum |r|^2), the index of Sattar et al. (1997) with Sobel's "
        "derivatives in place of the Laplacian",
        "higher",
    ),
    "lpips_style": Measure(
        "LPIPS-style", "reconstruction",
        "distance of unit-length VGG-16 features in five layers (Zhang et al. 2018, equation 1), "
        "but all channels weighted alike and the mean of layers: no LPIPS figures",
        "lower",
    ),
    "kl": Measure("KL", "code", "KL(q(z|x) || N(0, I)) of an ear, in nats", "", 1, "nats"),
    "active_units": Measure(
        "active units", "code",
        "latent dimensions whose mean has a variance above 0.01 over the ears (Burda et al. 2016)",
        "", 0,
    ),
    **{
        f"code_{name}": Measure(
            f"code: {name}", "stability",
            f"distance of the codes of an ear and of the same {change}, divided by the root mean "
            "square distance of the codes of two subjects' ears (1: as far as to another's ear)",
            "lower",
        )
        for name, change in _CHANGES.items()
    },
    **{
        f"image_{name}": Measure(
            f"image: {name}", "stability",
            f"distance of the reconstructions of an ear and of the same {change}, divided by the "
            "root mean square distance of the photographs of two subjects' ears",
            "lower",
        )
        for name, change in _CHANGES.items()
    },
    "rank1": Measure(
        "rank-1", "identity",
        "share of ears whose most similar other ear is of the same subject, of those whose subject "
        "has another; similarity is the cosine of codes, centred and whitened by the mean and "
        "covariance of the training ears' codes (Mahalanobis cosine, Beveridge et al. 2005), so "
        "that it does not depend on a code's units and axes",
        "higher",
    ),
    "eer": Measure(
        "EER", "identity",
        "equal error rate: where as many pairs of one subject are refused as pairs of two are "
        "accepted",
        "lower",
    ),
    "auc": Measure("AUC", "identity", "area under the ROC curve", "higher"),
    "vr_at_far_1_percent": Measure(
        "VR at FAR 1 %", "identity",
        "share of the pairs of one subject accepted where at most 1 % of those of two are",
        "higher",
    ),
    "vr_at_far_0_1_percent": Measure(
        "VR at FAR 0.1 %", "identity", "the same where at most 0.1 % are", "higher"
    ),
    "rank1_centred": Measure(
        "rank-1 unwhitened", "identity", "rank-1 of codes that are centred only", "higher"
    ),
    "eer_centred": Measure(
        "EER unwhitened", "identity", "EER of codes that are centred only", "lower"
    ),
    "encode_ms": Measure(
        "encode one (ms)", "time",
        "from one uint8 image in memory to its code in memory: median, quartiles",
        "lower", 2, "ms",
    ),
    "decode_ms": Measure(
        "decode one (ms)", "time", "from one code to its image, likewise", "lower", 2, "ms"
    ),
    "encode_per_second": Measure(
        "encoded per s", "time",
        "ears encoded per second in batches: size of a batch over its median time",
        "higher", 0, "1/s",
    ),
    "decode_per_second": Measure(
        "decoded per s", "time", "the same of decoding", "higher", 0, "1/s"
    ),
}  # fmt: skip


@jax.jit
def compare(
    reconstructions: jax.Array, images: jax.Array, judge: Judge | None = None
) -> dict[str, jax.Array]:
    """Measures of reconstruction, each [b], of images [b, H, W, 3], uint8 or floats in [0, 1]."""
    x, y = as_float(reconstructions), as_float(images)
    values = {
        "psnr": psnr(x, y),
        "ssim": ssim(x, y),
        "ms_ssim": ms_ssim(x, y),
        "edge": edge_preservation(x, y),
    }
    if judge is not None:
        values["lpips_style"] = lpips_style_distance(judge, x, y)
    return values


@jax.jit
def _distance(a: jax.Array, b: jax.Array) -> jax.Array:
    """Euclidean, of each two arrays [b, ...]: [b]."""
    return jnp.sqrt(jnp.sum(jnp.square(a - b).reshape(len(a), -1), axis=1))


def measure_ears(
    coder: Coder, images: np.ndarray, subjects: np.ndarray, *, judge: Judge | None = None
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The codes of ears, and everything that each of them has one of.

    Batch by batch, so that no more than a batch of reconstructions is held.

    Args:
        coder: what encodes and decodes them.
        images: uint8 [n, H, W, 3].
        subjects: whose each is, [n].
        judge: VGG-16, for the LPIPS-style distance; it is left out without it.

    Returns:
        Codes, float32 [n, d]; measures, each [n]. What moves the code of ears of one subject only
        cannot be told in terms of the distance between subjects, and is nan.
    """
    batches = padded_batches(np.arange(len(images)), min(BATCH_SIZE, len(images)))
    codes, parts = [], []
    for rows, n in batches:
        batch = images[rows]
        code = coder.encode(batch)
        reconstructions = coder.decode(code.mean)
        values = compare(reconstructions, batch, judge)
        if code.logvar is not None:
            values["kl"] = kl_per_dimension(code.mean, code.logvar).sum(axis=1)
        for name, perturb in PERTURBATIONS.items():
            moved = coder.encode(perturb(batch, rows)).mean
            values[f"code_{name}"] = _distance(moved, code.mean)
            values[f"image_{name}"] = _distance(coder.decode(moved), reconstructions)
        codes.append(np.asarray(code.mean)[:n])
        parts.append({name: np.asarray(value, np.float64)[:n] for name, value in values.items()})
    all_codes = np.concatenate(codes)
    collected = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    code_distance = distance_between_subjects(all_codes, subjects)
    image_distance = distance_between_subjects(images, subjects)
    for name in PERTURBATIONS:
        collected[f"code_{name}"] /= code_distance
        collected[f"image_{name}"] /= image_distance
    return all_codes, collected


def mean_estimates(values: Mapping[str, np.ndarray], subjects: np.ndarray) -> dict[str, Estimate]:
    """Means over ears of measures, each [n], with intervals over subjects.

    With one subject there are no intervals; a mean that is not a finite number is no value.
    """
    table = np.stack([np.asarray(column, np.float64) for column in values.values()], axis=1)
    means = table.mean(axis=0)
    known = np.isfinite(means)
    if len(np.unique(subjects)) < 2:
        return {
            name: Estimate(float(mean), n=len(table), note="one subject: no interval")
            if finite
            else Estimate(None, n=len(table), note="one subject: no distance between subjects")
            for name, mean, finite in zip(values, means, known, strict=True)
        }
    table[:, ~known] = 0.0  # so that the bootstrap need not know of them
    low, high = bootstrap_subjects(lambda w: w @ table / w.sum(), subjects)
    return {
        name: Estimate(float(mean), float(a), float(b), OVER_SUBJECTS, len(table))
        if finite
        else Estimate(None, n=len(table), note="not a finite number")
        for name, mean, a, b, finite in zip(values, means, low, high, known, strict=True)
    }
