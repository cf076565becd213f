import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from jaxear import metrics


@pytest.fixture
def pair():
    """Four smooth images and four noisy versions of them."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:48, 0:40] / 40
    phase = rng.uniform(0, 6, (4, 1, 1, 3))
    images = 0.5 + 0.4 * np.sin(6 * x[None, ..., None] + 9 * y[None, ..., None] + phase)
    noisy = np.clip(images + rng.normal(0, 0.1, images.shape), 0, 1)
    return noisy.astype(np.float32), images.astype(np.float32)


def test_psnr_is_scikit_images(pair):
    expected = [peak_signal_noise_ratio(r, x, data_range=1) for x, r in zip(*pair, strict=True)]
    np.testing.assert_allclose(metrics.psnr(*pair), expected, rtol=1e-5)


def test_ssim_is_scikit_images(pair):
    expected = [
        structural_similarity(
            r, x, channel_axis=-1, data_range=1, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False,
        )
        for x, r in zip(*pair, strict=True)
    ]  # fmt: skip
    np.testing.assert_allclose(metrics.ssim(*pair), expected, atol=2e-6)


def test_ssim_of_flat_images_has_finite_gradients():
    flat = jnp.full((1, 16, 16, 3), 0.5)
    gradient = jax.jit(jax.grad(lambda x: metrics.ssim(x, flat + 0.1).sum()))(flat)
    assert jnp.isfinite(gradient).all()
    assert jnp.abs(gradient).max() < 1


def test_ssim_refuses_images_smaller_than_its_window():
    with pytest.raises(ValueError, match="11x11"):
        metrics.ssim(jnp.zeros((1, 8, 16, 3)), jnp.zeros((1, 8, 16, 3)))


def plain_ms_ssim(x, y, scales):
    """As pytorch-msssim and TensorFlow compute it, restated in numpy for one pair [h, w, c]."""
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets**2) / (2 * 1.5**2))
    window /= window.sum()

    def blur(z):
        rows = np.apply_along_axis(np.convolve, 0, z, window, mode="valid")
        return np.apply_along_axis(np.convolve, 1, rows, window, mode="valid")

    exponents = [0.0448, 0.2856, 0.3001, 0.2363, 0.1333]
    share = sum(exponents) / sum(exponents[:scales])
    result = 1.0
    for scale in range(scales):
        if scale:
            x, y = (z[::2] + z[1::2] for z in (x, y))
            x, y = ((z[:, ::2] + z[:, 1::2]) / 4 for z in (x, y))
        mx, my = blur(x), blur(y)
        sx, sy, sxy = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
        term = (2 * sxy + 0.03**2) / (sx + sy + 0.03**2)
        if scale == scales - 1:
            term = term * (2 * mx * my + 0.01**2) / (mx**2 + my**2 + 0.01**2)
        result = result * np.maximum(term.mean(axis=(0, 1)), 0) ** (exponents[scale] * share)
    return result.mean()


@pytest.mark.parametrize(("repeats", "scales"), [((1, 1), 2), ((2, 4), 4), ((5, 6), 5)])
def test_ms_ssim_is_the_plain_formula(pair, repeats, scales):
    noisy, images = (np.tile(z[:2], (1, *repeats, 1)) for z in pair)
    expected = [
        plain_ms_ssim(x.astype(np.float64), y.astype(np.float64), scales)
        for x, y in zip(noisy, images, strict=True)
    ]
    np.testing.assert_allclose(jax.jit(metrics.ms_ssim)(noisy, images), expected, atol=5e-6)
    assert max(expected) < 0.99


def test_ms_ssim_leaves_out_an_odd_last_row_when_it_halves(pair):
    noisy, images = (z[:, :33, :31] for z in pair)
    halved = jax.jit(metrics.ms_ssim)(noisy, images)
    assert jnp.isfinite(halved).all()
    assert halved.shape == (4,)


def test_ms_ssim_of_small_images_is_ssim(pair):
    noisy, images = (z[:, :21, :40] for z in pair)
    np.testing.assert_allclose(
        metrics.ms_ssim(noisy, images), metrics.ssim(noisy, images), rtol=1e-3
    )
    with pytest.raises(ValueError, match="11x11"):
        metrics.ms_ssim(noisy[:, :10], images[:, :10])


def test_ms_ssim_of_opposite_images_is_zero(pair):
    _, images = pair
    np.testing.assert_array_equal(jax.jit(metrics.ms_ssim)(1 - images, images), 0)


def test_edge_preservation_falls_as_edges_go(pair):
    _, images = pair
    blurred = images
    kept = [float(metrics.edge_preservation(images, images).mean())]
    for _ in range(2):
        blurred = (blurred + np.roll(blurred, 6, 1) + np.roll(blurred, 6, 2)) / 3
        kept.append(float(metrics.edge_preservation(blurred, images).mean()))
    assert kept[0] == pytest.approx(1, abs=1e-5)
    assert kept[0] > kept[1] > kept[2]
    inverted = metrics.edge_preservation(1 - images, images)
    np.testing.assert_allclose(inverted, -1, atol=1e-5)
    np.testing.assert_allclose(metrics.edge_preservation(images * 0, images), 0)


def test_sobel_of_a_ramp_is_its_slope():
    ramp = jnp.broadcast_to(jnp.arange(8.0)[None, None, :, None] * 0.1, (1, 6, 8, 3))
    horizontal, vertical = metrics.sobel(ramp)
    np.testing.assert_allclose(horizontal, 0.1, atol=1e-6)
    np.testing.assert_allclose(vertical, 0, atol=1e-6)


def test_kl_is_the_integral():
    mu, sigma = 0.7, 0.4
    z = np.linspace(-12, 12, 200001)
    q, p = norm.logpdf(z, mu, sigma), norm.logpdf(z)
    integral = np.trapezoid(np.exp(q) * (q - p), z)
    ours = metrics.kl_per_dimension(jnp.asarray([[mu]]), jnp.asarray([[2 * np.log(sigma)]]))
    np.testing.assert_allclose(ours, integral, rtol=1e-5)


def test_negative_elbo_is_the_gaussian_likelihood_at_its_best_variance():
    rng = np.random.default_rng(0)
    errors = rng.normal(0, 0.07, (5, 1000))
    mse, kl = np.mean(errors**2), 12.0
    nats = -norm.logpdf(errors, 0, np.sqrt(mse)).sum(axis=1).mean() + kl
    ours = metrics.negative_elbo(jnp.asarray(mse), jnp.asarray(kl), 1000)
    np.testing.assert_allclose(ours, nats / 1000 / np.log(2), rtol=1e-5)


def test_active_units_counts_dimensions_that_vary():
    mu = np.random.default_rng(0).normal(0, [1.0, 0.5, 0.01, 0.0], (500, 4))
    assert metrics.active_units(jnp.asarray(mu)) == 2
