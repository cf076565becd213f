"""Segment Anything's image encoder in Flax NNX, exactly as Meta's code computes it.

Reference: `ImageEncoderViT` of facebookresearch/segment-anything (modeling/image_encoder.py),
Kirillov et al. 2023, "Segment Anything"; Li et al. 2022, "Exploring Plain Vision Transformer
Backbones for Object Detection" for the windows.

A plain vision transformer, normalised before each layer (LayerNorm eps 1e-6). Most blocks attend
within windows of 14x14 tokens (see window_attention.py), four attend to the whole grid.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn import initializers

from jaxear.backbones.base import BackboneSpec, FeatureInfo
from jaxear.backbones.lean import LayerNorm, gelu
from jaxear.backbones.staged import computed_once, run, take
from jaxear.backbones.window_attention import window_attention
from jaxear.errors import UserError

PATCH_SIZE = 16
EPSILON = 1e-6


@dataclass(frozen=True)
class SamConfig:
    """The architecture; the presets below are Meta's (segment_anything/build_sam.py).

    Attributes:
        embed_dim: width of the tokens.
        depth: number of transformer blocks.
        num_heads: attention heads; divides `embed_dim`.
        global_attn_indexes: the blocks (from 0) that attend to the whole grid.
        window_size: side of the other blocks' windows, in tokens.
        mlp_dim: hidden width of the MLPs.
        out_channels: channels of the neck's output.
    """

    embed_dim: int
    depth: int
    num_heads: int
    global_attn_indexes: tuple[int, ...]
    mlp_dim: int
    window_size: int = 14
    out_channels: int = 256

    def __post_init__(self):
        object.__setattr__(self, "global_attn_indexes", tuple(self.global_attn_indexes))
        numbers = dataclasses.asdict(self)
        numbers.pop("global_attn_indexes")
        if bad := [f"{name}={value}" for name, value in numbers.items() if value < 1]:
            raise UserError(f"SAM's {', '.join(bad)}: expected positive numbers.")
        if self.embed_dim % self.num_heads:
            raise UserError(
                f"SAM's embed_dim={self.embed_dim} cannot be divided among "
                f"num_heads={self.num_heads}; choose a multiple."
            )
        if any(not 0 <= i < self.depth for i in self.global_attn_indexes):
            raise UserError(
                f"SAM's global_attn_indexes={self.global_attn_indexes} name blocks outside "
                f"0..{self.depth - 1}; give those of a depth of {self.depth}."
            )


VIT_B = SamConfig(768, 12, 12, (2, 5, 8, 11), 3072)
VIT_L = SamConfig(1024, 24, 16, (5, 11, 17, 23), 4096)
VIT_H = SamConfig(1280, 32, 16, (7, 15, 23, 31), 5120)


class Attention(nnx.Module):
    """Multi-head attention with decomposed relative positions, on windows or the whole grid.

    The bias of the keys is kept, as checkpoints have it, but nothing depends on it: it cancels.
    """

    def __init__(
        self,
        config: SamConfig,
        grid: tuple[int, int],
        *,
        windowed: bool,
        dtype: Any,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ):
        dim = config.embed_dim
        head_dim = dim // config.num_heads
        self.num_heads = config.num_heads
        self.window = (config.window_size, config.window_size) if windowed else grid
        linear = functools.partial(nnx.Linear, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.qkv = linear(dim, 3 * dim)
        self.proj = linear(dim, dim)
        h, w = self.window
        init = initializers.truncated_normal(0.02)
        self.rel_pos_h = nnx.Param(init(rngs.params(), (2 * h - 1, head_dim), param_dtype))
        self.rel_pos_w = nnx.Param(init(rngs.params(), (2 * w - 1, head_dim), param_dtype))
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, dim = x.shape
        assert self.qkv.bias is not None
        q_bias, _, v_bias = jnp.split(self.qkv.bias[...].astype(self.dtype), 3)
        q, k, v = jnp.split(x @ self.qkv.kernel[...].astype(self.dtype), 3, axis=-1)
        heads = (b, h, w, self.num_heads, -1)
        q, k, v = (q + q_bias).reshape(heads), k.reshape(heads), v.reshape(heads)
        tables = (self.rel_pos_h[...].astype(self.dtype), self.rel_pos_w[...].astype(self.dtype))
        out = window_attention(q, k, v, *tables, self.window)
        return self.proj(out.reshape(b, h, w, dim) + v_bias)


class Mlp(nnx.Module):
    """Two linear layers with the exact (erf) GELU between them."""

    def __init__(self, config: SamConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        linear = functools.partial(nnx.Linear, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.lin1 = linear(config.embed_dim, config.mlp_dim)
        self.lin2 = linear(config.mlp_dim, config.embed_dim)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.lin2(gelu(self.lin1(x)))


class Block(nnx.Module):
    """A transformer block, normalised first; x [b, h, w, embed_dim] -> the same."""

    def __init__(self, config: SamConfig, grid: tuple[int, int], *, windowed: bool, **kinds: Any):
        self.norm1 = LayerNorm(config.embed_dim, epsilon=EPSILON, **kinds)
        self.attn = Attention(config, grid, windowed=windowed, **kinds)
        self.norm2 = LayerNorm(config.embed_dim, epsilon=EPSILON, **kinds)
        self.mlp = Mlp(config, **kinds)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = computed_once(x + self.attn(self.norm1(x)), self)
        return x + self.mlp(self.norm2(x))


class Neck(nnx.Module):
    """1x1 and 3x3 convolution without bias, each with a LayerNorm over the channels."""

    def __init__(self, config: SamConfig, **kinds: Any):
        channels = config.out_channels
        self.conv1 = nnx.Conv(config.embed_dim, channels, (1, 1), use_bias=False, **kinds)
        self.norm1 = LayerNorm(channels, epsilon=EPSILON, **kinds)
        self.conv2 = nnx.Conv(channels, channels, (3, 3), padding=1, use_bias=False, **kinds)
        self.norm2 = LayerNorm(channels, epsilon=EPSILON, **kinds)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm2(self.conv2(self.norm1(self.conv1(x))))


class SamEncoder(nnx.Module):
    """SAM's image encoder for images of one size; x [b, h, w, 3] -> [b, h/16, w/16, 256].

    Args:
        config: the architecture.
        image_size: (height, width) in pixels, multiples of 16.
        dtype: of the computation; softmax and LayerNorm statistics are in float32 at least.
        param_dtype: of the parameters.
        remat: whether the gradient computes the activations within a block again, to save memory.
        rngs: source of the random initialisation.
    """

    def __init__(
        self,
        config: SamConfig,
        image_size: tuple[int, int],
        *,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        grid = (image_size[0] // PATCH_SIZE, image_size[1] // PATCH_SIZE)
        patch = (PATCH_SIZE, PATCH_SIZE)
        self.config = config
        self.image_size = image_size
        self.grid = grid
        self.dtype = dtype
        self.remat = remat
        self.patch_embed = nnx.Conv(
            3, config.embed_dim, patch, strides=patch, padding="VALID", **kinds
        )
        init = initializers.truncated_normal(0.02)
        self.pos_embed = nnx.Param(init(rngs.params(), (1, *grid, config.embed_dim), param_dtype))
        self.blocks = nnx.List(
            [
                Block(config, grid, windowed=i not in config.global_attn_indexes, **kinds)
                for i in range(config.depth)
            ]
        )
        self.neck = Neck(config, **kinds)

    @property
    def feature_info(self) -> Mapping[str, FeatureInfo]:
        """ViTDet's "stage1", .. after each block with global attention; "last" (tokens); "neck"."""
        stages = range(1, len(self.config.global_attn_indexes) + 1)
        tokens = FeatureInfo(self.config.embed_dim, PATCH_SIZE)
        return {
            **{f"stage{i}": tokens for i in stages},
            "last": tokens,
            "neck": FeatureInfo(self.config.out_channels, PATCH_SIZE),
        }

    @property
    def n_blocks(self) -> int:
        """The number of transformer blocks."""
        return self.config.depth

    def block_index(self, path: tuple[str | int, ...]) -> int:
        """The depth of the parameter at `path`: 0 the patch and position embedding, 1 .. n_blocks
        the blocks, n_blocks + 1 the neck."""
        if path[0] == "blocks":
            return int(path[1]) + 1
        return self.n_blocks + 1 if path[0] == "neck" else 0

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalised images [b, h, w, 3] -> the neck's output [b, h/16, w/16, out_channels]."""
        return self.features(x, ("neck",))[0]

    def tokens(self, x: jax.Array) -> jax.Array:
        """Normalised images [b, h, w, 3] -> the last block's output [b, h/16, w/16, embed_dim]."""
        return self.features(x, ("last",))[0]

    def features(self, x: jax.Array, names: tuple[str, ...]) -> tuple[jax.Array, ...]:
        """Normalised images [b, h, w, 3] -> the named maps of `feature_info`, [b, h/16, w/16, c].

        Computes no deeper than needed.
        """
        last = self.n_blocks - 1
        taken_at = {"last": f"blocks.{last}", "neck": "neck"}
        taken_at |= {
            f"stage{n}": f"blocks.{i}"
            for n, i in enumerate(sorted(self.config.global_attn_indexes), start=1)
        }
        return take(self._activations(x), tuple(taken_at[name] for name in names))

    def intermediates(self, x: jax.Array) -> dict[str, jax.Array]:
        """Every activation, for checks of parity: "embed", "blocks.0", "blocks.1", .., "neck"."""
        return dict(self._activations(x))

    def _activations(self, x: jax.Array) -> Iterator[tuple[str, jax.Array]]:
        height, width = self.image_size
        if x.shape[1:] != (height, width, 3):
            raise UserError(
                f"This SAM encoder was created for images [b, {height}, {width}, 3], "
                f"not {list(x.shape)}; create it with the image_size of your images."
            )
        x = self.patch_embed(x) + self.pos_embed[...].astype(self.dtype)
        yield "embed", x
        for i, block in enumerate(self.blocks):
            x = run(block, x, remat=self.remat)
            yield f"blocks.{i}", x
        yield "neck", self.neck(x)


def adapt(
    leaves: Mapping[str, np.ndarray],
    encoder: SamEncoder,
    *,
    pos_embed: str = "interpolate",
    rel_pos: str = "interpolate",
) -> dict[str, np.ndarray]:
    """Fit the position tables of a file to the encoder's image size; the other leaves pass through.

    Args:
        leaves: of a ported file, of whatever native size.
        encoder: the one to be filled.
        pos_embed: "interpolate" (bicubic, antialiased, as timm's `resample_abs_pos_embed`) or
            "crop" (the central part).
        rel_pos: of the blocks with global attention, "interpolate" (linear, as Meta's
            `get_rel_pos`) or "crop" (the central part: neighbours keep their learnt distance).

    Raises:
        UserError: another word, or "crop" to a size that is larger than the file's.
    """
    for option, value in (("pos_embed", pos_embed), ("rel_pos", rel_pos)):
        if value not in ("interpolate", "crop"):
            raise UserError(f"{option} must be 'interpolate' or 'crop', not {value!r}.")
    linear_weights = functools.partial(_linear_weights, dtype=encoder.pos_embed.dtype)
    ways = {"pos_embed": (pos_embed, _bicubic_weights), "rel_pos": (rel_pos, linear_weights)}

    def resize(table: np.ndarray, axis: int, length: int, option: str) -> np.ndarray:
        here = table.shape[axis]
        way, interpolation_weights = ways[option]
        if here == length:
            return table
        if way == "interpolate":
            resized = np.tensordot(interpolation_weights(here, length), table, axes=(1, axis))
            return np.moveaxis(resized, 0, axis)
        if here < length:
            raise UserError(
                f"{option}='crop' takes the central part of a table, but the file's has {here} "
                f"entries where images of {encoder.image_size[0]}x{encoder.image_size[1]} need "
                f"{length}; use {option}='interpolate', or smaller images."
            )
        start = (here - length) // 2
        return np.take(table, range(start, start + length), axis)

    adapted = dict(leaves)
    h, w = encoder.grid
    targets = [("pos_embed", 1, h, "pos_embed"), ("pos_embed", 2, w, "pos_embed")]
    for i in encoder.config.global_attn_indexes:
        targets.append((f"blocks.{i}.attn.rel_pos_h", 0, 2 * h - 1, "rel_pos"))
        targets.append((f"blocks.{i}.attn.rel_pos_w", 0, 2 * w - 1, "rel_pos"))
    for name, axis, length, option in targets:
        if name in adapted:
            adapted[name] = resize(adapted[name], axis, length, option)
    return adapted


def _bicubic_weights(n_in: int, n_out: int) -> np.ndarray:
    """[n_out, n_in], as torch's interpolate(mode="bicubic", antialias=True): Keys, a = -0.5."""
    scale = n_in / n_out
    centre = (np.arange(n_out) + 0.5) * scale
    x = np.abs(np.arange(n_in) + 0.5 - centre[:, None]) / max(scale, 1.0)
    near = (1.5 * x - 2.5) * x**2 + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    return weights / weights.sum(axis=1, keepdims=True)


def _linear_weights(n_in: int, n_out: int, *, dtype: Any) -> np.ndarray:
    """[n_out, n_in], as torch's interpolate(mode="linear"): no antialiasing, ends repeated.

    Positions in `dtype`, since torch's in float32 are off by up to 4e-6 of a step, which shows in
    the encoder's output as several times its other rounding.
    """
    number = np.dtype(dtype).type
    scale, half = number(n_in) / number(n_out), number(0.5)
    position = np.clip((np.arange(n_out, dtype=dtype) + half) * scale - half, 0, n_in - 1)
    return np.maximum(0.0, 1 - np.abs(np.arange(n_in) - position[:, None]))


def _build(
    config: SamConfig,
    *,
    image_size: tuple[int, int],
    dtype: Any,
    param_dtype: Any,
    rngs: nnx.Rngs,
    remat: bool = False,
    **architecture: Any,
) -> SamEncoder:
    config = dataclasses.replace(config, **architecture)
    kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
    return SamEncoder(config, image_size, remat=remat, **kinds)


PRESETS: Mapping[str, SamConfig] = {"sam_vit_b": VIT_B, "sam_vit_l": VIT_L, "sam_vit_h": VIT_H}
SPECS = tuple(
    BackboneSpec(
        name=name,
        build=functools.partial(_build, config),
        source=f"https://dl.fbaipublicfiles.com/segment_anything/{file}",
        licence="Apache-2.0",
        port_command=f"python scripts/port_sam.py --model {name.removeprefix('sam_')}",
        size_multiple=PATCH_SIZE,
        options=(*(field.name for field in dataclasses.fields(SamConfig)), "remat"),
        adapt=adapt,
        adapt_options=("pos_embed", "rel_pos"),
    )
    for (name, config), file in zip(
        PRESETS.items(),
        ("sam_vit_b_01ec64.pth", "sam_vit_l_0b3195.pth", "sam_vit_h_4b8939.pth"),
        strict=True,
    )
)
