import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxear.backbones import create_backbone
from jaxear.errors import UserError
from jaxear.vae import (
    Decoder,
    EarVAE,
    LatentEncoder,
    ResidualBlock,
    UpsampleConv,
    create_head,
    feature_shapes,
    reparameterize,
)

FLOAT = jnp.float32


def small_vae(image_size=(32, 32), **kwargs):
    return nnx.jit(lambda rngs: build(rngs, image_size, **kwargs))(nnx.Rngs(0))


def build(rngs, image_size, **kwargs):
    backbone = create_backbone(
        "sam", image_size=image_size, weights="none", rngs=rngs,
        **{"depth": 1, "embed_dim": 16, "num_heads": 2, "global_attn_indexes": [0], **kwargs},
    )  # fmt: skip
    shapes = feature_shapes(backbone, image_size)
    encoder = LatentEncoder(backbone, create_head(shapes, 8, width=64, dtype=FLOAT, rngs=rngs))
    decoder = Decoder(8, image_size=image_size, channels=(16, 8), dtype=FLOAT, rngs=rngs)
    return EarVAE(encoder, decoder, latent_dim=8)


@pytest.mark.parametrize("shape", [(1, 4, 4, 3), (2, 5, 7, 6)])
def test_upsampling_by_phases_equals_nearest_then_convolution(shape):
    layer = UpsampleConv(shape[-1], 5, dtype=FLOAT, rngs=nnx.Rngs(1))
    layer.conv.bias.set_value(jnp.arange(5.0))
    x = jax.random.normal(jax.random.key(0), shape)
    plain = layer.conv(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))
    np.testing.assert_allclose(layer(x), plain, atol=1e-5)


def test_residual_block_starts_as_the_identity():
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 8))
    np.testing.assert_array_equal(ResidualBlock(8, dtype=FLOAT, rngs=nnx.Rngs(0))(x), x)


@pytest.mark.parametrize("size", [(32, 32), (32, 48)])
def test_shapes_and_ranges(size):
    images = jax.random.uniform(jax.random.key(1), (3, *size, 3))

    @nnx.jit
    def run(model, images):
        mu, logvar = model.encode(images)
        output = model(images, jax.random.key(3))
        decoded = model.decode(jnp.concatenate([mu, output.z]))
        sample = model.sample(2, jax.random.key(2))
        return mu, logvar, decoded, model.reconstruct(images), sample, output.reconstruction

    mu, logvar, decoded, reconstructed, sample, trained = run(small_vae(size), images)
    assert mu.shape == logvar.shape == (3, 8)
    assert reconstructed.shape == trained.shape == images.shape
    assert sample.shape == (2, *size, 3)
    assert 0 <= decoded.min() <= decoded.max() <= 1
    np.testing.assert_allclose(reconstructed, decoded[:3], atol=1e-6)
    np.testing.assert_allclose(trained, decoded[3:], atol=1e-6)


@nnx.jit
def means(model, images):
    return model.encode(images)[0]


def test_the_code_depends_on_where_things_are():
    image = jnp.zeros((1, 32, 32, 3)).at[:, :16, :16].set(1.0)
    there, here = means(small_vae(), jnp.concatenate([image, image[:, ::-1]]))
    assert jnp.abs(there - here).max() > 1e-3


def test_reparameterize_draws_from_the_posterior():
    mu, logvar = jnp.full((20000, 1), 2.0), jnp.full((20000, 1), jnp.log(0.25))
    z = reparameterize(mu, logvar, jax.random.normal(jax.random.key(0), mu.shape))
    assert abs(z.mean() - 2.0) < 0.02
    assert abs(z.std() - 0.5) < 0.02


@pytest.mark.parametrize(
    ("size", "channels", "message"),
    [((36, 36), (16, 8, 8, 8), "multiple of 8"), ((32, 32), (20, 12), "multiples of 8")],
)
def test_decoder_refuses_what_it_cannot_build(size, channels, message):
    with pytest.raises(UserError, match=message):
        Decoder(8, image_size=size, channels=channels, dtype=FLOAT, rngs=nnx.Rngs(0))


def test_several_feature_maps_are_fused():
    model = small_vae(depth=2, global_attn_indexes=[0, 1], features=["stage1", "last"])
    images = jax.random.uniform(jax.random.key(1), (2, 32, 32, 3))
    mu = means(model, images)
    assert mu.shape == (2, 8)
    # Both maps reach every latent dimension
    for head in model.encoder.head.heads:
        bias = head.mu.bias
        before = bias[...]
        bias.set_value(before + 1.0)
        assert (jnp.abs(means(model, images) - mu) > 1e-4).all()
        bias.set_value(before)


def test_fusion_wants_equal_shares():
    with pytest.raises(UserError, match="multiple of 2"):
        create_head([(2, 2, 4), (1, 1, 8)], 7, width=8, dtype=FLOAT, rngs=nnx.Rngs(0))
