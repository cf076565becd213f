"""Attention with decomposed relative positions, in padded windows whose padding is not computed.

Segment Anything (Kirillov et al. 2023; modeling/image_encoder.py of its code) cuts the grid of
tokens into windows of 14x14, pads those at the edge with zero tokens, after the LayerNorm, and lets
every token attend to the padding. With 16-pixel patches a 128x128 image is a grid of 8x8, so two
thirds of what is computed there is padding. It need not be: a padded token's key and value are the
biases b_k and b_v alone, and

- q.b_k is the same for every key of a query, so it cancels in the softmax: keys need no bias;
- attention weights sum to one, so b_v can be added after the attention: values need no bias, and
  padded values are then zero;
- what is left is what the padding adds to the softmax's denominator, the sum of exp(rel_h + rel_w)
  over the padded positions. These are two rectangles, and over a rectangle the sum is a product.

So each window computes its real tokens only, and gets the same numbers. Attention to the whole grid
is the case of one window, as large as the grid.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

# Elements of one block of attention logits (64 MiB in float32); larger ones are computed in chunks.
MAX_LOGITS = 2**24


def window_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    table_h: jax.Array,
    table_w: jax.Array,
    window: tuple[int, int],
) -> jax.Array:
    """Attention within each window of a grid, as if the ragged ones were completed by padding.

    Args:
        q: unscaled queries [b, h, w, heads, d].
        k, v: keys and values, likewise, without their biases; the caller adds b_v to the result.
        table_h, table_w: a vector for each relative position, [2 * window[0] - 1, d] and
            [2 * window[1] - 1, d].
        window: its height and width; (h, w) for attention to the whole grid.

    Returns:
        [b, h, w, heads, d] in the dtype of `v`; logits and statistics are in float32 at least.
    """
    rows = []
    for top, n_rows, height in _cuts(q.shape[1], window[0]):
        row = []
        for left, n_columns, width in _cuts(q.shape[2], window[1]):
            region = np.s_[:, top : top + n_rows * height, left : left + n_columns * width]
            q_, k_, v_ = (_to_windows(x[region], height, width) for x in (q, k, v))
            out = _attend_in_windows(q_, k_, v_, table_h, table_w, window)
            row.append(_from_windows(out, n_rows, n_columns))
        rows.append(jnp.concatenate(row, axis=2))
    return jnp.concatenate(rows, axis=1)


def _cuts(size: int, length: int) -> list[tuple[int, int, int]]:
    """(start, number, length) of the whole windows along an axis, and of the ragged one."""
    whole, rest = divmod(size, length)
    cuts = [(0, whole, length), (whole * length, 1, rest)]
    return [(start, number, length) for start, number, length in cuts if number and length]


def _to_windows(x: jax.Array, height: int, width: int) -> jax.Array:
    """[b, rows * height, columns * width, heads, d] -> [b * windows, heads, height, width, d]."""
    b, h, w, heads, d = x.shape
    x = x.reshape(b, h // height, height, w // width, width, heads, d)
    return x.transpose(0, 1, 3, 5, 2, 4, 6).reshape(-1, heads, height, width, d)


def _from_windows(x: jax.Array, n_rows: int, n_columns: int) -> jax.Array:
    """The inverse of `_to_windows`."""
    _, heads, height, width, d = x.shape
    x = x.reshape(-1, n_rows, n_columns, heads, height, width, d).transpose(0, 1, 4, 2, 5, 3, 6)
    return x.reshape(-1, n_rows * height, n_columns * width, heads, d)


def _attend_in_windows(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    table_h: jax.Array,
    table_w: jax.Array,
    window: tuple[int, int],
) -> jax.Array:
    """Attention in windows of one size, [n, heads, h, w, d], the upper left part of `window`."""
    n, heads, h, w, d = q.shape
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    dot = functools.partial(jnp.einsum, preferred_element_type=dtype)
    rel_h = dot("nchwd,hkd->nchwk", q, relative_positions(table_h, h, window[0]))
    rel_w = dot("nchwd,wkd->nchwk", q, relative_positions(table_w, w, window[1]))
    rel_h, rel_w = rel_h.reshape(n, heads, h * w, -1), rel_w.reshape(n, heads, h * w, -1)
    padding = None if (h, w) == window else padding_logsumexp(rel_h, rel_w, h, w)
    scaled, k, v = (x.reshape(n, heads, h * w, d) for x in (q * d**-0.5, k, v))
    return attend(scaled, k, v, rel_h[..., :h], rel_w[..., :w], padding).reshape(q.shape)


def relative_positions(table: jax.Array, queries: int, keys: int) -> jax.Array:
    """The vectors for query i and key j: a table [2 * keys - 1, d] -> [queries, keys, d].

    Row i - j + keys - 1, as in Meta's `get_rel_pos`.
    """
    index = np.arange(queries)[:, None] - np.arange(keys)[None, :] + keys - 1
    return table[index]


def padding_logsumexp(rel_h: jax.Array, rel_w: jax.Array, height: int, width: int) -> jax.Array:
    """Log of the sum of exp(rel_h[i] + rel_w[j]) over all (i, j) outside [0, height) x [0, width).

    rel_h, rel_w: [..., window]; returns [...]. The outside is two rectangles: the rows below (all
    columns), and the columns to the right of the real rows.
    """
    logsumexp = functools.partial(jax.nn.logsumexp, axis=-1)
    rectangles = []
    if height < rel_h.shape[-1]:
        rectangles.append(logsumexp(rel_h[..., height:]) + logsumexp(rel_w))
    if width < rel_w.shape[-1]:
        rectangles.append(logsumexp(rel_h[..., :height]) + logsumexp(rel_w[..., width:]))
    return functools.reduce(jnp.logaddexp, rectangles)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rel_h: jax.Array,
    rel_w: jax.Array,
    padding: jax.Array | None = None,
    *,
    max_logits: int = MAX_LOGITS,
) -> jax.Array:
    """Softmax attention whose logits have a term for the key's row and one for its column.

    Where there would be more than `max_logits` logits, some of the queries are done at a time, and
    the gradient computes their logits again; they never exist all at once.

    Args:
        q: scaled queries [n, heads, t, d].
        k, v: keys and values [n, heads, h * w, d].
        rel_h, rel_w: the terms, [n, heads, t, h] and [n, heads, t, w].
        padding: [n, heads, t], the logsumexp of the logits of further keys whose values are zero.

    Returns:
        [n, heads, t, d] in the dtype of `v`; logits and statistics are in that of `rel_h`.
    """
    n, heads, t, d = q.shape
    logits = n * heads * t * k.shape[2]
    chunks = next(c for c in range(1, t + 1) if t % c == 0 and (c == t or logits <= c * max_logits))
    if chunks == 1:
        return _attend(q, k, v, rel_h, rel_w, padding)

    def split(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(n, heads, chunks, t // chunks, *x.shape[3:]), 2, 0)

    @jax.checkpoint
    def one(chunk: tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]) -> jax.Array:
        q, rel_h, rel_w, padding = chunk
        return _attend(q, k, v, rel_h, rel_w, padding)

    parts = split(q), split(rel_h), split(rel_w), None if padding is None else split(padding)
    return jnp.moveaxis(jax.lax.map(one, parts), 0, 2).reshape(n, heads, t, d)


def _attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rel_h: jax.Array,
    rel_w: jax.Array,
    padding: jax.Array | None,
) -> jax.Array:
    dot = functools.partial(jnp.einsum, preferred_element_type=rel_h.dtype)
    logits = dot("nctd,ncsd->ncts", q, k)
    logits += (rel_h[..., :, None] + rel_w[..., None, :]).reshape(logits.shape)
    peak = logits.max(axis=-1)
    if padding is not None:
        peak = jnp.maximum(peak, padding)
    peak = jax.lax.stop_gradient(peak)
    weights = jnp.exp(logits - peak[..., None])
    total = weights.sum(axis=-1)
    if padding is not None:
        total += jnp.exp(padding - peak)
    out = dot("ncts,ncsd->nctd", weights.astype(v.dtype), v)
    return (out / total[..., None]).astype(v.dtype)
