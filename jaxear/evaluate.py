"""Measure a trained model on ears that it has never seen: `jaxear evaluate --run runs/NAME`."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import logging
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jsonargparse import DefaultHelpFormatter
from rich.console import Console

from jaxear.assessment.coders import Coder, LinearCoder, ModelCoder, encode_all
from jaxear.assessment.measures import MEASURES, Estimate, mean_estimates, measure_ears
from jaxear.assessment.plots import Example, choose_examples
from jaxear.assessment.recognition import recognize
from jaxear.assessment.report import GROUPS, Evaluation, print_report, write_evaluation
from jaxear.assessment.timing import machine, time_coder
from jaxear.backbones.registry import get_spec
from jaxear.command import run_command
from jaxear.config import TrainConfig
from jaxear.data.pipeline import load_split, padded_batches
from jaxear.errors import UserError, WeightsNotFoundError
from jaxear.inference import BATCH_SIZE
from jaxear.metrics import active_units
from jaxear.model import load_config, load_model
from jaxear.options import Parser
from jaxear.perceptual import Judge, vgg16_judge
from jaxear.training.logging import read_json

logger = logging.getLogger(__name__)

FEW_SUBJECTS = 10
MOST_TRAINING_CODES = 4096  # to whiten codes by


def evaluate(
    run_dir: str | os.PathLike[str],
    *,
    data: str | None = None,
    split: str | None = None,
    checkpoint: str | int = "best",
    repeats: int = 20,
    progress: bool = True,
) -> Evaluation:
    """Measure a run on a split, beside linear PCA with as many numbers per ear.

    PCA is fitted to the run's training split, and the statistics that whiten codes for recognition
    come from there: nothing is learned from the ears that are measured.

    Args:
        run_dir: the run.
        data: other data than the run's own; all of it is used, whatever its subjects.
        split: of the run's own data: test (by default), val, train or all.
        checkpoint: "best", "latest" or a step.
        repeats: how often encoding and decoding are timed; 0 leaves it out.
        progress: show a bar while reading.

    Returns:
        The measures of `MEASURES` with intervals, of the model, of PCA, and of their difference.

    Raises:
        UserError: the run or the data cannot be used.
    """
    if data is not None and split is not None:
        raise UserError(
            f"The split {split} is one of the run's own data, and of {data} all is used: give "
            "--split or --data."
        )
    config = load_config(run_dir)
    model = load_model(run_dir, checkpoint=checkpoint)
    if data is not None:
        other = dataclasses.replace(config, data=data, layout="auto")
        ears, split = load_split(other, "all", progress=progress), "all"
    else:
        split = split or "test"
        ears = load_split(config, split, progress=progress)
    images, subjects = ears.images, np.asarray([record.subject for record in ears.records])
    training = load_split(config, "train", progress=progress).images
    logger.info("Fitting linear PCA to %d training ears", len(training))
    coders: dict[str, Coder] = {
        "model": ModelCoder(model, config.backbone),
        "pca": LinearCoder.fit(training, model.latent_dim),
    }
    seen = subjects_seen(images, subjects, training)
    about = {
        "run": str(run_dir),
        "checkpoint": model.checkpoint,
        "data": data or config.data or "synthetic ears",
        "split": split,
        "n_images": len(ears),
        "n_subjects": len(np.unique(subjects)),
        "n_subjects_trained_on": len(seen),
        "n_training_images": len(training),
    }

    # What each ear has one of
    judge, without_judge = _find_judge(config)
    codes, values = {}, {}
    for key, coder in coders.items():
        logger.info("Measuring %s on %d ears", coder.name, len(ears))
        codes[key], values[key] = measure_ears(coder, images, subjects, judge=judge)
        if not np.isfinite(codes[key]).all():
            raise UserError(
                f"The codes that {coder.name} makes are not all finite numbers, so that nothing "
                f"can be measured. Take another checkpoint of {run_dir} by --checkpoint."
            )
    both = [name for name in values["model"] if name in values["pca"]]
    values_of_difference = {name: values["model"][name] - values["pca"][name] for name in both}
    estimates = {
        key: mean_estimates(of, subjects)
        for key, of in {**values, "difference": values_of_difference}.items()
    }
    if judge is None:
        for of in estimates.values():
            of["lpips_style"] = Estimate(None, n=len(ears), note=without_judge)
    units = active_units(jnp.asarray(codes["model"]))
    estimates["model"]["active_units"] = Estimate(float(units), n=len(ears))

    # Recognition
    logger.info("Comparing codes by subject")
    some = np.unique(np.linspace(0, len(training) - 1, MOST_TRAINING_CODES).astype(int))
    known = {key: encode_all(coder, training[some]) for key, coder in coders.items()}
    recognition = recognize(codes, known, subjects)
    for key, of in recognition.estimates.items():
        estimates[key] |= of

    # Time
    if repeats:
        logger.info("Timing")
        about["machine"] = machine()
        for key, coder in coders.items():
            estimates[key] |= time_coder(coder, images, repeats=repeats)

    notes = _notes(about, coders, images)
    notes += [recognition.note] if recognition.note else []
    notes += [f"No identity: {recognition.reason.removesuffix('.')}"] if recognition.reason else []
    names = {key: coder.name for key, coder in coders.items()}
    return Evaluation(
        about=about,
        names=names | {"difference": f"{names['model']} - {names['pca']}"},
        numbers={key: coder.numbers for key, coder in coders.items()},
        estimates=estimates,
        notes=notes,
        curves=recognition.curves,
        records=ears.records,
        values=values,
        examples=_examples(coders, images, subjects, values),
    )


def subjects_seen(images: np.ndarray, subjects: np.ndarray, training: np.ndarray) -> set[str]:
    """Subjects of whom at least one image is, bit for bit, one of the training images."""

    def digest(image: np.ndarray) -> bytes:
        return hashlib.sha256(image.tobytes()).digest()

    known = {digest(image) for image in training}
    return {str(s) for s, image in zip(subjects, images, strict=True) if digest(image) in known}


def _find_judge(config: TrainConfig) -> tuple[Judge | None, str]:
    """VGG-16 for the images of a run; or why there is none."""
    try:
        return vgg16_judge(config.image_size), ""
    except WeightsNotFoundError:
        return None, f"needs VGG-16's weights: {get_spec('vgg16').port_command}"
    except UserError as error:
        return None, str(error)


def _notes(about: dict[str, Any], coders: dict[str, Coder], images: np.ndarray) -> list[str]:
    """What keeps the figures from being what they seem to be."""
    notes = []
    if seen := about["n_subjects_trained_on"]:
        notes.append(
            f"{seen} of the {about['n_subjects']} subjects were trained on: these figures do not "
            "tell what becomes of ears never seen"
        )
    if coders["pca"].numbers < coders["model"].numbers:
        notes.append(
            f"PCA has {coders['pca'].numbers} numbers per ear, not {coders['model'].numbers}: "
            f"{about['n_training_images']} training images have no more components"
        )
    if 1 < about["n_subjects"] < FEW_SUBJECTS:
        notes.append(
            f"{about['n_subjects']} subjects: with fewer than {FEW_SUBJECTS} the intervals come "
            "out too narrow"
        )
    # In the middle, as what squares a photograph by padding it has a colour
    h, w = (side // 4 for side in images.shape[1:3])
    middle = images[:, h : 3 * h, w : 3 * w]
    grey = int(np.sum(np.all(middle == middle[..., :1], axis=(1, 2, 3))))
    if grey:
        notes.append(f"{grey} of the ears are grey pictures; colour that is put in is an error")
    return notes


def _examples(
    coders: dict[str, Coder],
    images: np.ndarray,
    subjects: np.ndarray,
    values: dict[str, dict[str, np.ndarray]],
) -> list[Example]:
    """The ears that the model does best, worst and in between, with their reconstructions."""
    groups, rows = zip(*choose_examples(values["model"]["psnr"], subjects), strict=True)
    # A batch of the size that they were measured in, which is compiled already
    shown, _ = next(padded_batches(images[list(rows)], min(BATCH_SIZE, len(images))))
    made = {k: np.asarray(coder.decode(coder.encode(shown).mean)) for k, coder in coders.items()}
    return [
        Example(
            group,
            shown[i],
            {key: of[i] for key, of in made.items()},
            {key: float(of["psnr"][row]) for key, of in values.items()},
        )
        for i, (group, row) in enumerate(zip(groups, rows, strict=True))
    ]


def default_folder(run_dir: str | os.PathLike[str], data: str | None, split: str | None) -> Path:
    """Where an evaluation goes: evaluation/ in the run; of other data evaluation-NAME/, NAME being
    that of the data, and of another split than test evaluation-SPLIT/.

    Raises:
        UserError: an evaluation of other data of that name lies there.
    """
    if data is None:
        return Path(run_dir) / ("evaluation" if split in (None, "test") else f"evaluation-{split}")
    out = Path(run_dir) / f"evaluation-{Path(data).resolve().stem}"
    before = read_json(out / "evaluation.json").get("data")
    if before is not None and Path(before).resolve() != Path(data).resolve():
        raise UserError(
            f"{out} holds an evaluation of {before}, which that of {data} would replace. Give "
            "another folder by --out."
        )
    return out


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the lines of the definitions."""


def _definitions() -> str:
    """What is measured and how, for --help."""
    lines = ["what is measured (differences are the model's minus PCA's, ear by ear):"]
    for group, title in GROUPS.items():
        lines.append(f"\n  {title}")
        for name, measure in MEASURES.items():
            if measure.group == group:
                lines += textwrap.wrap(
                    f"{name}: {measure.definition}",
                    width=96,
                    initial_indent="    ",
                    subsequent_indent="      ",
                    break_on_hyphens=False,
                )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(
        prog="jaxear evaluate",
        description="Measure a trained model on ears it has never seen, beside linear PCA with as "
        "many numbers per ear\n(fitted to the run's training subjects). Prints a table and writes "
        "into a folder:\n\n"
        "  evaluation.json, evaluation.csv  every measure with its interval (CSV: one per row)\n"
        "  images.csv                       what every ear has, one ear and model per row\n"
        "  identity.png, .pdf               CMC and ROC curves with 95 % bands\n"
        "  reconstructions.png, .pdf        the best, the median and the worst ears\n"
        "  psnr_by_subject.png, .pdf        the model against PCA, subject by subject",
        epilog=_definitions(),
        formatter_class=_HelpFormatter,
    )
    parser.add_argument("--run", type=str, required=True, help="the run's directory.")
    for name, kind, default, text in (
        ("data", str, None, "other data than the run's own; all of it is measured."),
        ("split", str, None, "of the run's own data: test (by default), val, train or all."),
        ("checkpoint", str, "best", "best, latest or a step."),
        ("repeats", int, 20, "how often encoding and decoding are timed; 0: not at all."),
        ("out", str, None, "folder to write to. By default RUN/evaluation; for another split than "
            "test RUN/evaluation-SPLIT; with --data RUN/evaluation-NAME, the name of the data."),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)

    def command() -> None:
        options = parser.parse(argv)
        data, split = options.data, options.split
        out = Path(options.out or default_folder(options.run, data, split))
        evaluation = evaluate(
            options.run,
            data=data,
            split=split,
            checkpoint=options.checkpoint,
            repeats=options.repeats,
        )
        write_evaluation(evaluation, out)
        print_report(evaluation, Console())
        logger.info("Written to %s", out)

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
