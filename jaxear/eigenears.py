"""Eigenears: the principal directions of a model's latent codes, decoded to pictures.

As a library: `EigenEars.fit(model, images)`. As a command: `jaxear eigenears --run runs/NAME`.
The classic, linear ones, of pixels: `EigenEars.fit(PixelModel(128), images)`; `--pixels`.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np
from rich.console import Console
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxear.command import run_command
from jaxear.config import DataConfig
from jaxear.data.dataset import EarImages
from jaxear.data.pipeline import load_split
from jaxear.data.store import is_store, open_store
from jaxear.eigenear_report import print_report, write_report
from jaxear.errors import UserError
from jaxear.files import replacing
from jaxear.inference import Codec, decode_codes, encode_images
from jaxear.model import load_config, load_model
from jaxear.options import Parser
from jaxear.pca import PCA
from jaxear.pixels import PixelModel
from jaxear.training.logging import read_json
from jaxear.vae import EarVAE

logger = logging.getLogger(__name__)

FORMAT = "jaxear-eigenears-1"


class EigenEars:
    """The principal directions in which the codes of ears vary.

    Made by `fit` or `load`. A score is a code's coordinate on a component in standard deviations of
    the ears that it was fitted to: 0 is the mean ear, -2 and +2 lie near the ends of what is usual.

    Attributes:
        model: the model that encodes and decodes; a `PixelModel` for classic, linear eigenears.
        mean_: the mean code [d].
        components_: unit vectors of the codes' space, one per component [k, d].
        explained_variance_: variance of the codes along each [k].
        explained_variance_ratio_: the same as a share of the codes' total variance [k].
        n_samples_: how many ears it was fitted to.
    """

    def __init__(self, model: Codec, arrays: dict[str, np.ndarray], n_samples: int):
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
    def fit(cls, model: Codec, images: np.ndarray, n_components: int = 16) -> EigenEars:
        """Principal components of the mean codes of images.

        Args:
            model: a trained model.
            images: [n, H, W, 3], uint8 or floats in [0, 1], prepared as for training.
            n_components: how many to keep.

        Raises:
            UserError: fewer images, or latent dimensions, than components.
        """
        return cls.fit_codes(model, encode_images(model, images)[0], n_components)

    @classmethod
    def fit_codes(cls, model: Codec, codes: np.ndarray, n_components: int = 16) -> EigenEars:
        """As `fit`, from the mean codes [n, d] of images that a model has encoded already."""
        available = min(len(codes) - 1, model.latent_dim)
        if not 1 <= n_components <= available:
            raise UserError(
                f"{n_components} components cannot be had from {len(codes)} images and codes of "
                f"{model.latent_dim} numbers; ask for {max(available, 1)} at most."
            )
        pca = PCA(n_components=n_components, random_state=0).fit(codes)
        arrays = {
            "mean": pca.mean_,
            "components": pca.components_,
            "explained_variance": pca.explained_variance_,
            "explained_variance_ratio": pca.explained_variance_ratio_,
        }
        return cls(model, {k: np.asarray(v, np.float32) for k, v in arrays.items()}, len(codes))

    def project(self, images: np.ndarray) -> np.ndarray:
        """Images [n, H, W, 3] -> scores [n, k] in standard deviations."""
        return self.project_codes(encode_images(self.model, images)[0])

    def project_codes(self, codes: np.ndarray) -> np.ndarray:
        """Codes [n, d] -> scores [n, k] in standard deviations."""
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

    def traverses(self, scores: Sequence[float] | np.ndarray) -> np.ndarray:
        """The mean ear moved along every component by itself, all decoded in one go.

        Returns:
            images [k, len(scores), H, W, 3].
        """
        grid = np.eye(self.n_components, dtype=np.float32)[:, None] * np.reshape(scores, (-1, 1))
        images = self.synthesize(grid.reshape(-1, self.n_components))
        return images.reshape(self.n_components, len(scores), *images.shape[1:])

    @property
    def _deviations(self) -> np.ndarray:
        return np.sqrt(np.maximum(self.explained_variance_, 1e-12))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the components as safetensors.

        A model is named by its run, relative to the file; pixels need none.

        Raises:
            UserError: the model does not come from a run, so that `load` could not find it.
        """
        path = Path(path)
        metadata = {"format": FORMAT, "n_samples": str(self.n_samples_)}
        if isinstance(self.model, PixelModel):
            height, width = self.model.image_size
            metadata |= {"pixels": f"{height}x{width}"}
        elif isinstance(self.model, EarVAE) and self.model.run_dir is not None:
            metadata |= {
                "run": os.path.relpath(self.model.run_dir, path.parent),
                "checkpoint": str(self.model.checkpoint),
            }
        else:
            raise UserError("Only eigenears of a model made by load_model(run_dir) can be saved.")
        arrays = {
            "mean": self.mean_,
            "components": self.components_,
            "explained_variance": self.explained_variance_,
            "explained_variance_ratio": self.explained_variance_ratio_,
        }
        with replacing(path) as temporary:
            save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, temporary, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Codec | None = None) -> EigenEars:
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
        if model is None and "pixels" in metadata:
            height, width = metadata["pixels"].split("x")
            model = PixelModel((int(height), int(width)))
        elif model is None:
            run_dir = path.parent / metadata["run"]
            model = load_model(os.path.normpath(run_dir), checkpoint=int(metadata["checkpoint"]))
        return cls(model, arrays, int(metadata["n_samples"]))


def without_pose(model: Codec, codes: np.ndarray) -> np.ndarray:
    """Codes [n, d] of a model with its mean pose in place of each one's own: what then varies is
    the ear, its light and what is around it, and not where it lies.

    Raises:
        UserError: the model's codes have no pose.
    """
    _check_pose(model)
    codes = np.array(codes)
    codes[:, : model.n_pose] = codes[:, : model.n_pose].mean(axis=0)
    return codes


def _check_pose(model: Codec) -> None:
    if model.n_pose == 0:
        raise UserError(
            "Only the codes of a model that was trained with --pixel-registration (as "
            "configs/many_ears.yaml) know its pose."
        )


def write_eigenears(
    run_dir: str | os.PathLike[str],
    *,
    split: str | None = None,
    n_components: int = 16,
    checkpoint: str | int = "best",
    data: str | None = None,
    pixels: bool = False,
    one_pose: bool = False,
    out: str | os.PathLike[str] | None = None,
    bootstrap: int = 200,
    permutations: int = 100,
    progress: bool = True,
) -> EigenEars:
    """Fit the eigenears of a run, and write them with their figures to `eigenears/` in it.

    The images are prepared as the run's own settings say, so that they cannot differ from those it
    was trained on. Where there are fewer images or latent dimensions than components asked for, as
    many as possible are kept.

    Args:
        run_dir: the run.
        split: of the images, "train" by default; of other data than the run's own, all of them.
        n_components: how many to keep.
        checkpoint: "best", "latest" or a step.
        data: other photographs than the run's own.
        pixels: of the pixels themselves instead of the model's codes: the linear baseline.
        one_pose: of all ears in their mean pose (`without_pose`).
        out: where to write; by default `eigenears` in the run, `eigenears_pixels`, or
            `eigenears_one_pose`.
        bootstrap, permutations: see `jaxear.eigenear_report.write_report`.
        progress: show a bar while reading.

    Raises:
        UserError: not a run, its data is no longer there, or its codes have no pose.
    """
    run_dir = Path(run_dir)
    config = load_config(run_dir)
    if data is not None and out is None:
        raise UserError(
            f"The eigenears in {run_dir} are those of its own data. Give another folder for those "
            f"of {data}: --out DIR."
        )
    split = split or ("train" if data is None else "all")
    config = config if data is None else dataclasses.replace(config, data=data)
    model = PixelModel(config.image_size) if pixels else load_model(run_dir, checkpoint=checkpoint)
    if one_pose:
        _check_pose(model)  # before the images are read
    ears = load_split(config, split, progress=progress)
    facts = {
        "run": str(run_dir),
        "model": "pixels" if pixels else config.backbone,
        "checkpoint": None if isinstance(model, PixelModel) else model.checkpoint,
        "data": config.data or "synthetic ears",
        "split": split,
        "one_pose": one_pose,
    }
    folder = Path(out or run_dir / default_folder(pixels=pixels, one_pose=one_pose))
    return _write(model, ears, folder, facts, n_components, bootstrap, permutations, one_pose)


def default_folder(*, pixels: bool, one_pose: bool) -> str:
    """Where in a run's directory its eigenears are written."""
    return "eigenears" + "_pixels" * pixels + "_one_pose" * one_pose


def write_pixel_eigenears(
    data: str,
    out: str | os.PathLike[str],
    *,
    split: str = "all",
    image_size: int | None = None,
    n_components: int = 16,
    bootstrap: int = 200,
    permutations: int = 100,
    progress: bool = True,
) -> EigenEars:
    """Fit classic eigenears to the pixels of photographs, without a run, and write them to `out`.

    Args:
        data: photographs, or a store made by `jaxear data prepare`, whose settings then hold.
        out: the folder to write to.
        split: train, val, test or all.
        image_size: side of the images in pixels; 128 by default.
        n_components, bootstrap, permutations, progress: as for `write_eigenears`.

    Raises:
        UserError: the data cannot be used.
    """
    config = DataConfig(data=data)
    if is_store(data):
        settings = open_store(data).settings
        config = dataclasses.replace(
            config,
            image_size=settings.image_size,
            fit=settings.fit,
            box_margin=settings.box_margin,
            mirror_left=settings.mirror_left,
            normalize_colour=settings.normalize_colour,
        )
    if image_size is not None:
        config = dataclasses.replace(config, image_size=image_size)
    ears = load_split(config, split, progress=progress)
    facts = {"run": None, "model": "pixels", "checkpoint": None, "data": data, "split": split}
    model = PixelModel(config.image_size)
    return _write(model, ears, Path(out), facts, n_components, bootstrap, permutations)


def _write(
    model: Codec,
    ears: EarImages,
    out: Path,
    facts: dict[str, Any],
    n_components: int,
    bootstrap: int,
    permutations: int,
    one_pose: bool = False,
) -> EigenEars:
    codes, _ = encode_images(model, ears.images)
    n_free = model.latent_dim
    if one_pose:
        codes = without_pose(model, codes)
        n_free -= model.n_pose
    n_components = min(n_components, len(ears) - 1, n_free)
    eigenears = EigenEars.fit_codes(model, codes, n_components)
    eigenears.save(out / "eigenears.safetensors")
    report = write_report(
        eigenears,
        codes,
        ears,
        out,
        facts | {"latent_dim": model.latent_dim},
        bootstrap=bootstrap,
        permutations=permutations,
    )
    logger.info(
        "PC1 explains %.1f %% of the codes' variance, the first five %.1f %%",
        100 * report["pc1"],
        100 * report["pc_first5"],
    )
    return eigenears


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(
        prog="jaxear eigenears",
        description="Fit eigenears, the principal directions in which ears vary, draw them and "
        "test them. With --run, they are those of a trained model's latent means; with --run and "
        "--pixels, or with --data alone, those of the pixels themselves: classic eigenears, which "
        "a model has to surpass. Written are the components (eigenears.safetensors), their "
        "numbers (eigenears.json), every ear's scores (scores.csv), figures as PNG and PDF "
        "(traversals, atlas, scree, scores, neighbours, meaning), and an animation of each "
        "component (components/pc01.gif, ...).",
    )
    parser.add_argument("--run", type=str, default=None, help="the run's directory.")
    parser.add_argument(
        "--data",
        type=str,
        default=None,
        help="photographs, other than the run's own or without a run; needs --out.",
    )
    parser.add_argument(
        "--pixels", action="store_true", help="of the run's photographs, not of its model's codes."
    )
    parser.add_argument(
        "--one_pose",
        action="store_true",
        help="of ears in one pose, so that no component is where an ear lies, how large it is in "
        "the picture or how far turned; of a run with --pixel-registration.",
    )
    parser.add_argument(
        "--out",
        type=str,
        default=None,
        help="where to write; by default RUN/eigenears, RUN/eigenears_pixels with --pixels, or "
        "RUN/eigenears_one_pose with --one-pose.",
    )
    parser.add_argument(
        "--split",
        type=str,
        default=None,
        help="train, val, test or all; by default train, and all of --data.",
    )
    parser.add_argument(
        "--image_size",
        type=Optional[int],  # noqa: UP045  (as jsonargparse shows it)
        default=None,
        help="without a run: side of the images in pixels, 128 by default.",
    )
    parser.add_argument("--n_components", type=int, default=16, help="how many to keep.")
    parser.add_argument("--checkpoint", type=str, default="best", help="best, latest or a step.")
    parser.add_argument(
        "--bootstrap",
        type=int,
        default=200,
        help="draws of subjects for the confidence intervals of explained variance; 0 makes none.",
    )
    parser.add_argument(
        "--permutations",
        type=int,
        default=100,
        help="draws for the test of how many components are more than chance; 0 does without.",
    )

    def command() -> None:
        options = parser.parse(argv)
        for name in ("bootstrap", "permutations"):
            if getattr(options, name) < 0:
                raise UserError(f"--{name} must be 0 or more, not {getattr(options, name)}.")
        common = {
            "n_components": options.n_components,
            "bootstrap": options.bootstrap,
            "permutations": options.permutations,
        }
        if options.run is None:
            if options.one_pose:
                raise UserError("--one-pose is for --run: pixels know nothing of a pose.")
            if options.data is None or options.out is None:
                raise UserError(
                    "Give --run RUN for the eigenears of a model, or --data DIR --out DIR for "
                    "those of the pixels of photographs."
                )
            out = options.out
            write_pixel_eigenears(
                options.data,
                out,
                split=options.split or "all",
                image_size=options.image_size,
                **common,
            )
        else:
            if options.image_size is not None:
                raise UserError("--image-size is for --data without --run: a run has its own.")
            name = default_folder(pixels=options.pixels, one_pose=options.one_pose)
            out = options.out or str(Path(options.run) / name)
            write_eigenears(
                options.run,
                split=options.split,
                checkpoint=options.checkpoint,
                data=options.data,
                pixels=options.pixels,
                one_pose=options.one_pose,
                out=options.out,
                **common,
            )
        print_report(read_json(Path(out) / "eigenears.json"), Path(out), Console())

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
