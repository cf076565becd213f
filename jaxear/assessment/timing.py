"""How long encoding and decoding take: one ear, and many in batches."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxear.assessment.coders import Coder
from jaxear.assessment.measures import Estimate
from jaxear.inference import BATCH_SIZE

LONGEST = 10.0  # seconds for one figure, from the third repeat on
QUARTILES = "quartiles of the repeats"


def time_coder(
    coder: Coder, images: np.ndarray, *, repeats: int, batch_size: int = BATCH_SIZE
) -> dict[str, Estimate]:
    """Latency of one ear and throughput in batches, of encoding and decoding.

    From arrays in the host's memory to such arrays, so that the way to an accelerator and back
    counts; compilation does not.

    Args:
        coder: what is timed.
        images: uint8 [n, H, W, 3]; the first are used, again where they do not fill a batch.
        repeats: how often each is done, if that takes no longer than ten seconds; at least thrice.
        batch_size: ears in a batch.

    Returns:
        encode_ms, decode_ms, encode_per_second, decode_per_second: medians and quartiles.
    """
    estimates = {}
    for size in (1, batch_size):
        batch = np.resize(images[:size], (size, *images.shape[1:]))
        codes = np.asarray(coder.encode(batch).mean)
        for name, function, argument in (
            ("encode", lambda x: coder.encode(x).mean, batch),
            ("decode", coder.decode, codes),
        ):
            seconds = _seconds(function, argument, repeats)
            figures = 1e3 * seconds if size == 1 else size / seconds
            middle, low, high = np.percentile(figures, [50, 25, 75])
            estimates[f"{name}_ms" if size == 1 else f"{name}_per_second"] = Estimate(
                float(middle), float(low), float(high), QUARTILES, len(seconds), "repeats"
            )
    return estimates


def _seconds(function: Callable[[Any], jax.Array], argument: Any, repeats: int) -> np.ndarray:
    np.asarray(function(argument))  # compiles
    taken = []
    begun = time.perf_counter()
    while len(taken) < max(repeats, 3):
        start = time.perf_counter()
        np.asarray(function(argument))
        taken.append(time.perf_counter() - start)
        if len(taken) >= 3 and time.perf_counter() - begun > LONGEST:
            break
    return np.asarray(taken)


def machine() -> dict[str, Any]:
    """What the times were taken on."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "cpu_count": os.cpu_count(),
        "jax": jax.__version__,
    }
