"""What the families share: blocks in stages, and features that are taken between them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class StagedEncoder(nnx.Module):
    """An encoder that runs stages of blocks one after the other; see `base.Encoder`.

    A family adds `feature_info`, `maps`, and a `classifier` on top if it is asked for one.

    Attributes:
        config: the architecture; `config.depths` are the blocks per stage.
        remat: whether the gradient computes activations within a block again (see `run`).
        stem: the modules before the first stage.
        body: what the names of the stages' modules begin with.
    """

    classifier: Callable[[jax.Array], jax.Array]
    stem: tuple[str, ...] = ()
    body: str = "stages"

    def __init__(self, config: Any, *, remat: bool):
        self.config = config
        self.remat = remat

    @property
    def n_blocks(self) -> int:
        return sum(self.config.depths)

    def block_index(self, path: tuple[str | int, ...]) -> int:
        """The depth of the parameter at `path`: 0 stem, 1 .. n_blocks, n_blocks + 1 beyond.

        What a stage does before its blocks counts with the first of them.
        """
        if path[0] in self.stem:
            return 0
        if path[0] != self.body:
            return self.n_blocks + 1
        stage, block, *_ = (*(int(part) for part in path if str(part).isdigit()), 0)
        return 1 + sum(self.config.depths[:stage]) + block

    def maps(self, x: jax.Array) -> Iterator[tuple[str, jax.Array]]:
        """Yield (name, feature map) from shallow to deep, each computed when it is asked for."""
        raise NotImplementedError

    def run(self, blocks: Iterable[Any], x: jax.Array) -> jax.Array:
        """One block after the other."""
        for block in blocks:
            x = run(block, x, remat=self.remat)
        return x

    def features(self, x: jax.Array, names: tuple[str, ...]) -> tuple[jax.Array, ...]:
        return take(self.maps(x), names)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.features(x, ("last",))[0]

    def logits(self, x: jax.Array) -> jax.Array:
        """Normalised images [b, h, w, 3] -> [b, classes]; needs `classifier=True`."""
        return self.classifier(self(x))


class PooledLinear(nnx.Linear):
    """A linear layer on the mean over the image: features [b, h, w, c] -> logits [b, classes]."""

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]
        return super().__call__(jnp.mean(x, (1, 2)))


def _call(block: Any, x: jax.Array) -> jax.Array:
    return block(x)


def run(
    block: Any,
    x: jax.Array,
    *,
    remat: bool,
    call: Callable[[Any, jax.Array], jax.Array] = _call,
) -> jax.Array:
    """`call(block, x)`; with `remat` the gradient computes what is within it from x again.

    That costs about one more forward pass and saves most of what is kept between the passes (Chen
    et al. 2016, "Training Deep Nets with Sublinear Memory Cost"). BatchNorm's statistics move once,
    as without.
    """
    if not remat:
        graph, params, rest = nnx.split(block, nnx.Param, ...)
        # What a call may change has to be changed in the block itself.
        y = call(block, x) if jax.tree.leaves(rest) else _traced_once(graph, call, params, x)
        return computed_once(y, block)
    if jax.default_backend() == "cpu":
        return _remat_on_cpu(call, block, x)
    return nnx.remat(call)(block, x)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _traced_once(
    graph: Any, call: Callable[[Any, jax.Array], jax.Array], params: nnx.State, x: jax.Array
) -> jax.Array:
    """`call` of a block taken apart. JAX traces it once for all blocks that are alike, and for
    their gradients; XLA puts it in everywhere, so that the program is the same.
    """
    return call(nnx.merge(graph, params), x)


def computed_once(x: jax.Array, block: nnx.Module) -> jax.Array:
    """x, which `block` has computed and of which much will be made; and so its cotangent.

    XLA on CPU takes sums and activations for cheap enough to do again wherever they are used. Along
    a network's shortcuts each sum has all those before it in it, so that the gradient, which uses
    each several times, reads dozens of arrays to make one. Out of a branch nothing is drawn into
    what follows. Other backends keep such values by themselves.
    """
    if jax.default_backend() != "cpu":
        return x
    number = min(jax.tree.leaves(nnx.state(block, nnx.Param)), key=jnp.size).ravel()[0]
    # A number equals itself unless it is NaN, which XLA cannot know before.
    return jax.lax.cond(number == number, lambda x: x, lambda x: jnp.full_like(x, jnp.nan), x)


def _remat_on_cpu(
    call: Callable[[Any, jax.Array], jax.Array], block: Any, x: jax.Array
) -> jax.Array:
    """`nnx.remat`, which gains nothing on a CPU: XLA drops its barriers there, sees that the second
    computation is the first, and keeps the activations after all. Into a branch it does not look.
    """
    graph, params, rest = nnx.split(block, nnx.Param, ...)

    def apply(params: nnx.State, rest: nnx.State, x: jax.Array) -> tuple[jax.Array, nnx.State]:
        # New variables, which may be changed wherever this is traced.
        block = nnx.merge(graph, *jax.tree.map(lambda leaf: leaf, (params, rest)))
        y = call(block, x)
        return y, nnx.state(block, nnx.Not(nnx.Param))

    def forward(params: nnx.State, rest: nnx.State, x: jax.Array) -> tuple[Any, Any]:
        return apply(params, rest, x), (params, rest, x)

    def backward(inputs: Any, cotangents: tuple[jax.Array, Any]) -> tuple[Any, None, jax.Array]:
        params, rest, x = inputs

        def again(params: nnx.State, x: jax.Array, cotangent: jax.Array) -> tuple[Any, jax.Array]:
            _, pull_back = jax.vjp(lambda params, x: apply(params, rest, x)[0], params, x)
            return pull_back(cotangent)

        def nowhere(params: nnx.State, x: jax.Array, _: jax.Array) -> tuple[Any, jax.Array]:
            return jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), (params, x))

        # A number equals itself unless it is NaN, which XLA cannot know before.
        number = jax.tree.leaves(params)[0].ravel()[0]
        found = jax.lax.cond(number == number, again, nowhere, params, x, cotangents[0])
        return found[0], None, found[1]

    rematerialized = jax.custom_vjp(apply)
    rematerialized.defvjp(forward, backward)
    y, moved = rematerialized(params, rest, x)
    nnx.update(block, moved)
    return y


def take(maps: Iterable[tuple[str, jax.Array]], names: tuple[str, ...]) -> tuple[jax.Array, ...]:
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
