"""A trained model applied to many images: compiled once per shape, in batches, on any device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxear.data.pipeline import padded_batches
from jaxear.errors import UserError
from jaxear.pixels import PixelModel
from jaxear.vae import EarVAE

BATCH_SIZE = 64

Codec = EarVAE | PixelModel
"""What turns images into codes and back."""


def encode_images(
    model: Codec, images: np.ndarray, *, batch_size: int = BATCH_SIZE
) -> tuple[np.ndarray, np.ndarray]:
    """Images [n, H, W, 3], uint8 or floats in [0, 1] -> mu and logvar, float32 [n, d] each."""
    return _in_batches(model, encode_arrays, np.asarray(images), batch_size)


def decode_codes(model: Codec, codes: np.ndarray, *, batch_size: int = BATCH_SIZE) -> np.ndarray:
    """Codes [n, d] -> images, float32 [n, H, W, 3] in [0, 1]."""
    return _in_batches(model, decode_arrays, np.asarray(codes, np.float32), batch_size)


def as_float(images: Any) -> jax.Array:
    """uint8 images, or floats in [0, 1], as float32 in [0, 1].

    Raises:
        UserError: another dtype.
    """
    images = jnp.asarray(images)
    if images.dtype == jnp.uint8:
        return images.astype(jnp.float32) / 255.0
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise UserError(f"Images must be uint8, or floats in [0, 1], not {images.dtype}.")
    return images.astype(jnp.float32)


@partial(jax.jit, static_argnums=0)
def encode_arrays(graphdef: Any, state: Any, images: Any) -> tuple[jax.Array, jax.Array]:
    """One batch, by a model that `nnx.split` took apart: images as above -> mu and logvar."""
    return nnx.merge(graphdef, state).encode(as_float(images))


@partial(jax.jit, static_argnums=0)
def decode_arrays(graphdef: Any, state: Any, codes: jax.Array) -> jax.Array:
    """One batch of codes [b, d] -> images, float32 [b, H, W, 3] in [0, 1]."""
    return nnx.merge(graphdef, state).decode(codes)


def _in_batches(
    model: Codec, function: Callable[..., Any], values: np.ndarray, batch_size: int
) -> Any:
    if len(values) == 0:
        raise UserError("There is nothing to compute: no images or codes were given.")
    graphdef, state = nnx.split(model)
    parts = [
        jax.tree.map(lambda x, n=n: np.asarray(x[:n]), function(graphdef, state, batch))
        for batch, n in padded_batches(values, min(batch_size, len(values)))
    ]
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)
