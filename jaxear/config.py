"""Every setting of a run, in groups; each field is a flag of the command and a key of the YAML."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from jaxear.errors import UserError
from jaxear.files import replacing

# The batch size of settings that leave it to be chosen; "auto" in files and on the command line.
AUTO_BATCH_SIZE = 0


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
        normalize_colour: give every picture the same mean and spread of each colour, so that
            components are not brightness, contrast or tint; errors then are of such pictures.
        val_fraction: share of the subjects to validate on.
        test_fraction: share of the subjects to keep aside for evaluation.
        split_seed: decides which subjects these are.
        test_subjects: the subjects to keep aside, by name, instead of a share of them; nobody is
            then validated on but val_subjects.
        val_subjects: the same for validation.
        sides: whose ears to use where the data says which they are: both, or left or right alone.
        max_bad: share of unreadable files to put up with.
        cache_dir: where prepared photographs are kept, to be read as they are needed and not to be
            decoded again; none keeps them in memory alone.
        demo_ears: how many synthetic ears to draw where no data is given.
    """

    data: str | None = None
    layout: str = "auto"
    image_size: int = 128
    fit: Literal["pad", "stretch", "crop"] = "pad"
    box_margin: float = 0.0
    mirror_left: bool = True
    normalize_colour: bool = False
    val_fraction: float = 0.1
    test_fraction: float = 0.1
    split_seed: int = 0
    test_subjects: list[str] = field(default_factory=list)
    val_subjects: list[str] = field(default_factory=list)
    sides: Literal["both", "left", "right"] = "both"
    max_bad: float = 0.05
    cache_dir: str = "~/.cache/jaxear"
    demo_ears: int = 2048


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation (of training images; 0 is off).

    Args:
        aug_rotation: largest turn either way, in degrees; 12 is sensible.
        aug_scale: largest zoom in or out, less 1; 0.15 goes from 1/1.15 to 1.15.
        aug_shift: largest shift, as a fraction of the side; 0.06 is sensible.
        aug_crop: largest fraction of the side to crop away; the rest fills the image again.
        aug_mirror: probability of exchanging left and right. Right and left ears differ: see
            mirror_left.
        aug_brightness: largest change of all values, which are in 0..1; 0.15 is sensible.
        aug_contrast: largest relative change of contrast; 0.15 is sensible.
        aug_saturation: largest relative change of saturation; 0.15 is sensible.
        aug_hue: largest turn of the colour circle either way, in whole turns; 0.02 is sensible.
        aug_gamma: largest exponent of all values, less 1; 0.15 goes from 1/1.15 to 1.15.
        aug_blur: largest standard deviation of a Gaussian blur of what the encoder sees, in pixels.
        aug_noise: largest standard deviation of noise in what the encoder sees.
        aug_occlusion: probability of hiding a rectangle from the encoder.
        aug_occlusion_size: its longest possible side, as a fraction of the image's.
    """

    aug_rotation: float = 0.0
    aug_scale: float = 0.0
    aug_shift: float = 0.0
    aug_crop: float = 0.0
    aug_mirror: float = 0.0
    aug_brightness: float = 0.0
    aug_contrast: float = 0.0
    aug_saturation: float = 0.0
    aug_hue: float = 0.0
    aug_gamma: float = 0.0
    aug_blur: float = 0.0
    aug_noise: float = 0.0
    aug_occlusion: float = 0.0
    aug_occlusion_size: float = 0.3


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
        pixel_components: principal components of the training images themselves that code and
            decoder start from (jaxear.pixel_path), latent_dim or more; 0 has none. Training then
            begins where linear PCA with as many numbers ends.
        pixel_registration: bring images to one pose before their components are taken, so that
            these are of ears and not of where they lie; the first four numbers of a code are the
            pose. For ears that lie now here and now there, and for many of them.
        pixel_steps: steps of the training of the small network that bends the code and foretells
            components beyond it; 0 leaves linear PCA.
        dtype: of the computation; auto is bfloat16 on GPU and TPU, float32 on CPU.
        remat: compute activations again for the gradient instead of keeping them: about a third
            more time, for much less memory.
    """

    backbone: str = "sam"
    weights: str = "auto"
    backbone_options: dict[str, Any] = field(default_factory=dict)
    features: str = "last"
    latent_dim: int = 512
    head_width: int = 4096
    decoder_channels: tuple[int, ...] = (512, 256, 128, 64, 32, 16)
    pixel_components: int = 0
    pixel_registration: bool = False
    pixel_steps: int = 3000
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    remat: bool = False


@dataclass(frozen=True)
class LossConfig:
    """Objective.

    Args:
        mse_weight: weight of the mean squared error.
        l1_weight: weight of the mean absolute error.
        ssim_weight: weight of (1 - SSIM) / 2.
        edge_weight: weight of the difference of Sobel edges.
        perceptual_weight: weight of the distance between features of the two images.
        perceptual: whose features: the backbone's own, or those of VGG-16, whose ported weights
            are then needed too.
        center_weight: how much heavier the centre of the image counts than its corners; 0 is alike.
        occlusion_weight: how much pixels that augmentation hid from the encoder count in the mean
            squared and absolute errors; 1 like the others, 0 not at all.
        kl_weight: weight of the KL divergence per number of the image; 2 sigma^2 is the exact bound
            for Gaussian pixels of standard deviation sigma.
        kl_warmup_epochs: epochs over which that weight grows from 0.
        free_bits: nats that each latent dimension may carry at no cost.
        contrastive_weight: weight of the supervised contrastive loss of the mean codes, which draws
            the codes of one subject together and those of different subjects apart.
        contrastive_temperature: the temperature of its cosine similarities.
    """

    mse_weight: float = 1.0
    l1_weight: float = 0.0
    ssim_weight: float = 0.05
    edge_weight: float = 0.0
    perceptual_weight: float = 0.0
    perceptual: Literal["backbone", "vgg16"] = "backbone"
    center_weight: float = 0.0
    occlusion_weight: float = 1.0
    kl_weight: float = 0.02
    kl_warmup_epochs: float = 5.0
    free_bits: float = 0.0
    contrastive_weight: float = 0.0
    contrastive_temperature: float = 0.1


@dataclass(frozen=True)
class OptimConfig:
    """Optimisation (AdamW, linear warm-up, cosine decay).

    Args:
        epochs: passes over the training split.
        batch_size: images per step, over all devices; AUTO_BATCH_SIZE (0) has the largest chosen
            whose step fits into memory.
        learning_rate: peak rate of head and decoder.
        backbone_lr_scale: the backbone's rate as a share of that.
        layer_decay: each block of the backbone has its rate multiplied by this once for every block
            above it and once more, so that the first layers change least; 1 treats all alike.
        weight_decay: decoupled weight decay of matrices and kernels.
        warmup_epochs: epochs over which the rate grows from 0.
        clip_norm: gradients of a larger global norm are scaled down to it.
        freeze: what of the backbone stays as it is: none, all, or the number of its first blocks.
        accumulate: parts that a batch is computed in, one after the other, to save memory.
        ema_decay: decay per step of a moving average of the parameters, which is then what is
            validated and kept; 0 keeps none.
        max_bad_steps: stop when loss or gradients were not finite in so many steps in a row.
        patience: stop when validation PSNR has not risen for so many epochs; 0 never does.
        keep_best: how many of the best checkpoints are kept.
    """

    epochs: int = 60
    batch_size: int = 32
    learning_rate: float = 1e-3
    backbone_lr_scale: float = 0.1
    layer_decay: float = 1.0
    weight_decay: float = 0.01
    warmup_epochs: float = 1.0
    clip_norm: float = 1.0
    freeze: str | int = "none"
    accumulate: int = 1
    ema_decay: float = 0.0
    max_bad_steps: int = 10
    patience: int = 0
    keep_best: int = 1


@dataclass(frozen=True)
class RunConfig:
    """Run.

    Args:
        out: the run's directory; runs/<backbone> where it is not given.
        seed: of initialisation, data order and noise.
        sample_images: how many validation ears the grid of reconstructions shows.
        parallel: how the devices share the work: jit has the parameters on each of them, fsdp cuts
            parameters and the optimiser's state over them, pmap is jit by jax.pmap.
        data_on_device: keep the training images on every device; auto does where they fit.
        cache_features: with --freeze all, compute the backbone's features once for so many
            augmented views of each image, and train head and decoder on them; 0 does not.
        checkpoint_minutes: save this often between the ends of epochs, too; 0 does not.
        coordinator: for several processes, the address host:port of the first; auto takes all from
            the cluster (SLURM, GKE, Cloud TPU, Open MPI).
        num_processes: how many processes there are.
        process_id: which of them this is, from 0.
        init_from: a finished run whose model this one starts from, as far as it fits.
        stages: settings of stages trained one after the other, each beginning from the one before;
            what a stage does not set is as for the whole run, and so is what a flag sets.
    """

    out: str | None = None
    seed: int = 0
    sample_images: int = 8
    parallel: Literal["jit", "fsdp", "pmap"] = "jit"
    data_on_device: Literal["auto", "yes", "no"] = "auto"
    cache_features: int = 0
    checkpoint_minutes: float = 10.0
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    init_from: str | None = None
    stages: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class TrainConfig(RunConfig, OptimConfig, LossConfig, ModelConfig, AugmentConfig, DataConfig):
    """All settings of a training run."""

    @property
    def run_dir(self) -> Path:
        """Where the run is written."""
        return Path(self.out or f"runs/{self.backbone}")

    def save(self, path: Path) -> None:
        """Write all settings as YAML, but for those of this launch alone."""
        values = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()
            if key not in LAUNCH
        }
        if self.batch_size == AUTO_BATCH_SIZE:
            values["batch_size"] = "auto"
        with replacing(path) as temporary:
            temporary.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


# What says where a run is computed, not what: it may differ when the run goes on.
LAUNCH = ("coordinator", "num_processes", "process_id")
GROUPS = (DataConfig, AugmentConfig, ModelConfig, LossConfig, OptimConfig, RunConfig)


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

    if config.batch_size != AUTO_BATCH_SIZE:
        at_least(1, "batch_size")
    at_least(1, "epochs", "latent_dim", "head_width", "image_size", "demo_ears")
    at_least(0, "learning_rate", "backbone_lr_scale", "weight_decay", "warmup_epochs", "clip_norm")
    at_least(0, *(f.name for f in dataclasses.fields(LossConfig) if f.name != "perceptual"))
    require(
        config.contrastive_temperature > 0,
        f"contrastive_temperature must be above 0, not {config.contrastive_temperature}",
    )
    at_least(1, "sample_images")
    at_least(0, "pixel_components", "pixel_steps")
    require(
        config.pixel_components == 0 or config.pixel_components >= config.latent_dim,
        f"pixel_components must be 0, or at least latent_dim ({config.latent_dim}), not "
        f"{config.pixel_components}",
    )
    require(
        config.pixel_components > 0 or not config.pixel_registration,
        "pixel_registration is of the pixel path: set pixel_components, to 512 say",
    )
    at_least(0, "box_margin", "max_bad", "val_fraction", "test_fraction")
    at_least(0, *(f.name for f in dataclasses.fields(AugmentConfig)))
    for name in ("aug_mirror", "aug_occlusion", "aug_occlusion_size"):
        value = getattr(config, name)
        require(value <= 1, f"{name} must be at most 1, not {value}")
    require(config.aug_crop < 1, "aug_crop must leave something of the image: below 1")
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
    at_least(1, "accumulate", "max_bad_steps", "keep_best")
    at_least(0, "patience")
    require(
        0 < config.layer_decay <= 1,
        f"layer_decay must be above 0 and at most 1, not {config.layer_decay}",
    )
    require(
        0 <= config.ema_decay < 1,
        f"ema_decay must be at least 0 and below 1, not {config.ema_decay}",
    )
    require(
        config.accumulate < 1 or config.batch_size % config.accumulate == 0,
        f"batch_size must be a multiple of accumulate, which {config.batch_size} is not of "
        f"{config.accumulate}",
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
    if values.get("batch_size") == "auto":
        values["batch_size"] = AUTO_BATCH_SIZE
    return TrainConfig(**values)
