"""Rates by a parameter's place in the model, and the settings of the optimiser."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxear.config import TrainConfig, validate
from jaxear.errors import UserError
from jaxear.model import create_vae
from jaxear.training.optimizer import create_optimizer, rate_scales, trainable_parameters
from jaxear.training.state import split_model
from tests.training.tiny import TINY_SAM

CONFIG = TrainConfig(
    backbone="sam",
    weights="none",
    image_size=32,
    latent_dim=8,
    head_width=64,
    decoder_channels=(16, 8),
    backbone_options=TINY_SAM,
    backbone_lr_scale=0.1,
    layer_decay=0.5,
)


def scales(config: TrainConfig) -> dict[str, float]:
    model = create_vae(config, 32, rngs=nnx.Rngs(0), abstract=True)
    return rate_scales(model, config)


def below(rates: dict[str, float], prefix: str) -> set[float]:
    return {rate for name, rate in rates.items() if name.startswith(prefix)}


def test_rates_fall_towards_the_stem():
    rates = scales(CONFIG)
    assert below(rates, "decoder.") == below(rates, "encoder.head.") == {1}
    sam = "encoder.backbone.encoder."
    assert below(rates, sam + "neck.") == {0.1}
    assert below(rates, sam + "blocks.1.") == {0.05}
    assert below(rates, sam + "blocks.0.") == {0.025}
    assert below(rates, sam + "p") == {0.0125}  # patch_embed and pos_embed


def test_without_layer_decay_the_backbone_has_one_rate():
    rates = scales(dataclasses.replace(CONFIG, layer_decay=1.0))
    assert below(rates, "encoder.backbone.") == {0.1}
    assert below(rates, "decoder.") == below(rates, "encoder.head.") == {1}


def test_each_backbone_of_a_hybrid_counts_its_own_blocks():
    options = {"backbones": ["sam", "vgg16"], "sam": TINY_SAM}
    rates = scales(dataclasses.replace(CONFIG, backbone="hybrid", backbone_options=options))
    sam, vgg = (f"encoder.backbone.backbones.{i}.encoder." for i in (0, 1))
    assert below(rates, sam + "blocks.1.") == {0.05}
    assert below(rates, vgg + "stages.4.2.") == {0.05}
    assert below(rates, vgg + "stages.0.0.") == {0.1 * 0.5**13}
    assert below(rates, "decoder.") == {1}


@pytest.mark.parametrize(
    "changes", [{}, {"features": ["stage1", "last"]}, {"pixel_components": 16}]
)
def test_what_moves_is_all_that_a_reconstruction_depends_on(changes):
    config = dataclasses.replace(CONFIG, **changes)
    model = create_vae(config, 32, rngs=nnx.Rngs(0), abstract=True)
    skeleton, leaves = split_model(model)
    arrays = {**leaves.trainable, **leaves.frozen, **leaves.buffers}

    def forward(arrays, images):
        model = skeleton.model(arrays)
        mu, logvar = model.encode(images)
        return mu, logvar, model.decode(mu)

    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    exported = jax.export.export(jax.jit(forward), platforms=["cpu"])(arrays, images)
    names = sorted(arrays)
    read = {names[i] for i in exported.module_kept_var_idx if i < len(names)}
    learnt = {name for name in leaves.trainable if not name.startswith("pixels.")}
    assert trainable_parameters(model, "none", 32) == read & learnt
    assert learnt - read  # the neck, or what is deeper than the features


def test_an_update_is_scaled_by_its_rate():
    start = {"encoder.a.kernel": jnp.ones(3), "decoder.b.kernel": jnp.ones(3)}

    def updates(scales: dict[str, float] | None) -> dict[str, jax.Array]:
        optimizer = create_optimizer(CONFIG, optax.constant_schedule(0.1), scales)
        return optimizer.update(start, optimizer.init(start), start)[0]

    plain = updates(None)
    scaled = updates({"encoder.a.kernel": 0.25, "decoder.b.kernel": 1.0})
    np.testing.assert_allclose(scaled["encoder.a.kernel"], 0.25 * plain["encoder.a.kernel"])
    np.testing.assert_allclose(scaled["decoder.b.kernel"], plain["decoder.b.kernel"])
    assert (plain["encoder.a.kernel"] < -0.05).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_decay": 0.0},
        {"layer_decay": 1.1},
        {"ema_decay": 1.0},
        {"ema_decay": -0.1},
        {"accumulate": 0},
        {"batch_size": 10, "accumulate": 4},
        {"max_bad_steps": 0},
        {"patience": -1},
        {"keep_best": 0},
        {"contrastive_temperature": 0.0},
        {"occlusion_weight": -1.0},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_settings_that_cannot_work_are_refused(changes):
    validate(CONFIG)
    with pytest.raises(UserError, match=list(changes)[-1]) as error:
        validate(dataclasses.replace(CONFIG, **changes))
    assert str(error.value).count("\n") == 1
