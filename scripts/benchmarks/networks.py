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


def sam_in_torch(plan: Plan, size: int, leaves: Leaves | None = None) -> Any:
    """Meta's encoder with the same numbers, on the CPU."""
    from porting.rules import flax_to_torch
    from porting.sam import ENCODER_TABLE
    from porting.sam_torch import torch_encoder

    if leaves is None:
        leaves = random_leaves(sam_shapes(plan, size))
    state = flax_to_torch(ENCODER_TABLE, leaves)
    sizes = {"native_size": (size, size), "image_size": (size, size)}
    return torch_encoder(sam_config(plan), state, **sizes)


def sam_rows(plan: Plan) -> Iterator[Row]:
    """ViT-B at 128x128 and 1024x1024, float32; on a GPU in bfloat16, too."""
    for side, cases in (
        (128, ((1, False), (8, False), (32, False), (8, True), (32, True))),
        (1024, ((1, False),)),
    ):
        size = plan.size(side, side // 4)
        leaves = random_leaves(sam_shapes(plan, size))
        model = sam_in_torch(plan, size, leaves)
        for batch, backward in cases:
            name = f"SAM ViT-B {side}, {_work(backward)}, b{batch}"
            yield sam_row(plan, leaves, model, random_images(batch, size), backward, name)


def sam_row(
    plan: Plan, leaves: Leaves, model: Any, images: np.ndarray, backward: bool, name: str
) -> Row:
    """One of them."""
    from scripts.benchmarks import in_torch

    batch, size = images.shape[:2]
    call, cost = in_jax(sam_in_jax(plan, size, leaves), images, backward=backward)
    # On a CPU torch.compile takes a minute and bfloat16 as long as float32: in one batch size.
    others, notes = in_torch.variants(
        in_torch.gradient if backward else in_torch.forward,
        model.to(in_torch.place(plan)),
        in_torch.nchw(images, plan),
        plan,
        half=batch == 8 or plan.device == "gpu",
        compiled=batch == 8 and not plan.smoke,
    )
    contenders = {OURS: call, **others}
    if plan.device == "gpu":
        half = sam_in_jax(plan, size, leaves, jnp.bfloat16)
        contenders["jaxear bf16"], _ = in_jax(half, images, backward=backward)
    if not backward:
        out = others["torch"]().permute(0, 2, 3, 1).float().cpu().numpy()
        cost["largest_difference"] = largest_difference(call(), out)
    # Comparing the outputs has warmed up a single large image, too.
    seconds = alternate(plan, contenders, warm_up=batch > 1 or plan.device == "gpu")
    return Row(name, seconds, batch, {**cost, **notes})


def _work(backward: bool) -> str:
    return "forward and backward" if backward else "forward"


def timm_rows(plan: Plan) -> Iterator[Row]:
    """The ImageNet networks at 128x128 in float32, statistics of BatchNorm fixed."""
    from porting.timm_import import import_timm
    from scripts.benchmarks import in_torch

    size = plan.size(128, 32)
    for name in TIMM_NAMES[: 1 if plan.smoke else None]:
        ours = create_backbone(name, image_size=size, weights="none", abstract=True).encoder
        fill(ours, random_leaves(ours), source="random numbers")
        theirs = import_timm().create_model(name, num_classes=0).eval().to(in_torch.place(plan))
        theirs.forward = theirs.forward_features
        for batch in (8, 32):
            images = random_images(batch, size)
            for backward in (False, True):
                call, cost = in_jax(_LastFeatures(ours), images, backward=backward)
                make = in_torch.gradient if backward else in_torch.forward
                contenders = {OURS: call, "torch": make(theirs, in_torch.nchw(images, plan), plan)}
                what = f"{name} 128, {_work(backward)}, b{batch}"
                yield Row(what, alternate(plan, contenders), batch, cost)


class _LastFeatures(nnx.Module):
    """The map that timm's `forward_features` gives, too."""

    def __init__(self, encoder: Any):
        self.encoder = encoder

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.encoder.features(x, ("last",))[0]


def parity_rows(plan: Plan) -> Iterator[Row]:
    """Whether the numbers are right on this device: float32 with and without TF32, bfloat16."""
    import torch

    size = plan.size(128, 32)
    images = random_images(2, size)
    leaves = random_leaves(sam_shapes(plan, size))
    with torch.inference_mode():
        x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).double()
        exact = sam_in_torch(plan, size, leaves).double()(x).permute(0, 2, 3, 1).numpy()
    for name, dtype, precision in (
        ("float32", jnp.float32, "highest"),
        ("float32 as the device does it (TF32 on a GPU)", jnp.float32, "default"),
        ("bfloat16", jnp.bfloat16, "default"),
    ):
        with jax.default_matmul_precision(precision):
            call, _ = in_jax(sam_in_jax(plan, size, leaves, dtype), images, backward=False)
        error = largest_difference(call(), exact)
        yield Row(f"SAM against torch in float64, {name}", facts={"largest_difference": error})
