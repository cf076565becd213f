"""Eigenears: the principal directions of a model's latent codes, decoded to pictures.

As a library: `EigenEars.fit(model, images)`. As a command: `jaxear eigenears --run runs/NAME`.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxear import figures
from jaxear.command import run_command
from jaxear.data.pipeline import load_split
from jaxear.errors import UserError
from jaxear.inference import decode_codes, encode_images
from jaxear.model import load_config, load_model
from jaxear.options import Parser
from jaxear.pca import PCA
from jaxear.training.logging import write_json
from jaxear.vae import EarVAE

logger = logging.getLogger(__name__)

FORMAT = "jaxear-eigenears-1"


class EigenEars:
    """The principal directions in which the codes of ears vary.

    Made by `fit` or `load`. A score is a code's coordinate on a component in standard deviations of
    the ears that it was fitted to: 0 is the mean ear, -2 and +2 lie near the ends of what is usual.

    Attributes:
        model: the model that encodes and decodes.
        mean_: the mean code [d].
        components_: unit vectors of the codes' space, one per component [k, d].
        explained_variance_: variance of the codes along each [k].
        explained_variance_ratio_: the same as a share of the codes' total variance [k].
        n_samples_: how many ears it was fitted to.
    """

    def __init__(self, model: EarVAE, arrays: dict[str, np.ndarray], n_samples: int):
        self.model = model
        self.mean_ = arrays["mean"]
        self.components_ = arrays["components"]
        self.explained_variance_ = arrays["explained_variance"]
        self.explained_variance_ratio_ = arrays["explained_variance_ratio"]
        self.n_samples_ = n_samples

    @property
    def n_components(self) -> int:
        return len(self.components_)

    @classmethod
    def fit(cls, model: EarVAE, images: np.ndarray, n_components: int = 16) -> EigenEars:
        """Principal components of the mean codes of images.

        Args:
            model: a trained model.
            images: [n, H, W, 3], uint8 or floats in [0, 1], prepared as for training.
            n_components: how many to keep.

        Raises:
            UserError: fewer images, or latent dimensions, than components.
        """
        images = np.asarray(images)
        available = min(len(images) - 1, model.latent_dim)
        if not 1 <= n_components <= available:
            raise UserError(
                f"{n_components} components cannot be had from {len(images)} images and codes of "
                f"{model.latent_dim} numbers; ask for {max(available, 1)} at most."
            )
        codes, _ = encode_images(model, images)
        pca = PCA(n_components=n_components).fit(codes)
        arrays = {
            "mean": pca.mean_,
            "components": pca.components_,
            "explained_variance": pca.explained_variance_,
            "explained_variance_ratio": pca.explained_variance_ratio_,
        }
        return cls(model, {k: np.asarray(v, np.float32) for k, v in arrays.items()}, len(images))

    def project(self, images: np.ndarray) -> np.ndarray:
        """Images [n, H, W, 3] -> scores [n, k] in standard deviations."""
        codes, _ = encode_images(self.model, np.asarray(images))
        return (codes - self.mean_) @ self.components_.T / self._deviations

    def synthesize(self, scores: np.ndarray) -> np.ndarray:
        """Scores [n, k] (k or fewer, the rest being 0) -> images [n, H, W, 3] in [0, 1]."""
        scores = np.atleast_2d(np.asarray(scores, np.float32))
        k = scores.shape[1]
        if k > self.n_components:
            raise UserError(f"There are {self.n_components} components, but {k} scores per ear.")
        codes = self.mean_ + (scores * self._deviations[:k]) @ self.components_[:k]
        return decode_codes(self.model, codes)

    def traverse(self, component: int, scores: Sequence[float]) -> np.ndarray:
        """The mean ear moved along one component (from 0) -> images [len(scores), H, W, 3]."""
        grid = np.zeros((len(scores), component + 1), np.float32)
        grid[:, component] = scores
        return self.synthesize(grid)

    @property
    def _deviations(self) -> np.ndarray:
        return np.sqrt(np.maximum(self.explained_variance_, 1e-12))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the components as safetensors; the model is named by its run, relative to the file.

        Raises:
            UserError: the model does not come from a run, so that `load` could not find it.
        """
        if self.model.run_dir is None:
            raise UserError("Only eigenears of a model made by load_model(run_dir) can be saved.")
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {
            "format": FORMAT,
            "run": os.path.relpath(self.model.run_dir, path.parent),
            "checkpoint": str(self.model.checkpoint),
            "n_samples": str(self.n_samples_),
        }
        arrays = {
            "mean": self.mean_,
            "components": self.components_,
            "explained_variance": self.explained_variance_,
            "explained_variance_ratio": self.explained_variance_ratio_,
        }
        temporary = path.with_name(path.name + ".tmp")
        save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, temporary, metadata)
        temporary.replace(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: EarVAE | None = None) -> EigenEars:
        """Read what `save` wrote, and the model from its run (unless `model` is given).

        Raises:
            UserError: not such a file, or its run has gone.
        """
        path = Path(path)
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read as eigenears: {error}") from error
        if metadata.get("format") != FORMAT:
            raise UserError(
                f"{path} does not hold eigenears; `jaxear eigenears` makes such a file."
            )
        if model is None:
            run_dir = path.parent / metadata["run"]
            model = load_model(os.path.normpath(run_dir), checkpoint=int(metadata["checkpoint"]))
        return cls(model, arrays, int(metadata["n_samples"]))


def write_eigenears(
    run_dir: str | os.PathLike[str],
    *,
    split: str = "train",
    n_components: int = 16,
    checkpoint: str | int = "best",
    progress: bool = True,
) -> EigenEars:
    """Fit the eigenears of a run, and write them with their figures to `eigenears/` in it.

    The images are prepared as the run's own settings say, so that they cannot differ from those it
    was trained on. Where there are fewer images or latent dimensions than components asked for, as
    many as possible are kept.

    Raises:
        UserError: not a run, or its data is no longer there.
    """
    run_dir = Path(run_dir)
    config = load_config(run_dir)
    model = load_model(run_dir, checkpoint=checkpoint)
    images = load_split(config, split, progress=progress).images
    n_components = min(n_components, len(images) - 1, model.latent_dim)
    eigenears = EigenEars.fit(model, images, n_components)
    out = run_dir / "eigenears"
    eigenears.save(out / "eigenears.safetensors")
    ratios = eigenears.explained_variance_ratio_
    write_json(
        out / "eigenears.json",
        {
            "run": str(run_dir),
            "checkpoint": model.checkpoint,
            "split": split,
            "n_samples": len(images),
            "latent_dim": model.latent_dim,
            "explained_variance_ratio": [float(r) for r in ratios],
            "pc1": float(ratios[0]),
            "pc_first5": float(ratios[:5].sum()),
        },
    )
    figures.save_figure(figures.traversals(eigenears), out / "traversals")
    figures.save_figure(figures.scree(ratios), out / "scree")
    logger.info(
        "PC1 explains %.1f %% of the codes' variance, the first five %.1f %%",
        100 * ratios[0],
        100 * ratios[:5].sum(),
    )
    return eigenears


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(
        prog="jaxear eigenears",
        description="Fit the eigenears of a trained model (PCA of its latent means) and draw them: "
        "traversals from -3 to +3 standard deviations, a scree plot, and the numbers. "
        "Everything goes to RUN/eigenears/.",
    )
    parser.add_argument("--run", type=str, required=True, help="the run's directory.")
    parser.add_argument("--split", type=str, default="train", help="train, val, test or all.")
    parser.add_argument("--n_components", type=int, default=16, help="how many to keep.")
    parser.add_argument("--checkpoint", type=str, default="best", help="best, latest or a step.")

    def command() -> None:
        options = parser.parse(argv)
        write_eigenears(
            options.run,
            split=options.split,
            n_components=options.n_components,
            checkpoint=options.checkpoint,
        )
        print(json.dumps(json.loads((Path(options.run) / "eigenears/eigenears.json").read_text())))

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
