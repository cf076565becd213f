"""Distances between images in the features of VGG-16, for the objective and for evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import jax
from flax import nnx
from flax.nnx.traversals import unflatten_mapping

from jaxear.backbones.registry import create_backbone
from jaxear.config import TrainConfig
from jaxear.losses import perceptual
from jaxear.model import compute_dtype

# The last activation of each stage: the layers that Zhang et al. (2018) compare.
LAYERS = ("relu1_2", "relu2_2", "relu3_3", "relu4_3", "relu5_3")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Judge:
    """A frozen network whose features tell images apart, as a pure function of its arrays.

    It is a pytree of these: a compiled function can take it as an argument.

    Attributes:
        leaves: its arrays by dotted path.
        graphdef, paths: the network without them, and where in it they belong.
    """

    leaves: dict[str, jax.Array]
    graphdef: Any = field(metadata={"static": True})
    paths: tuple[tuple[Any, ...], ...] = field(metadata={"static": True})

    @classmethod
    def of(cls, network: nnx.Module) -> Judge:
        """The judge that a network of images in [0, 1] -> feature maps makes."""
        graphdef, state = nnx.split(network)
        flat = nnx.to_flat_state(state)
        leaves = {_name(path): variable.get_value() for path, variable in flat}
        return cls(leaves, graphdef, tuple(path for path, _ in flat))

    def features(self, leaves: dict[str, jax.Array], images: jax.Array) -> tuple[jax.Array, ...]:
        """Images [b, h, w, 3] in [0, 1] -> maps [b, h', w', c], computed with these arrays."""
        flat = {path: leaves[_name(path)] for path in self.paths}
        return nnx.merge(self.graphdef, nnx.State(unflatten_mapping(flat)))(images)


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))


def create_judge(config: TrainConfig, image_size: int) -> Judge | None:
    """The network that the perceptual term of a configuration asks for beside the backbone.

    Returns:
        VGG-16 with the features of `LAYERS`; None where the term is off or is to use the backbone.

    Raises:
        WeightsNotFoundError: there are no ported weights of VGG-16; the message says how to get
            them.
        UserError: the images are smaller than VGG-16 takes.
    """
    if config.perceptual_weight == 0 or config.perceptual == "backbone":
        return None
    return vgg16_judge(image_size, dtype=compute_dtype(config.dtype))


def vgg16_judge(image_size: int, *, dtype: Any = None, weights: str = "auto") -> Judge:
    """VGG-16 for square images of this many pixels; arguments and errors as `create_backbone`'s."""
    network = create_backbone(
        "vgg16", image_size=image_size, weights=weights, dtype=dtype, features=LAYERS
    )
    return Judge.of(cast(nnx.Module, network))


def lpips_style_distance(judge: Judge, x: jax.Array, y: jax.Array) -> jax.Array:
    """Perceptual distance of images [b, h, w, 3] in [0, 1]: [b], 0 for equal ones.

    Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (2018),
    equation 1: features of unit length per position, squared differences, their mean over
    positions, but with all channels weighted alike and the mean over layers. LPIPS weighs channels
    by what it learned from people's judgements, and sums over layers: its figures do not compare
    with these.
    """
    return perceptual(judge.features(judge.leaves, x), judge.features(judge.leaves, y))
