"""Settings from the command line and YAML files."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Union

from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser  # pyright: ignore
from jsonargparse.typing import PositiveInt

from jaxear.config import GROUPS, OptimConfig, TrainConfig, from_dict
from jaxear.errors import UserError

_NOT_SETTINGS = ("config", "resume", "dry_run")


class Parser(ArgumentParser):
    """jsonargparse with a user's expectations: `--batch-size` is `--batch_size`, `--config` may
    stand anywhere and flags beat it, and a mistake is a short message (`UserError`)."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, allow_abbrev=False, exit_on_error=False, **kwargs)

    def parse(self, argv: Sequence[str] | None) -> Any:
        """Parse the arguments (those of the process by default)."""
        try:
            return self.parse_args(_normalize(sys.argv[1:] if argv is None else argv))
        except (ArgumentError, TypeError, ValueError) as error:
            message = str(error).strip().removeprefix("error: ")
            raise UserError(f"{message}\nSee {self.prog} --help.") from error


def _normalize(argv: Sequence[str]) -> list[str]:
    """Underscores in the names of flags, --config before everything else."""
    configs: list[str] = []
    others: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        flag, separator, value = argument.partition("=")
        if flag == "--config":
            configs += ["--config", value if separator else next(arguments, "")]
        elif flag.startswith("--"):
            others.append("--" + flag[2:].replace("-", "_") + separator + value)
        else:
            others.append(argument)
    return configs + others


def _flags(argv: Sequence[str]) -> set[str]:
    """The names of the settings given as flags."""
    return {a[2:].partition("=")[0] for a in _normalize(argv) if a.startswith("--")}


def train_parser() -> Parser:
    """The options of the train command: every setting, in groups."""
    parser = Parser(
        prog="jaxear train",
        usage="jaxear train [--config FILE] [--data DIR] [--backbone NAME] [--out DIR] [options]",
        description=(
            "Train a variational autoencoder of ears on a pretrained encoder, and make its "
            "eigenears. Settings come from their defaults, then from --config, then from flags; "
            "hyphens and underscores in a flag are alike. "
            "Example: jaxear train --backbone sam --data photographs/ --out runs/mine"
        ),
    )
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file of settings.")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in --out from its latest checkpoint, with its settings "
        "(flags given now beat them, e.g. --epochs).",
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="tell what the run would cost (parameters, FLOPs, memory, images/s, time) after a few "
        "steps, and leave nothing behind.",
    )
    for group in GROUPS:
        section = parser.add_argument_group((group.__doc__ or "").split("\n")[0].rstrip("."))
        section.add_class_arguments(group, as_group=False, skip={"batch_size"})
        if group is OptimConfig:
            section.add_argument(
                "--batch_size",
                type=Union[PositiveInt, Literal["auto"]],  # noqa: UP007  (as jsonargparse shows it)
                default=OptimConfig.batch_size,
                help="images per step, over all devices; auto takes the largest power of two (times"
                " the devices and --accumulate) whose step fits, by XLA's account, into 90 percent "
                "of an accelerator's memory, or 40 percent of a computer's available memory.",
            )
    return parser


class TrainOptions(NamedTuple):
    """What the train command was asked for: settings; to go on with a run; to tell its cost."""

    config: TrainConfig
    resume: bool
    dry_run: bool


def parse_train_options(argv: Sequence[str] | None = None) -> TrainOptions:
    """Settings of a training run from the command line, and what to do with them.

    Raises:
        UserError: an unknown setting, one of the wrong type, or two that are at odds.
    """
    parser = train_parser()
    arguments = list(sys.argv[1:] if argv is None else argv)
    values = parser.parse(arguments).as_dict()
    if values["resume"] and values["dry_run"]:
        raise UserError("--resume goes on with a run, --dry-run only tells what one would cost.")
    if values["resume"]:
        config_file = from_values(values).run_dir / "config.yaml"
        if not config_file.is_file():
            raise UserError(f"There is no run to resume: {config_file} is missing. Give its --out.")
        # The run's own settings first; what was given now is laid over them.
        given = [*_normalize(arguments)]
        base = ["--config", str(config_file)]
        values = parser.parse([*base, *given]).as_dict()
    if "stages" not in (flags := _flags(arguments)):
        # Flags beat the file, in its stages too.
        values["stages"] = [
            {name: value for name, value in stage.items() if name not in flags}
            for stage in values["stages"]
        ]
    return TrainOptions(from_values(values), values["resume"], values["dry_run"])


def from_values(values: dict[str, Any]) -> TrainConfig:
    """The settings among parsed values."""
    settings = {k: v for k, v in values.items() if k not in _NOT_SETTINGS}
    if settings["batch_size"] != "auto":
        settings["batch_size"] = int(settings["batch_size"])  # a plain one, for YAML
    return from_dict(settings)
