"""SAM's encoder with its padding computed, as Meta's code does it: the oracle of the cheap form.

Written on the parameters of a `SamEncoder`, block by block, with nothing shared with it but them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxear.backbones.sam import SamEncoder


def layer_norm(norm: Any, x: jax.Array) -> jax.Array:
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(variance + 1e-6) * norm.scale[...] + norm.bias[...]


def linear(layer: Any, x: jax.Array) -> jax.Array:
    return x @ layer.kernel[...] + layer.bias[...]


def relative(table: jax.Array, size: int) -> jax.Array:
    offsets = jnp.arange(size)[:, None] - jnp.arange(size)[None, :]
    return table[offsets + size - 1]


def attention(attn: Any, x: jax.Array, *, mask_padding: tuple[int, int] | None = None) -> jax.Array:
    """Attention of all tokens of x [n, h, w, dim] to all, biases of q, k and v included.

    `mask_padding=(h, w)` plants a fault: it hides the keys beyond h and w.
    """
    n, h, w, dim = x.shape
    heads = attn.num_heads
    qkv = linear(attn.qkv, x).reshape(n, h * w, 3, heads, dim // heads)
    q, k, v = (qkv[:, :, i].transpose(0, 2, 1, 3) for i in range(3))
    logits = jnp.einsum("ncqd,nckd->ncqk", q * (dim // heads) ** -0.5, k)
    grid = q.reshape(n, heads, h, w, -1)
    rel_h = jnp.einsum("nchwd,hkd->nchwk", grid, relative(attn.rel_pos_h[...], h))
    rel_w = jnp.einsum("nchwd,wkd->nchwk", grid, relative(attn.rel_pos_w[...], w))
    logits = logits.reshape(n, heads, h, w, h, w)
    logits = logits + rel_h[..., :, None] + rel_w[..., None, :]
    if mask_padding is not None:
        real = (jnp.arange(h) < mask_padding[0])[:, None] & (jnp.arange(w) < mask_padding[1])
        logits = jnp.where(real, logits, -jnp.inf)
    weights = jax.nn.softmax(logits.reshape(n, heads, h * w, h * w), axis=-1)
    out = (weights @ v).transpose(0, 2, 1, 3).reshape(n, h, w, dim)
    return linear(attn.proj, out)


def windows(attn: Any, x: jax.Array, window_size: int, *, mask_padding: bool = False) -> jax.Array:
    """Attention in windows of a grid that is padded with zeros to a multiple of their size."""
    b, h, w, dim = x.shape
    rows, columns = -(-h // window_size), -(-w // window_size)
    pad = ((0, 0), (0, rows * window_size - h), (0, columns * window_size - w), (0, 0))
    x = jnp.pad(x, pad).reshape(b, rows, window_size, columns, window_size, dim)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, window_size, window_size, dim)
    x = attention(attn, x, mask_padding=(h, w) if mask_padding else None)
    x = x.reshape(b, rows, columns, window_size, window_size, dim).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, rows * window_size, columns * window_size, dim)[:, :h, :w]


def plain_tokens(encoder: SamEncoder, x: jax.Array, *, mask_padding: bool = False) -> jax.Array:
    """What `encoder.tokens(x)` must return; `mask_padding` plants a fault (one window only)."""
    b, height, width, _ = x.shape
    patches = x.reshape(b, height // 16, 16, width // 16, 16, 3).transpose(0, 1, 3, 2, 4, 5)
    kernel = encoder.patch_embed.kernel[...].reshape(16 * 16 * 3, -1)
    assert encoder.patch_embed.bias is not None
    x = patches.reshape(*patches.shape[:3], -1) @ kernel + encoder.patch_embed.bias[...]
    x = x + encoder.pos_embed[...]
    for i, block in enumerate(encoder.blocks):
        y = layer_norm(block.norm1, x)
        if i in encoder.config.global_attn_indexes:
            y = attention(block.attn, y)
        else:
            y = windows(block.attn, y, encoder.config.window_size, mask_padding=mask_padding)
        x = x + y
        y = jax.nn.gelu(linear(block.mlp.lin1, layer_norm(block.norm2, x)), approximate=False)
        x = x + linear(block.mlp.lin2, y)
    return x
