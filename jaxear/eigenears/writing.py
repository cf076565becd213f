"""Eigenears as they are written: fitted to the ears of a run or of a folder, drawn and tested."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any

from jaxear.config import DataConfig
from jaxear.data.dataset import EarImages
from jaxear.data.pipeline import load_split
from jaxear.data.store import is_store, open_store
from jaxear.eigenears.components import EigenEars, check_pose, without_pose
from jaxear.eigenears.report import write_report
from jaxear.errors import UserError
from jaxear.inference import Codec, encode_images
from jaxear.model import load_config, load_model
from jaxear.pixels import PixelModel

logger = logging.getLogger(__name__)


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
        bootstrap, permutations: see `jaxear.eigenears.report.write_report`.
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
        check_pose(model)  # before the images are read
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
        config = dataclasses.replace(config, **dataclasses.asdict(open_store(data).settings))
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
