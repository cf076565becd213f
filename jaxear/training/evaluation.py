"""Validation of a training state."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxear import figures
from jaxear.config import TrainConfig
from jaxear.data.pipeline import padded_batches
from jaxear.metrics import negative_elbo
from jaxear.training.sharding import Parallel
from jaxear.training.state import TrainState
from jaxear.training.step import EvalStep


def evaluate_images(
    eval_step: EvalStep,
    state: TrainState,
    images: np.ndarray,
    parallel: Parallel,
    config: TrainConfig,
) -> tuple[dict[str, float], np.ndarray]:
    """Mean metrics over images uint8 [n, h, w, 3], and a picture of some reconstructions.

    Every process of a run gives all images, computes its share and gets the whole result.

    Returns:
        val_psnr (dB), val_ssim, val_edge, val_kl (nats), val_mse, val_bits (bits per number, the
        negative evidence lower bound at the best pixel variance); the picture, uint8 [H, W, 3].
    """
    collected: dict[str, list[np.ndarray]] = {}
    reconstructed = np.empty(images.shape, np.float32)
    done = 0
    share = config.batch_size // jax.process_count()
    mine = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
    for batch, n in padded_batches(images, config.batch_size):
        result = eval_step(state, parallel.put_batch(batch[mine]))
        metrics, reconstructions = parallel.collect(result)
        for name, values in metrics.items():
            collected.setdefault(name, []).append(values[:n])
        reconstructed[done : done + n] = reconstructions[:n]
        done += n
    means = {name: float(np.mean(np.concatenate(v))) for name, v in collected.items()}
    bits = negative_elbo(jnp.asarray(means["mse"]), jnp.asarray(means["kl"]), images[0].size)
    means["bits"] = float(bits)
    # Spread over the split, which is in order of subjects
    shown = np.linspace(0, len(images) - 1, min(config.sample_images, len(images))).astype(int)
    grid = figures.reconstruction_grid(images[shown], reconstructed[shown])
    return {f"val_{name}": value for name, value in means.items()}, grid
