"""The training step against a re-statement in torch: same weights, batches and noise, same losses.

The backbone is a ResNet-50 with fewer of its blocks, every number of the model is random, and the
settings let each part of objective and optimiser show in ten steps, which the planted differences
prove. Computed in float64 the two agree to 1e-7; what is seen here is float32's rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxear.backbones import resnet
from jaxear.config import TrainConfig
from jaxear.model import create_vae
from jaxear.training.batch import Resident, TrainBatch
from jaxear.training.optimizer import create_optimizer, create_schedule, rate_scales
from jaxear.training.packing import pack_factors
from jaxear.training.state import Leaves, Partition, Skeleton, create_state, split_model
from jaxear.training.step import make_train_step
from porting.resnet import TIMM
from porting.rules import torch_to_flax
from tests import torch_vae
from tests.torch_reference import calibrate, natural_images, numpy_state, randomize, torch

pytestmark = [pytest.mark.torch, pytest.mark.slow]

Change = Callable[[Any, Any], None]  # of the torch model and its optimiser
STEPS = 10
STEPS_PER_EPOCH = 3
TOLERANCE = 1e-4
DEPTHS = (1, 1, 2, 1)  # of the backbone's stages
CONFIG = TrainConfig(
    backbone="resnet50",
    weights="none",
    image_size=64,
    dtype="float32",
    latent_dim=16,
    head_width=256,
    decoder_channels=(32, 16, 8),
    ssim_weight=0.5,
    kl_weight=2.0,
    kl_warmup_epochs=2.0,
    batch_size=4,
    epochs=4,
    learning_rate=2e-4,  # the rounding errors that Adam lets grow, grow with it
    backbone_lr_scale=0.1,
    weight_decay=10.0,
    clip_norm=0.2,
    seed=3,
)


@dataclass(frozen=True)
class Ours:
    """What torch starts from, and the losses of the Flax model trained from the same."""

    leaves: dict[str, np.ndarray]
    batches: list[np.ndarray]
    noises: list[np.ndarray]
    losses: list[float]

    def in_torch(
        self, config: TrainConfig = CONFIG, change: Change | None = None
    ) -> Iterator[float]:
        """The losses of the re-statement, `change` applied to its model and optimiser first."""
        model = torch_vae.TorchVAE(config, torch_vae.create_backbone(layers=DEPTHS))
        model.load_flax(self.leaves)
        optimizer = torch_vae.create_optimizer(config, model)
        if change:
            change(model, optimizer)
        return torch_vae.train(config, model, optimizer, self.batches, self.noises, STEPS_PER_EPOCH)

    def notices(self, losses: Iterator[float]) -> bool:
        """Whether a loss is off by more than thrice what is allowed; the rest is not computed."""
        pairs = zip(losses, self.losses, strict=True)
        return any(abs(theirs / mine - 1) > 3 * TOLERANCE for theirs, mine in pairs)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Maps as small as these are several times as fast without torch's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="module")
def _fewer_blocks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resnet, "RESNET50", resnet.ResNetConfig(DEPTHS))
        yield


@pytest.fixture(scope="module")
def ours(_one_thread, _fewer_blocks) -> Ours:
    pixels = natural_images(CONFIG.batch_size * STEPS, 64, 64, seed=1).permute(0, 2, 3, 1).numpy()
    images = np.uint8(255 * np.clip(0.45 + 0.25 * pixels, 0, 1))
    batches = list(images.reshape(STEPS, CONFIG.batch_size, 64, 64, 3))
    skeleton, leaves = random_model()
    start = {name: np.asarray(value) for group in leaves for name, value in group.items()}
    return Ours(start, batches, noises(), train(skeleton, leaves, batches))


def random_model() -> tuple[Skeleton, Partition]:
    """The autoencoder with no number as it was initialised."""
    skeleton, leaves = split_model(create_vae(CONFIG, 64, rngs=nnx.Rngs(0), abstract=True))
    prefix = torch_vae.BACKBONE
    shapes = {
        name.removeprefix(prefix): value.shape
        for group in leaves
        for name, value in group.items()
        if name.startswith(prefix)
    }
    reference = calibrate(
        randomize(torch_vae.create_backbone(layers=DEPTHS)), natural_images(8, 64, 64)
    )
    backbone = torch_to_flax(TIMM, numpy_state(reference), shapes)
    rng = np.random.default_rng(0)

    def value(name: str, abstract: Any) -> jax.Array:
        if name.startswith(prefix):
            return jnp.asarray(backbone[name.removeprefix(prefix)])
        noise = rng.normal(size=abstract.shape)
        if name.endswith(".kernel"):
            noise /= np.sqrt(noise[..., 0].size)
        elif name == "encoder.head.logvar.bias":
            noise -= np.linspace(0, 16, noise.size)  # the last ones are clipped
        else:
            noise = 0.2 * noise + name.endswith(".scale")
        return jnp.asarray(noise, jnp.float32)

    def fill(group: Leaves) -> Leaves:
        return {name: value(name, abstract) for name, abstract in group.items()}

    return skeleton, Partition(*map(fill, leaves))


def noises() -> list[np.ndarray]:
    """What the training step draws: for each step and each place in the batch from its own key."""

    def draw(step: int, position: int) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(CONFIG.seed), step)
        return jax.random.normal(jax.random.fold_in(key, position), (CONFIG.latent_dim,))

    places = range(CONFIG.batch_size)
    return [np.stack([draw(step, place) for place in places]) for step in range(STEPS)]


def train(skeleton: Skeleton, leaves: Partition, batches: list[np.ndarray]) -> list[float]:
    schedule = create_schedule(CONFIG, STEPS_PER_EPOCH)
    scales = pack_factors(rate_scales(skeleton.model(*leaves), CONFIG), leaves.trainable)
    optimizer = create_optimizer(CONFIG, schedule, scales)
    step = jax.jit(make_train_step(CONFIG, skeleton, optimizer, schedule, STEPS_PER_EPOCH))
    state = create_state(leaves, optimizer)
    losses = []
    places = jnp.arange(CONFIG.batch_size)
    for images in batches:
        batch = TrainBatch(rows=places, positions=places, subjects=places, images=images)
        state, metrics = step(state, Resident(), batch)
        losses.append(float(metrics["loss"]))
    return losses


def test_ten_steps_follow_torch(ours):
    np.testing.assert_allclose(list(ours.in_torch()), ours.losses, rtol=TOLERANCE)
    assert np.ptp(ours.losses) > 100 * TOLERANCE * max(ours.losses)


def decay_everything(model: Any, optimizer: Any) -> None:
    for group in optimizer.param_groups:
        group["weight_decay"] = CONFIG.weight_decay


def batch_statistics(model: Any, optimizer: Any) -> None:
    model.backbone.train()


@pytest.mark.parametrize("change", [decay_everything, batch_statistics])
def test_a_planted_difference_is_noticed(ours, change):
    assert ours.notices(ours.in_torch(change=change))


@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": 0.0},
        {"backbone_lr_scale": 1.0},
        {"kl_warmup_epochs": 1.0},
        {"clip_norm": 1e6},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_another_setting_is_noticed(ours, changes):
    assert ours.notices(ours.in_torch(replace(CONFIG, **changes)))
