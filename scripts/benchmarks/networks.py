"""SAM's encoder against Meta's code, the ImageNet networks against timm: forward, and gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxear.backbones.registry import create_backbone
from jaxear.backbones.sam import PRESETS, SamConfig, SamEncoder
from jaxear.backbones.weights import fill, named_leaves
from porting.checkpoints import write_weights
from scripts.benchmarks.timing import (
    OURS,
    Plan,
    Row,
    alternate,
    cost_of,
    largest_difference,
    random_images,
)
from scripts.benchmarks.torch_process import OUTPUT, torch_process

TIMM_NAMES = ("resnet50", "convnextv2_tiny", "efficientnet_b3", "mobilenetv3_large_100")
SMOKE_SAM = SamConfig(32, 2, 2, (1,), 64)

Leaves = dict[str, np.ndarray]


def in_jax(
    module: Any, images: np.ndarray, *, backward: bool
) -> tuple[Callable[[], Any], dict[str, float]]:
    """A compiled call of a module, or of its parameters' gradients of the output's mean square; its
    cost."""
    graph, parameters, statistics = nnx.split(module, nnx.Param, ...)

    def forward(parameters: Any, statistics: Any, x: jax.Array) -> jax.Array:
        return nnx.merge(graph, parameters, statistics)(x)

    def loss(*inputs: Any) -> jax.Array:
        return jnp.mean(jnp.square(forward(*inputs).astype(jnp.float32)))

    inputs = parameters, statistics, jax.device_put(images)
    compiled = jax.jit(jax.grad(loss) if backward else forward).lower(*inputs).compile()
    return lambda: jax.block_until_ready(compiled(*inputs)), cost_of(compiled)


def random_leaves(module: nnx.Module) -> Leaves:
    """Numbers for a module whose shapes alone are known; scales and variances are near 1."""
    rng = np.random.default_rng(0)
    return {
        name: np.asarray(
            rng.normal(name.endswith(("scale", "var")), 0.02, leaf.shape), dtype=leaf.dtype
        )
        for name, leaf in named_leaves(module).items()
    }


def sam_config(plan: Plan) -> SamConfig:
    """ViT-B, or the tiny one of a smoke test."""
    return SMOKE_SAM if plan.smoke else PRESETS["sam_vit_b"]


def sam_shapes(plan: Plan, size: int, dtype: Any = jnp.float32) -> SamEncoder:
    """SAM's encoder without its arrays."""
    config = sam_config(plan)
    return nnx.eval_shape(lambda: SamEncoder(config, (size, size), dtype=dtype, rngs=nnx.Rngs(0)))


def sam_in_jax(plan: Plan, size: int, leaves: Leaves, dtype: Any = jnp.float32) -> SamEncoder:
    """SAM's encoder with these numbers, computing in a type."""
    encoder = sam_shapes(plan, size, dtype)
    fill(encoder, leaves, source="random numbers")
    return encoder


def write_sam(plan: Plan, folder: str, size: int) -> str:
    """SAM's encoder as ported from Meta's checkpoint, but for the numbers; the file's path."""
    path = Path(folder, "sam_vit_b.safetensors")
    facts = {"backbone": "sam_vit_b", "architecture": dataclasses.asdict(sam_config(plan))}
    write_weights(path, random_leaves(sam_shapes(plan, size)), facts)
    return str(path)


def sam_rows(plan: Plan) -> Iterator[Row]:
    """ViT-B at 128x128 and 1024x1024, float32; on a GPU in bfloat16, too."""
    for side, cases in (
        (128, ((1, False), (8, False), (32, False), (8, True), (32, True))),
        (1024, ((1, False),)),
    ):
        size = plan.size(side, side // 4)
        leaves = random_leaves(sam_shapes(plan, size))
        for batch, backward in cases:
            name = f"SAM ViT-B {side}, {_work(backward)}, b{batch}"
            yield sam_row(plan, leaves, random_images(batch, size), backward, name)


def sam_row(plan: Plan, leaves: Leaves, images: np.ndarray, backward: bool, name: str) -> Row:
    """One of them."""
    batch, size = images.shape[:2]
    call, cost = in_jax(sam_in_jax(plan, size, leaves), images, backward=backward)
    others, notes = torch_process(plan).make("sam", plan, size, batch, backward)
    if output := others.pop(OUTPUT, None):
        cost["largest_difference"] = largest_difference(call(), output())
    contenders = {OURS: call, **others}
    if plan.device == "gpu":
        half = sam_in_jax(plan, size, leaves, jnp.bfloat16)
        contenders["jaxear bf16"], _ = in_jax(half, images, backward=backward)
    seconds = alternate(plan, contenders, warm_up=_needs_warm_up(plan, batch))
    return Row(name, seconds, batch, {**cost, **notes})


def _needs_warm_up(plan: Plan, batch: int) -> bool:
    """One image is warm from comparing the outputs; of 32 a turn takes up to 20 s on a CPU, and the
    median passes over a slow first one."""
    return batch == 8 or plan.device == "gpu"


def _work(backward: bool) -> str:
    return "forward and backward" if backward else "forward"


def timm_rows(plan: Plan) -> Iterator[Row]:
    """The ImageNet networks at 128x128 in float32, statistics of BatchNorm fixed."""
    size = plan.size(128, 32)
    for name in TIMM_NAMES[: 1 if plan.smoke else None]:
        ours = create_backbone(name, image_size=size, weights="none", abstract=True).encoder
        fill(ours, random_leaves(ours), source="random numbers")
        for batch in (8, 32):
            images = random_images(batch, size)
            for backward in (False, True):
                call, cost = in_jax(_LastFeatures(ours), images, backward=backward)
                theirs, _ = torch_process(plan).make("imagenet", plan, name, size, batch, backward)
                what = f"{name} 128, {_work(backward)}, b{batch}"
                contenders = {OURS: call, **theirs}
                seconds = alternate(plan, contenders, warm_up=_needs_warm_up(plan, batch))
                yield Row(what, seconds, batch, cost)


class _LastFeatures(nnx.Module):
    """The map that timm's `forward_features` gives, too."""

    def __init__(self, encoder: Any):
        self.encoder = encoder

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.encoder.features(x, ("last",))[0]


def parity_rows(plan: Plan) -> Iterator[Row]:
    """Whether the numbers are right on this device: float32 with and without TF32, bfloat16."""
    size = plan.size(128, 32)
    images = random_images(2, size)
    leaves = random_leaves(sam_shapes(plan, size))
    exact = torch_process(plan).make("sam_in_float64", plan, size, 2)[0][OUTPUT]()
    for name, dtype, precision in (
        ("float32", jnp.float32, "highest"),
        ("float32 as the device does it (TF32 on a GPU)", jnp.float32, "default"),
        ("bfloat16", jnp.bfloat16, "default"),
    ):
        with jax.default_matmul_precision(precision):
            call, _ = in_jax(sam_in_jax(plan, size, leaves, dtype), images, backward=False)
        error = largest_difference(call(), exact)
        yield Row(f"SAM against torch in float64, {name}", facts={"largest_difference": error})
