"""The plan of a study: which rows it has, and which of them cannot be run for want of weights."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from jaxear.backbones.registry import HYBRID, full_name, get_spec
from jaxear.backbones.weights import FORMAT, weights_path
from jaxear.config import TrainConfig, from_dict, validate
from jaxear.errors import UserError
from jaxear.training.logging import read_json, write_json

TITLES: Mapping[str, str] = {
    "sam_vit_b": "SAM ViT-B",
    "sam_vit_l": "SAM ViT-L",
    "sam_vit_h": "SAM ViT-H",
    "resnet50": "ResNet-50",
    "efficientnet_b3": "EfficientNet-B3",
    "tf_efficientnet_b3": "EfficientNet-B3 (TF)",
    "efficientnet_lite0": "EfficientNet-Lite0",
    "mobilenetv3_large_100": "MobileNetV3-L",
    "convnext_tiny": "ConvNeXt-T",
    "convnextv2_tiny": "ConvNeXt V2-T",
    "vgg16": "VGG-16",
    "hybrid": "SAM ViT-B + ResNet-50",
}
PRETRAINED, SCRATCH = "pretrained", "from scratch"
FINE_TUNED, FROZEN = "fine-tuned", "frozen"
WEIGHTS = (PRETRAINED, SCRATCH)
MODES = (FINE_TUNED, FROZEN)
DEFAULT_BACKBONES = ("resnet50", "mobilenet", "efficientnet_lite0", "convnext", "sam")

# What every run of the study shares, where nothing else is asked for. Two in ten subjects are held
# out, as differences between rows are tested over these.
PROTOCOL: Mapping[str, Any] = {
    "latent_dim": 128,
    "batch_size": 16,
    "test_fraction": 0.2,
    "demo_ears": 512,
    "checkpoint_minutes": 2.0,
}
# What tells the runs apart or follows from the budget, and is thus the study's to set.
OWN = ("backbone", "weights", "backbone_options", "freeze", "epochs", "seed", "out", "init_from",
       "stages", "data", "patience", "coordinator", "num_processes", "process_id")  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One line of the study's tables: a backbone, where it starts from, and how it is trained."""

    backbone: str
    weights: str
    mode: str = FINE_TUNED

    @property
    def key(self) -> str:
        """The name of its folder."""
        return f"{self.backbone}-{self.weights}-{self.mode}".replace(" ", "-")

    @property
    def title(self) -> str:
        return TITLES.get(self.backbone, self.backbone)

    @property
    def label(self) -> str:
        """What tables and figures call it; always says where its weights come from."""
        frozen = ", frozen" if self.mode == FROZEN else ""
        return f"{self.title}, {self.weights}{frozen}"


@dataclass(frozen=True)
class Study:
    """Everything that decides a study; kept as `study.json` in its folder.

    Attributes:
        backbones: full names, in the order of the tables.
        weights: of `WEIGHTS`, which are wanted.
        modes: of `MODES`. A frozen backbone that was never trained has nothing to show: frozen
            rows are pretrained ones.
        seeds: how many runs each row has, with seeds 0, 1, ...
        budget_steps: optimiser steps of a run, in whole epochs; or else
        budget_seconds: of training, at the pace measured before the row's first run.
        settings: of `TrainConfig`, the same for all runs.
        backbone_options: backbone -> its options.
    """

    backbones: tuple[str, ...]
    weights: tuple[str, ...] = WEIGHTS
    modes: tuple[str, ...] = MODES
    seeds: int = 2
    budget_steps: int | None = None
    budget_seconds: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    backbone_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def rows(self) -> list[Row]:
        """All rows, those that cannot be run among them."""
        return [
            Row(backbone, weights, mode)
            for backbone in self.backbones
            for weights in self.weights
            for mode in self.modes
            if mode == FINE_TUNED or weights == PRETRAINED
        ]

    def config(self, row: Row, seed: int, out: Path, *, epochs: int = 1) -> TrainConfig:
        """The settings of one run."""
        return from_dict(
            {
                **self.settings,
                "backbone": row.backbone,
                "backbone_options": dict(self.backbone_options.get(row.backbone, {})),
                "weights": "auto" if row.weights == PRETRAINED else "none",
                "freeze": "all" if row.mode == FROZEN else "none",
                "seed": seed,
                "epochs": epochs,
                "out": str(run_folder(out, row, seed)),
            }
        )

    @property
    def data(self) -> str | None:
        return self.settings.get("data")

    @property
    def budget(self) -> str:
        """In words."""
        if self.budget_seconds is not None:
            return f"{self.budget_seconds:g} seconds of training"
        return f"{self.budget_steps} steps"


def run_folder(out: Path, row: Row, seed: int) -> Path:
    """Where one run is written."""
    return out / "runs" / row.key / f"seed{seed}"


def make_study(
    *,
    backbones: tuple[str, ...] = DEFAULT_BACKBONES,
    weights: tuple[str, ...] = WEIGHTS,
    modes: tuple[str, ...] = MODES,
    seeds: int = 2,
    budget_steps: int | None = 90,
    budget_seconds: float | None = None,
    data: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Study:
    """A study from what a user gave.

    Args:
        backbones: full or short names.
        weights, modes, seeds, budget_steps, budget_seconds: see `Study`; one budget counts, that in
            seconds where it is given.
        data: photographs; synthetic ears without.
        settings: of `jaxear train`, over `PROTOCOL`; `backbone_options` by backbone.

    Raises:
        UserError: a name or a setting is unknown or cannot work, or is the study's own to set.
    """
    given = dict(settings or {})
    options = given.pop("backbone_options", {})
    if taken := sorted(given.keys() & set(OWN)):
        raise UserError(
            f"The study itself sets {', '.join(taken)}; leave that out of --config, and give "
            "--data, --backbones, --weights, --modes, --seeds or a budget."
        )
    for name, wanted, known in (("--weights", weights, WEIGHTS), ("--modes", modes, MODES)):
        if not wanted or set(wanted) - set(known):
            raise UserError(
                f"{name} must be some of {', '.join(map(repr, known))}, not {', '.join(wanted)!r}."
            )
    if not backbones:
        raise UserError("--backbones must name one backbone at least, such as resnet50.")
    if seeds < 1:
        raise UserError(f"--seeds must be 1 at least, not {seeds}.")
    for name, amount in (("steps", budget_steps), ("seconds", budget_seconds)):
        if amount is not None and amount <= 0:
            raise UserError(f"--budget-{name} must be above 0, not {amount:g}.")
    study = Study(
        backbones=tuple(dict.fromkeys(full_name(name) for name in backbones)),
        weights=tuple(w for w in WEIGHTS if w in weights),
        modes=tuple(m for m in MODES if m in modes),
        seeds=seeds,
        budget_steps=None if budget_seconds is not None else budget_steps,
        budget_seconds=budget_seconds,
        settings={**PROTOCOL, **given, "data": None if data is None else str(Path(data).resolve())},
        backbone_options={full_name(name): dict(value) for name, value in options.items()},
    )
    if not study.rows():
        raise UserError("Frozen backbones are pretrained ones: add pretrained to --weights.")
    validate(study.config(study.rows()[0], 0, Path()))
    return study


def save_study(study: Study, out: Path) -> None:
    """Keep the study in its folder, or check that it is the one that the folder already holds.

    Backbones, weights, modes and seeds may be others than before; runs that are there stay.

    Raises:
        UserError: the folder holds a study of another protocol.
    """
    path = out / "study.json"
    values = json.loads(json.dumps(dataclasses.asdict(study)))
    before = read_json(path)
    same = ("budget_steps", "budget_seconds", "settings")
    different = [
        f"{name} was {old!r}, now {new!r}"
        for name, old, new in _pairs(before, values, same)
        if before and old != new
    ]
    if different:
        raise UserError(
            f"{out} holds a study of another protocol, whose runs cannot be compared with these: "
            f"{'; '.join(different)}. Give the same settings, or another --out."
        )
    write_json(path, values)


def _pairs(before: Any, now: Any, names: tuple[str, ...]) -> list[tuple[str, Any, Any]]:
    pairs = []
    for name in names:
        old, new = before.get(name), now.get(name)
        if isinstance(new, dict):
            old = old or {}
            pairs += [(key, old.get(key), new.get(key)) for key in sorted({*old, *new})]
        else:
            pairs.append((name, old, new))
    return pairs


def load_study(out: Path) -> Study:
    """The study of a folder.

    Raises:
        UserError: there is none.
    """
    values = read_json(out / "study.json")
    if not values:
        raise UserError(
            f"There is no study in {out}: it has no study.json. Give the folder of one by --out, "
            "or leave out --report-only to begin one."
        )
    lists = {name: tuple(values.pop(name)) for name in ("backbones", "weights", "modes")}
    return Study(**lists, **values)


class WeightsFile(NamedTuple):
    """A ported file, and the checkpoint that it says it was made from."""

    backbone: str
    file: str
    source_file: str
    source_sha256: str
    source_url: str
    licence: str


def weights_files(backbone: str) -> list[WeightsFile]:
    """The ported files that a pretrained backbone needs, as far as they are there.

    Only their metadata is read. A hybrid needs those of its parts.

    Raises:
        UserError: one is missing, or does not say which checkpoint it comes from; the message
            begins with "weights missing" and tells the command that makes it.
    """
    names = ("sam_vit_b", "resnet50") if backbone == HYBRID else (backbone,)
    return [_weights_file(name) for name in names]


def _weights_file(backbone: str) -> WeightsFile:
    path, command = weights_path(backbone), get_spec(backbone).port_command
    if not path.is_file():
        raise UserError(f"weights missing, run `{command}`")
    try:
        with safe_open(path, framework="numpy") as file:
            facts = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
    except (SafetensorError, OSError, json.JSONDecodeError):
        facts = {}
    if facts.get("format") != FORMAT or facts.get("backbone") != backbone:
        raise UserError(f"weights missing: {path.name} is no port of {backbone}; run `{command}`")
    if not facts.get("source_sha256"):
        raise UserError(
            f"weights missing: {path.name} does not say which checkpoint it was made from; "
            f"run `{command}`"
        )
    return WeightsFile(
        backbone,
        path.name,
        str(facts.get("source_file") or ""),
        str(facts["source_sha256"]),
        str(facts.get("source_url") or ""),
        str(facts.get("licence") or ""),
    )


def missing_weights(row: Row) -> str:
    """Why a row cannot be run; empty where it can."""
    if row.weights != PRETRAINED:
        return ""
    try:
        weights_files(row.backbone)
    except UserError as error:
        return str(error)
    return ""
