"""Time SAM's encoder in jaxear against Meta's code in eager torch, on a CPU, forward, float32.

Both get the same weights, images and cores, and take turns, so that what else the machine does
meets both alike; the medians are compared. Before that their outputs are.

    python scripts/bench_sam.py                        ViT-B, 128x128, batch 8, 2 threads, 9 turns
    python scripts/bench_sam.py --size 1024 --batch 1 --repeats 7 --out bench.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=("vit_b", "vit_l", "vit_h"), default="vit_b")
    parser.add_argument("--size", type=int, default=128, help="side of the images (default: 128)")
    parser.add_argument("--batch", type=int, default=8, help="images at a time (default: 8)")
    parser.add_argument("--threads", type=int, default=2, help="cores for each (default: 2)")
    parser.add_argument("--repeats", type=int, default=9, help="turns (default: 9)")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    arguments = parser.parse_args()
    # XLA takes as many threads as there are cores that it may use when it starts.
    cores = sorted(os.sched_getaffinity(0))[: arguments.threads]
    os.sched_setaffinity(0, cores)
    figures = benchmark(arguments)
    print(
        f"{figures['model']} {figures['size']}x{figures['size']} batch {figures['batch']}, "
        f"{len(cores)} threads: jaxear {figures['jaxear_ms']:.0f} ms, Meta's code in eager torch "
        f"{figures['torch_ms']:.0f} ms, {figures['ratio']:.2f}x as fast "
        f"(outputs differ by {figures['max_relative_difference']:.1e} of their scale)"
    )
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=2) + "\n")


def benchmark(arguments: argparse.Namespace) -> dict:
    """The median times of both in milliseconds, and how many times as fast jaxear is."""
    import jax
    import numpy as np
    import torch
    from flax import nnx

    from jaxear.backbones.sam import PRESETS, SamEncoder
    from jaxear.backbones.weights import fill
    from porting.checkpoints import versions
    from porting.rules import flax_to_torch
    from porting.sam import ENCODER_TABLE, leaf_shapes
    from porting.sam_torch import torch_encoder

    torch.set_num_threads(arguments.threads)
    config = PRESETS[f"sam_{arguments.model}"]
    image_size = (arguments.size, arguments.size)
    rng = np.random.default_rng(0)
    leaves = {
        name: rng.normal(size=shape, scale=0.02).astype(np.float32) + name.endswith("scale")
        for name, shape in leaf_shapes(config, image_size).items()
    }
    images = rng.normal(size=(arguments.batch, *image_size, 3)).astype(np.float32)

    model = torch_encoder(
        config,
        flax_to_torch(ENCODER_TABLE, leaves),
        native_size=image_size,
        image_size=image_size,
    )
    images_torch = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())

    def in_torch() -> np.ndarray:
        with torch.inference_mode():
            return model(images_torch).permute(0, 2, 3, 1).numpy()

    encoder = nnx.eval_shape(lambda: SamEncoder(config, image_size, rngs=nnx.Rngs(0)))
    fill(encoder, leaves, source="random numbers")
    graph, weights = nnx.split(encoder)
    forward = jax.jit(lambda weights, x: nnx.merge(graph, weights)(x))
    images_jax = jax.device_put(images)

    def in_jax() -> jax.Array:
        return jax.block_until_ready(forward(weights, images_jax))

    ours, theirs = in_jax(), in_torch()  # compiled and warm from here on
    difference = float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())
    times = {"jaxear": [], "torch": []}
    for _ in range(arguments.repeats):
        times["jaxear"].append(milliseconds(in_jax))
        times["torch"].append(milliseconds(in_torch))
    jaxear_ms, torch_ms = (statistics.median(times[name]) for name in ("jaxear", "torch"))
    return {
        "model": f"sam_{arguments.model}",
        "size": arguments.size,
        "batch": arguments.batch,
        "threads": arguments.threads,
        "jaxear_ms": jaxear_ms,
        "torch_ms": torch_ms,
        "ratio": torch_ms / jaxear_ms,
        "all_ms": times,
        "max_relative_difference": difference,
        "versions": versions(),
    }


def milliseconds(function: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - start)


if __name__ == "__main__":
    main()
