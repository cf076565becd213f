"""Layers that the ImageNet families share, with torch's padding and torch's batch normalisation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from jaxear.backbones.depthwise import depthwise_conv
from jaxear.errors import UserError

Activation = Callable[[jax.Array], jax.Array]
Padding = Literal["symmetric", "same"]
BatchNormMode = Literal["frozen", "train"]


def conv(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    *,
    stride: int = 1,
    depthwise: bool = False,
    bias: bool = False,
    padding: Padding = "symmetric",
    dtype: Dtype,
    param_dtype: Dtype,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """A square convolution [b, h, w, in] -> [b, ceil(h / stride), ceil(w / stride), out].

    Args:
        padding: "symmetric" puts kernel_size // 2 zeros on every side, as torch does; "same" is
            TensorFlow's and XLA's, which at stride 2 and an even size puts one less at the top and
            left.
    """
    margin = kernel_size // 2
    groups = in_channels if depthwise else 1
    # He et al. (2015) by the fan-out within a group, as torchvision's and timm's initialisations.
    deviation = math.sqrt(2 * groups / (kernel_size**2 * out_channels))
    return nnx.Conv(
        in_channels,
        out_channels,
        (kernel_size, kernel_size),
        strides=stride,
        padding="SAME" if padding == "same" else ((margin, margin), (margin, margin)),
        feature_group_count=groups,
        conv_general_dilated=depthwise_conv if depthwise else jax.lax.conv_general_dilated,
        use_bias=bias,
        kernel_init=nnx.initializers.normal(deviation),
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
    )


class BatchNorm(nnx.Module):
    """Batch normalisation over b, h, w with the semantics of torch's `BatchNorm2d`.

    With mode "frozen" it always uses its running statistics. With mode "train" it does so too until
    `model.train()` is called (`model.eval()` goes back); then it normalises by the batch's own mean
    and biased variance, and moves the running ones towards the mean and the unbiased variance by
    `momentum` (torch's, which is one minus Flax's). Under `jit` the batch is the global one,
    however it is sharded. Parameters, statistics and arithmetic are in `param_dtype`, the output is
    in `dtype`.

    Raises:
        UserError: when called in training with a single value per channel, as torch does.
    """

    def __init__(
        self,
        channels: int,
        *,
        epsilon: float = 1e-5,
        momentum: float = 0.1,
        mode: BatchNormMode = "frozen",
        dtype: Dtype,
        param_dtype: Dtype,
    ):
        if mode not in ("frozen", "train"):
            raise UserError(f"batch_norm must be 'frozen' or 'train', not {mode!r}.")
        self.scale = nnx.Param(jnp.ones(channels, param_dtype))
        self.bias = nnx.Param(jnp.zeros(channels, param_dtype))
        self.mean = nnx.BatchStat(jnp.zeros(channels, param_dtype))
        self.var = nnx.BatchStat(jnp.ones(channels, param_dtype))
        self.num_batches_tracked = nnx.BatchStat(jnp.zeros((), jnp.int32))
        self.epsilon = epsilon
        self.momentum = momentum
        self.mode = mode
        self.dtype = dtype
        self.use_running_average = True  # what nnx.Module.train() and .eval() set

    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, h, w, c] -> the same shape."""
        x = x.astype(self.scale.dtype)
        if self.mode == "frozen" or self.use_running_average:
            mean, var = self.mean[...], self.var[...]
        else:
            mean, var = self._batch_statistics(x)
        factor = self.scale[...] * jax.lax.rsqrt(var + self.epsilon)
        return ((x - mean) * factor + self.bias[...]).astype(self.dtype)

    def _batch_statistics(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        n = x.size // x.shape[-1]
        if n == 1:
            raise UserError(
                f"Batch normalisation in training needs more than one value per channel, but got "
                f"{list(x.shape)}; take a larger batch or image, or batch_norm='frozen'."
            )
        mean = jnp.mean(x, (0, 1, 2))
        var = jnp.mean(jnp.square(x - mean), (0, 1, 2))
        self.mean[...] += self.momentum * jax.lax.stop_gradient(mean - self.mean[...])
        self.var[...] += self.momentum * jax.lax.stop_gradient(var * (n / (n - 1)) - self.var[...])
        self.num_batches_tracked[...] += 1
        return mean, var


class SqueezeExcite(nnx.Module):
    """Channel attention (Hu et al. 2018): gates each channel by all channels' spatial means."""

    def __init__(
        self,
        channels: int,
        reduced: int,
        *,
        activation: Activation,
        gate: Activation,
        **kwargs: Any,
    ):
        self.reduce = conv(channels, reduced, 1, bias=True, **kwargs)
        self.expand = conv(reduced, channels, 1, bias=True, **kwargs)
        self.activation = activation
        self.gate = gate

    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, h, w, c] -> the same shape."""
        pooled = jnp.mean(x, (1, 2), keepdims=True)
        return x * self.gate(self.expand(self.activation(self.reduce(pooled))))


class InvertedResidual(nnx.Module):
    """Expand, filter each channel, squeeze and excite, project (MBConv; Tan & Le 2019).

    Without expansion (`expanded == in_channels`) it is a depthwise separable convolution; without
    `reduced` there is no squeeze-excite. The input is added where the shape stays the same.
    """

    def __init__(
        self,
        in_channels: int,
        expanded: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int,
        reduced: int | None,
        activation: Activation,
        squeeze_activation: Activation,
        gate: Activation,
        padding: Padding,
        norm: Callable[[int], BatchNorm],
        dtype: Dtype,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.has_expansion = expanded != in_channels
        if self.has_expansion:
            self.expand = conv(in_channels, expanded, 1, **kwargs)
            self.expand_bn = norm(expanded)
        self.depthwise = conv(
            expanded,
            expanded,
            kernel_size,
            stride=stride,
            depthwise=True,
            padding=padding,
            **kwargs,
        )
        self.depthwise_bn = norm(expanded)
        self.has_squeeze = reduced is not None
        if reduced is not None:
            self.squeeze = SqueezeExcite(
                expanded, reduced, activation=squeeze_activation, gate=gate, **kwargs
            )
        self.project = conv(expanded, out_channels, 1, **kwargs)
        self.project_bn = norm(out_channels)
        self.activation = activation
        self.has_shortcut = stride == 1 and in_channels == out_channels

    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, h, w, in_channels] -> [b, h / stride, w / stride, out_channels]."""
        shortcut = x
        if self.has_expansion:
            x = self.activation(self.expand_bn(self.expand(x)))
        x = self.activation(self.depthwise_bn(self.depthwise(x)))
        if self.has_squeeze:
            x = self.squeeze(x)
        x = self.project_bn(self.project(x))
        return x + shortcut if self.has_shortcut else x


def take(maps: Iterator[tuple[str, jax.Array]], names: tuple[str, ...]) -> tuple[jax.Array, ...]:
    """The named feature maps of a lazy network: it is run no deeper than the deepest of them.

    Args:
        maps: yields (name, feature map) from shallow to deep, computing each when it is asked.
        names: the maps to return, in the order wanted.
    """
    taken: dict[str, jax.Array] = {}
    wanted = set(names)
    for name, feature_map in maps:
        if name in wanted:
            taken[name] = feature_map
            if len(taken) == len(wanted):
                break
    return tuple(taken[name] for name in names)
