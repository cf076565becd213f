"""From the scores of many principal components to a code of a few numbers, and back."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

DROPOUT = 0.25
NOISE = 0.1  # standard deviation of what is added to a code in training; scores have 1
_REFINEMENTS = 8  # steps of conjugate gradients, each a pass forward and one back
_DAMPING = 1e-3


class ScoreAutoencoder(nnx.Module):
    """Scores [b, k], of variance 1, of uncorrelated components -> code [b, d] -> scores [b, k].

    Linear where it starts: the code is the first d scores, and the further ones are 0.

    Args:
        n_scores: k.
        code_dim: d, k at most.
        width: units in each of the two hidden layers of either half.
        rngs: the source of the initialisation.
    """

    def __init__(self, n_scores: int, code_dim: int, *, width: int, rngs: nnx.Rngs):
        self.code_dim = code_dim
        self.encoder = _Correction(n_scores, code_dim, width, rngs)
        self.decoder = _Correction(code_dim, n_scores, width, rngs)

    def encode(self, scores: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Scores [b, k] -> code [b, d]. With a key hidden units are dropped, as in training."""
        return scores[:, : self.code_dim] + self.encoder(scores, key)

    def decode(self, code: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Code [b, d] -> scores [b, k], likewise."""
        further = self.decoder.out.out_features - self.code_dim
        return jnp.pad(code, ((0, 0), (0, further))) + self.decoder(code, key)

    def fit_code(self, scores: jax.Array, deviations: jax.Array) -> jax.Array:
        """The code [b, d] that `decode` makes scores [b, k] of, nearly: where `encode` sees it, and
        one Gauss-Newton step from there.

        Args:
            scores: [b, k].
            deviations: of the components [k]; a component counts for as much as it varies.
        """
        n_first = self.code_dim
        start = self.encode(scores) * deviations[:n_first]

        def refined(start: jax.Array, target: jax.Array) -> jax.Array:
            def decoded(code: jax.Array) -> jax.Array:
                return self.decode((code / deviations[:n_first])[None])[0] * deviations

            made, along = jax.linearize(decoded, start)
            back = jax.linear_transpose(along, start)
            (gradient,) = back(target - made)
            step, _ = jax.scipy.sparse.linalg.cg(
                lambda x: back(along(x))[0] + _DAMPING * x, gradient, maxiter=_REFINEMENTS
            )
            # The step counts on a decoder that is straight: half of it, or none, may be better.
            sizes = jnp.array([1.0, 0.5, 0.0])
            error = jax.vmap(lambda size: jnp.sum((decoded(start + size * step) - target) ** 2))
            return start + sizes[jnp.argmin(error(sizes))] * step

        return jax.vmap(refined)(start, scores * deviations) / deviations[:n_first]


class _Correction(nnx.Module):
    """Numbers [b, m] -> [b, n], 0 at first: two hidden layers, the second with a way around it."""

    def __init__(self, n_in: int, n_out: int, width: int, rngs: nnx.Rngs):
        init = nnx.initializers.he_normal()
        self.hidden = nnx.List(
            [nnx.Linear(n, width, kernel_init=init, rngs=rngs) for n in (n_in, width)]
        )
        self.out = nnx.Linear(width, n_out, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        keys = (None, None) if key is None else jax.random.split(key)
        first = _dropout(nnx.silu(self.hidden[0](x)), keys[0])
        second = _dropout(nnx.silu(self.hidden[1](first)), keys[1])
        # The scale keeps the first steps of the training small.
        return 0.3 * self.out(first + second)


def _dropout(x: jax.Array, key: jax.Array | None) -> jax.Array:
    if key is None:
        return x
    kept = jax.random.bernoulli(key, 1 - DROPOUT, x.shape)
    return jnp.where(kept, x / (1 - DROPOUT), 0.0)
