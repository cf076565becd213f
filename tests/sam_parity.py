"""SAM in Flax beside Meta's code, the same weights and images: activations and gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxear.backbones.sam import SamConfig, SamEncoder, adapt
from jaxear.backbones.weights import fill, named_leaves
from porting.rules import flax_to_torch, torch_to_flax
from porting.sam import ENCODER_TABLE, leaf_shapes
from porting.sam_torch import torch_activations, torch_encoder
from porting.verify import ParityReport, compare
from tests.torch_reference import numpy_state, randomize, relative_error, torch

State = dict[str, np.ndarray]


def meta_state(config: SamConfig, image_size: tuple[int, int]) -> State:
    """A random state dict of Meta's encoder, its tables for `image_size`."""
    shapes = leaf_shapes(config, image_size)
    zeros = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    model = torch_encoder(
        config,
        flax_to_torch(ENCODER_TABLE, zeros),
        native_size=image_size,
        image_size=image_size,
    )
    return numpy_state(randomize(model))


def cast(state: State, dtype) -> State:
    return {name: value.astype(dtype) for name, value in state.items()}


def images(image_size, dtype=np.float32, batch=2) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(batch, *image_size, 3)).astype(dtype)


def flax_encoder(config, leaves, image_size, dtype=jnp.float32) -> SamEncoder:
    """The encoder for an image size, with the leaves adapted to it."""
    encoder = nnx.eval_shape(
        lambda: SamEncoder(config, image_size, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
    )
    fill(encoder, adapt(leaves, encoder), source="the test")
    return encoder


def flax_activations(encoder: SamEncoder, x: np.ndarray) -> dict[str, jax.Array]:
    graph, state = nnx.split(encoder)
    return jax.jit(lambda state, x: nnx.merge(graph, state).intermediates(x))(state, x)


def parity(
    config: SamConfig,
    state: State,
    image_size: tuple[int, int],
    *,
    native: tuple[int, int],
    dtype=np.float32,
    tolerance: float = 1e-5,
    encoder: SamEncoder | None = None,
    batch: int = 2,
) -> ParityReport:
    """Every activation at `image_size`, of `encoder` or of the port of `state` (Meta's names)."""
    x = images(image_size, dtype, batch)
    state = cast(state, dtype)
    model = torch_encoder(config, state, native_size=native, image_size=image_size)
    reference = torch_activations(model, x)
    if encoder is None:
        leaves = torch_to_flax(ENCODER_TABLE, state, leaf_shapes(config, native))
        encoder = flax_encoder(config, leaves, image_size, dtype)
    return compare(reference, reference, flax_activations(encoder, x), tolerance=tolerance)


def gradient_errors(encoder: SamEncoder) -> dict[str, float]:
    """Relative errors of a float64 encoder's gradients, by Meta's names, and "input".

    The true gradient of the keys' biases is zero, and ours must be so exactly; what is given for
    them, "qkv.bias of k", is torch's own rounding noise, an absolute number.
    """
    config, image_size = encoder.config, encoder.image_size
    leaves = {name: np.asarray(leaf[...]) for name, leaf in named_leaves(encoder).items()}
    model = torch_encoder(
        config,
        flax_to_torch(ENCODER_TABLE, leaves),
        native_size=image_size,
        image_size=image_size,
    )
    x = images(image_size, np.float64, batch=1)
    weights = np.random.default_rng(1).normal(size=(1, *encoder.grid, config.out_channels))
    x_torch = torch.from_numpy(x).requires_grad_()
    out = model(x_torch.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    (out * torch.from_numpy(weights)).sum().backward()
    graph, state = nnx.split(encoder)

    def loss(state, x):
        return jnp.sum(nnx.merge(graph, state)(x) * weights)

    gradients, gradient_x = jax.jit(jax.grad(loss, argnums=(0, 1)))(state, x)
    assert x_torch.grad is not None
    errors = {"input": relative_error(gradient_x, x_torch.grad.numpy())}
    flat = {
        ".".join(map(str, path)): np.asarray(gradient[...])
        for path, gradient in nnx.to_flat_state(gradients)
    }
    ours = flax_to_torch(ENCODER_TABLE, flat)
    for name, parameter in model.named_parameters():
        gradient, expected = ours.pop(name), parameter.grad.numpy()
        if name.endswith("qkv.bias"):
            (q, k, v), (q_, k_, v_) = np.split(gradient, 3), np.split(expected, 3)
            assert not k.any(), name
            errors[f"{name} of k"] = float(np.abs(k_).max())
            gradient, expected = np.stack([q, v]), np.stack([q_, v_])
        errors[name] = relative_error(gradient, expected)
    assert not ours
    return errors
