"""Every setting of a run, in groups; each field is a flag of the command and a key of the YAML."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from jaxear.errors import UserError


@dataclass(frozen=True)
class DataConfig:
    """Data.

    Args:
        data: a folder of ear photographs (AMI, IIT Delhi, AWE and EarVN1.0 are recognised), a CSV,
            a COCO JSON file or an .npy list of boxes. Without it, synthetic demo ears are used.
        layout: how to read it; auto recognises it.
        image_size: side of the square images, in pixels.
        fit: how a photograph that is not square becomes so.
        box_margin: how much context to keep around an ear's box, as a fraction of its size.
        mirror_left: turn ears known to be left into right ones, so that no component is the side.
        val_fraction: share of the subjects to validate on.
        test_fraction: share of the subjects to keep aside for evaluation.
        split_seed: decides which subjects these are.
        max_bad: share of unreadable files to put up with.
        demo_ears: how many synthetic ears to draw where no data is given.
    """

    data: str | None = None
    layout: str = "auto"
    image_size: int = 128
    fit: Literal["pad", "stretch", "crop"] = "pad"
    box_margin: float = 0.0
    mirror_left: bool = True
    val_fraction: float = 0.1
    test_fraction: float = 0.1
    split_seed: int = 0
    max_bad: float = 0.05
    demo_ears: int = 2048


@dataclass(frozen=True)
class ModelConfig:
    """Model.

    Args:
        backbone: name of the pretrained encoder (sam, sam_large, ...).
        weights: auto takes the ported file, none starts from random values; or a ported file.
        backbone_options: options of the backbone, e.g. {pos_embed: crop}.
        features: which of its feature maps the latent head reads.
        latent_dim: numbers in an ear's code.
        head_width: numbers that the latent head keeps of the features, over all grid cells.
        decoder_channels: channels of the decoder from its smallest grid to the image's.
        dtype: of the computation; auto is bfloat16 on GPU and TPU, float32 on CPU.
    """

    backbone: str = "sam"
    weights: str = "auto"
    backbone_options: dict[str, Any] = field(default_factory=dict)
    features: str = "last"
    latent_dim: int = 512
    head_width: int = 4096
    decoder_channels: tuple[int, ...] = (512, 256, 128, 64, 32, 16)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"


@dataclass(frozen=True)
class LossConfig:
    """Objective.

    Args:
        mse_weight: weight of the mean squared error.
        l1_weight: weight of the mean absolute error.
        ssim_weight: weight of (1 - SSIM) / 2.
        edge_weight: weight of the difference of Sobel edges.
        perceptual_weight: weight of the distance in the backbone's own features.
        center_weight: how much heavier the centre of the image counts than its corners; 0 is alike.
        kl_weight: weight of the KL divergence per number of the image; 2 sigma^2 is the exact bound
            for Gaussian pixels of standard deviation sigma.
        kl_warmup_epochs: epochs over which that weight grows from 0.
        free_bits: nats that each latent dimension may carry at no cost.
    """

    mse_weight: float = 1.0
    l1_weight: float = 0.0
    ssim_weight: float = 0.05
    edge_weight: float = 0.0
    perceptual_weight: float = 0.0
    center_weight: float = 0.0
    kl_weight: float = 0.02
    kl_warmup_epochs: float = 5.0
    free_bits: float = 0.0


@dataclass(frozen=True)
class OptimConfig:
    """Optimisation (AdamW, linear warm-up, cosine decay).

    Args:
        epochs: passes over the training split.
        batch_size: images per step, over all devices.
        learning_rate: peak rate of head and decoder.
        backbone_lr_scale: the backbone's rate as a share of that.
        weight_decay: decoupled weight decay of matrices and kernels.
        warmup_epochs: epochs over which the rate grows from 0.
        clip_norm: gradients of a larger global norm are scaled down to it.
        freeze: what of the backbone stays as it is: none, all, or the number of its first blocks.
    """

    epochs: int = 60
    batch_size: int = 32
    learning_rate: float = 1e-3
    backbone_lr_scale: float = 0.1
    weight_decay: float = 0.01
    warmup_epochs: float = 1.0
    clip_norm: float = 1.0
    freeze: str | int = "none"


@dataclass(frozen=True)
class RunConfig:
    """Run.

    Args:
        out: the run's directory; runs/<backbone> where it is not given.
        seed: of initialisation, data order and noise.
        sample_images: how many validation ears the grid of reconstructions shows.
        init_from: a finished run whose model this one starts from, as far as it fits.
        stages: settings of stages trained one after the other, each beginning from the one before;
            what a stage does not set is as for the whole run.
    """

    out: str | None = None
    seed: int = 0
    sample_images: int = 8
    init_from: str | None = None
    stages: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class TrainConfig(RunConfig, OptimConfig, LossConfig, ModelConfig, DataConfig):
    """All settings of a training run."""

    @property
    def run_dir(self) -> Path:
        """Where the run is written."""
        return Path(self.out or f"runs/{self.backbone}")

    def save(self, path: Path) -> None:
        """Write all settings as YAML."""
        values = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()
        }
        path.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


GROUPS = (DataConfig, ModelConfig, LossConfig, OptimConfig, RunConfig)


def validate(config: TrainConfig) -> None:
    """Refuse settings that cannot work, all of them in one error.

    Raises:
        UserError: names each setting, what it was and what it may be.
    """
    problems = []

    def require(ok: bool, what: str) -> None:
        if not ok:
            problems.append(what)

    def at_least(low: float, *names: str) -> None:
        for name in names:
            value = getattr(config, name)
            require(value >= low, f"{name} must be at least {low}, not {value}")

    at_least(1, "epochs", "batch_size", "latent_dim", "head_width", "image_size", "demo_ears")
    at_least(0, "learning_rate", "backbone_lr_scale", "weight_decay", "warmup_epochs", "clip_norm")
    at_least(0, *(f.name for f in dataclasses.fields(LossConfig)))
    at_least(1, "sample_images")
    at_least(0, "box_margin", "max_bad", "val_fraction", "test_fraction")
    require(
        config.val_fraction + config.test_fraction < 1,
        "val_fraction + test_fraction must leave subjects to train on",
    )
    terms = ("mse", "l1", "ssim", "edge", "perceptual")
    require(
        any(getattr(config, f"{term}_weight") > 0 for term in terms),
        "one reconstruction term at least must have a weight above 0",
    )
    freeze = config.freeze
    require(
        freeze in ("none", "all") or (str(freeze).isdigit()),
        f"freeze must be none, all or a number of blocks, not {freeze!r}",
    )
    if problems:
        raise UserError("These settings cannot work:\n  " + "\n  ".join(problems))


def from_dict(values: Mapping[str, Any]) -> TrainConfig:
    """A configuration from the values of a run's config.yaml, strictly.

    Raises:
        UserError: a key is not a setting.
    """
    known = {f.name for f in dataclasses.fields(TrainConfig)}
    if unknown := sorted(values.keys() - known):
        raise UserError(f"Unknown settings: {', '.join(unknown)}.")
    values = dict(values)
    if "decoder_channels" in values:
        values["decoder_channels"] = tuple(values["decoder_channels"])
    return TrainConfig(**values)
