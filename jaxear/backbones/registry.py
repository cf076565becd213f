"""The backbones by name."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from flax import nnx

from jaxear.backbones import convnext, efficientnet, mobilenetv3, resnet, sam, vgg
from jaxear.backbones.base import Backbone, BackboneSpec
from jaxear.backbones.hybrid import HybridBackbone
from jaxear.backbones.weights import (
    check_backbone,
    fill,
    read_metadata,
    read_weights,
    weights_path,
)
from jaxear.errors import UserError, WeightsNotFoundError

logger = logging.getLogger(__name__)

T = TypeVar("T")

FAMILIES = (sam, resnet, efficientnet, mobilenetv3, convnext, vgg)

SPECS: Mapping[str, BackboneSpec] = {
    spec.name: spec for family in FAMILIES for spec in family.SPECS
}

SHORT_NAMES: Mapping[str, str] = {
    "sam": "sam_vit_b",
    "sam_large": "sam_vit_l",
    "sam_huge": "sam_vit_h",
    "efficientnet": "efficientnet_b3",
    "mobilenet": "mobilenetv3_large_100",
    "mobilenetv3": "mobilenetv3_large_100",
    "convnext": "convnextv2_tiny",
    "convnextv2": "convnextv2_tiny",
}


HYBRID = "hybrid"


def list_backbones() -> tuple[str, ...]:
    """The names that `create_backbone` takes, besides the short ones of the command line."""
    return (*SPECS, HYBRID)


def full_name(name: str) -> str:
    """The name in `list_backbones()` that a full or short name stands for.

    Raises:
        UserError: there is no such backbone.
    """
    return HYBRID if name == HYBRID else get_spec(name).name


def get_spec(name: str) -> BackboneSpec:
    """The architecture called `name` (full or short).

    Raises:
        UserError: there is none; the message lists those there are.
    """
    spec = SPECS.get(SHORT_NAMES.get(name, name))
    if spec is None:
        raise UserError(
            f"There is no backbone {name!r}; choose from {', '.join(list_backbones())} "
            f"(short: {', '.join(SHORT_NAMES)})."
        )
    return spec


def create_backbone(
    name: str,
    *,
    image_size: int | tuple[int, int] = 128,
    weights: str = "auto",
    dtype: Any = None,
    rngs: nnx.Rngs | None = None,
    features: str | list[str] | tuple[str, ...] = "last",
    abstract: bool = False,
    **options: Any,
) -> Backbone | HybridBackbone:
    """Build a backbone for images of one size and load its ported weights.

    "hybrid" is several backbones side by side, SAM ViT-B and ResNet-50 by default; its options are
    `backbones`, their names, and for each of these names a dictionary of its own options.

    Args:
        name: one of `list_backbones()`, or its short name.
        image_size: pixels, one number for a square or (height, width).
        weights: "auto" takes the ported file at `weights_path(name)`; "none" leaves the random
            initialisation, with a warning in the log; anything else is the path of a ported file.
        dtype: of the computation, float32 by default. Parameters are kept in float32, or in
            float64 when that is the dtype (which needs jax_enable_x64).
        rngs: the source of the random initialisation; `nnx.Rngs(0)` by default.
        features: the feature map to return, "last" by default, or several for a pyramid.
        abstract: draw and load nothing; in place of its arrays it has their shapes and dtypes.
        **options: of the family, e.g. `classifier=True` for an ImageNet encoder, `pos_embed="crop"`
            for SAM.

    Raises:
        UserError: an unknown name, option or feature, a size that the encoder cannot take.
        WeightsNotFoundError: there are no ported weights; the message says how to get them.
        WeightsMismatchError: the file does not fit the architecture.
    """
    if name == HYBRID:
        create = partial(
            create_backbone,
            image_size=image_size,
            weights=_for_all(weights),
            dtype=dtype,
            features=features,
            abstract=abstract,
        )
        rngs = rngs or nnx.Rngs(0)
        parts = [create(n, rngs=rngs, **own) for n, own in _parts(options)]
        return HybridBackbone(cast(list[Backbone], parts))
    spec = get_spec(name)
    build = partial(
        _build_one,
        spec,
        image_size=image_size,
        dtype=dtype,
        features=features,
        **options,
    )
    if weights == "none":
        if abstract:
            return without_arrays(lambda rngs: build(rngs=rngs))
        logger.warning(
            "%s starts from RANDOM weights (weights='none'); nothing pretrained is in it.",
            spec.name,
        )
        # Compiled as one program: one by one, the random draws take many times as long to compile.
        return nnx.jit(lambda rngs: build(rngs=rngs))(rngs or nnx.Rngs(0))

    path = _find_weights(spec, weights)
    metadata = read_metadata(path)
    check_backbone(metadata, spec.name, path)
    # What the file says of its architecture holds, unless other options are given.
    architecture = {**metadata.get("architecture", {}), **options}
    backbone = without_arrays(lambda rngs: build(rngs=rngs, **architecture))
    if abstract:
        return backbone
    leaves, _ = read_weights(path)
    if spec.adapt is not None:
        chosen = {key: value for key, value in options.items() if key in spec.adapt_options}
        leaves = spec.adapt(leaves, backbone.encoder, **chosen)
    fill(cast(nnx.Module, backbone.encoder), leaves, source=str(path))
    return backbone


def without_arrays(build: Callable[[nnx.Rngs], T]) -> T:
    """What `build` makes of a source of randomness, with shapes and dtypes in place of its arrays.

    As `nnx.eval_shape`, in half the time: an `nnx.Rngs` would count its draws in traced numbers,
    which takes longer than all else. Here every draw has the same key.
    """
    return nnx.eval_shape(lambda: build(cast(nnx.Rngs, _OneKey())))


class _OneKey:
    """What layers ask of an `nnx.Rngs` when they are made."""

    def __init__(self) -> None:
        self._key = jax.random.key(0)

    def params(self) -> jax.Array:
        return self._key


def check_choice(
    name: str,
    *,
    image_size: int | tuple[int, int] = 128,
    weights: str = "auto",
    **options: Any,
) -> None:
    """Refuse at once what `create_backbone` would refuse later, before hours of reading images.

    Raises:
        UserError: an unknown name or option, or a size that the encoder cannot take.
        WeightsNotFoundError: there are no ported weights; the message says how to get them.
    """
    if name == HYBRID:
        for part, own in _parts(options):
            check_choice(part, image_size=image_size, weights=_for_all(weights), **own)
        return
    spec = get_spec(name)
    _check_size(spec, image_size)
    _check_options(spec, options)
    if weights != "none":
        _find_weights(spec, weights)


def _parts(options: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The backbones of a hybrid, by name, each with its own options."""
    names = list(options.get("backbones", ("sam", "resnet50")))
    if unknown := options.keys() - {"backbones", *names}:
        raise UserError(
            f"hybrid has no option {', '.join(sorted(unknown))}; it has backbones, and options for "
            f"each of {', '.join(names)}."
        )
    return [(name, options.get(name, {})) for name in names]


def _for_all(weights: str) -> str:
    if weights not in ("auto", "none"):
        raise UserError(
            f"hybrid has several files of weights: weights must be auto or none, not {weights!r}; "
            "JAXEAR_WEIGHTS names the folder that has them."
        )
    return weights


def _build_one(
    spec: BackboneSpec,
    *,
    image_size: int | tuple[int, int],
    dtype: Any,
    rngs: nnx.Rngs | None = None,
    features: str | list[str] | tuple[str, ...],
    **options: Any,
) -> Backbone:
    size = _check_size(spec, image_size)
    _check_options(spec, options)
    dtype = _check_dtype(dtype)
    encoder = spec.build(
        image_size=size,
        dtype=dtype,
        param_dtype=jnp.float64 if dtype == jnp.float64 else jnp.float32,
        rngs=rngs or nnx.Rngs(0),
        **{key: value for key, value in options.items() if key in spec.options},
    )
    return Backbone(encoder, spec, features=features)


def _find_weights(spec: BackboneSpec, weights: str) -> Path:
    path = weights_path(spec.name) if weights == "auto" else Path(weights)
    if not path.is_file():
        raise WeightsNotFoundError(
            f"No ported weights of {spec.name} at {path}. Make them with `{spec.port_command}`, "
            "point JAXEAR_WEIGHTS at the folder that has them, or pass weights='none' "
            "(--weights none) to start from random values."
        )
    return path


def _check_options(spec: BackboneSpec, options: dict[str, Any]) -> None:
    if unknown := options.keys() - {*spec.options, *spec.adapt_options}:
        known = ", ".join(("features", *spec.options, *spec.adapt_options))
        raise UserError(f"{spec.name} has no option {', '.join(sorted(unknown))}; it has {known}.")


def _check_size(spec: BackboneSpec, image_size: int | tuple[int, int]) -> tuple[int, int]:
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    multiple = spec.size_multiple
    if min(height, width) < multiple or height % multiple or width % multiple:
        raise UserError(
            f"{spec.name} takes images whose height and width are multiples of {multiple}, "
            f"not {height}x{width}; the nearest is "
            f"{_nearest(height, multiple)}x{_nearest(width, multiple)}."
        )
    return int(height), int(width)


def _nearest(pixels: int, multiple: int) -> int:
    return max(multiple, round(pixels / multiple) * multiple)


def _check_dtype(dtype: Any) -> jnp.dtype:
    dtype = jnp.dtype(jnp.float32 if dtype is None else dtype)
    if dtype not in (jnp.float32, jnp.bfloat16, jnp.float64):
        raise UserError(f"dtype must be float32, bfloat16 or float64, not {dtype}.")
    if dtype == jnp.float64 and jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise UserError("float64 needs jax.config.update('jax_enable_x64', True) first.")
    return dtype
