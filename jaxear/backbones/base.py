"""What every backbone is: a ported encoder, with normalisation and choice of features around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from jaxear.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class FeatureInfo(NamedTuple):
    """A feature map's channels, and how many pixels one of its cells spans."""

    channels: int
    stride: int


class Encoder(Protocol):
    """The ported network itself: normalised images in, the same numbers as its torch original out.

    A family's encoder is an `nnx.Module` with these members. Those with a classifier also have
    `logits(x)`: [b, h, w, 3] -> [b, classes]. Where `remat` is set, the gradient computes the
    activations within each block again instead of keeping them.
    """

    remat: bool

    @property
    def feature_info(self) -> Mapping[str, FeatureInfo]:
        """The feature maps on offer, shallow to deep; "last" is the default of `Backbone`."""
        ...

    @property
    def n_blocks(self) -> int:
        """How many blocks follow the stem, counted as for "the first N blocks frozen"."""
        ...

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalised images [b, h, w, 3] -> what the torch original returns, NHWC."""
        ...

    def features(self, x: jax.Array, names: tuple[str, ...]) -> tuple[jax.Array, ...]:
        """Normalised images [b, h, w, 3] -> the named maps; computes no deeper than needed."""
        ...

    def block_index(self, path: tuple[str | int, ...]) -> int:
        """The depth of the parameter at `path`: 0 stem, 1 .. n_blocks, n_blocks + 1 beyond."""
        ...


@dataclass(frozen=True)
class BackboneSpec:
    """An architecture that `create_backbone` can build, with what one must know to use it.

    `build(image_size=(H, W), dtype=..., param_dtype=..., rngs=..., **options)` returns the encoder.
    `adapt(leaves, encoder, **options)` turns the leaves of a ported file ({"a.b.kernel": array})
    into those that the encoder needs, where they depend on the size of the image.
    `options` names the options that `build` takes, `adapt_options` those that only concern the
    adaptation of a file.
    """

    name: str
    build: Callable[..., Encoder]
    source: str
    licence: str
    port_command: str
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    size_multiple: int = 1
    options: tuple[str, ...] = ()
    adapt: Callable[..., dict] | None = None
    adapt_options: tuple[str, ...] = ()


class Backbone(nnx.Module):
    """An encoder that takes plain images: normalises them and returns the features asked for.

    Attributes:
        encoder: the ported network (see `Encoder`).
        name: the architecture's name, as `list_backbones()` gives it.
        mean, std: per-channel normalisation of images in [0, 1].
        stride: pixels per feature cell (of the deepest map, where several are asked for).
        out_channels: channels of the features (a tuple where several are asked for).
    """

    def __init__(
        self, encoder: Encoder, spec: BackboneSpec, *, features: str | list[str] | tuple[str, ...]
    ):
        names = (features,) if isinstance(features, str) else tuple(features)
        info = encoder.feature_info
        if unknown := [name for name in names if name not in info]:
            raise UserError(
                f"{spec.name} has no feature map {', '.join(map(repr, unknown))}; "
                f"choose from {', '.join(info)}."
            )
        if not names:
            raise UserError(f"No feature map asked for; choose from {', '.join(info)}.")
        self.encoder = encoder
        self.name = spec.name
        self.mean = spec.mean
        self.std = spec.std
        self.feature_names = names
        self.single = isinstance(features, str)
        self.stride = max(info[name].stride for name in names)
        channels = tuple(info[name].channels for name in names)
        self.out_channels = channels[0] if self.single else channels

    def normalize(self, images: jax.Array) -> jax.Array:
        """Images [b, h, w, 3] in [0, 1] -> standardised by the encoder's own mean and std."""
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise TypeError(
                f"Expected floats in [0, 1], got {images.dtype} images; divide uint8 by 255."
            )
        mean = jnp.asarray(self.mean, images.dtype)
        std = jnp.asarray(self.std, images.dtype)
        return (images - mean) / std

    def __call__(self, images: jax.Array) -> jax.Array | tuple[jax.Array, ...]:
        """Images [b, h, w, 3] in [0, 1] -> features [b, h', w', c], a tuple of them if several."""
        maps = self.encoder.features(self.normalize(images), self.feature_names)
        return maps[0] if self.single else maps
