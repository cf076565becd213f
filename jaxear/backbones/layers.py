"""Layers that the ImageNet families share, with torch's padding and torch's batch normalisation."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from jaxear.backbones.depthwise import depthwise_conv
from jaxear.backbones.mixed import pointwise_conv, round_input
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
    round_weights: bool = True,
    dtype: Dtype,
    param_dtype: Dtype,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """A square convolution [b, h, w, in] -> [b, ceil(h / stride), ceil(w / stride), out].

    Args:
        padding: "symmetric" puts kernel_size // 2 zeros on every side, as torch does; "same" is
            TensorFlow's and XLA's, which at stride 2 and an even size puts one less at the top and
            left.
        round_weights: whether to compute with weights in `dtype`. If not, only the input is rounded
            to it and the output is in `param_dtype`; for 1x1 and depthwise convolutions (see
            `mixed`).
    """
    margin = kernel_size // 2
    groups = in_channels if depthwise else 1
    # He et al. (2015) by the fan-out within a group, as torchvision's and timm's initialisations.
    deviation = math.sqrt(2 * groups / (kernel_size**2 * out_channels))
    options: dict[str, Any] = {}
    if depthwise or kernel_size == 1:
        options = {"conv_general_dilated": depthwise_conv if depthwise else pointwise_conv}
    if not round_weights and dtype != param_dtype:
        options |= {"promote_dtype": round_input}
    return nnx.Conv(
        in_channels,
        out_channels,
        (kernel_size, kernel_size),
        strides=stride,
        padding="SAME" if padding == "same" else ((margin, margin), (margin, margin)),
        feature_group_count=groups,
        use_bias=bias,
        kernel_init=nnx.initializers.normal(deviation),
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
        **options,
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


def batch_norms(
    config: Any, mode: BatchNormMode, *, dtype: Dtype, param_dtype: Dtype
) -> Callable[[int], BatchNorm]:
    """What makes the norms of a network: number of channels -> layer."""
    return partial(
        BatchNorm,
        epsilon=config.norm_epsilon,
        momentum=config.norm_momentum,
        mode=mode,
        dtype=dtype,
        param_dtype=param_dtype,
    )
