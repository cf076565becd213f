"""Settings from the command line and YAML files."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser  # pyright: ignore

from jaxear.config import GROUPS, TrainConfig, from_dict
from jaxear.errors import UserError


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
    for group in GROUPS:
        parser.add_class_arguments(group, help=(group.__doc__ or "").split("\n")[0].rstrip("."))
    return parser


def parse_train_options(argv: Sequence[str] | None = None) -> tuple[TrainConfig, bool]:
    """Settings of a training run from the command line, and whether to resume.

    Raises:
        UserError: an unknown setting, or one of the wrong type.
    """
    parser = train_parser()
    arguments = list(sys.argv[1:] if argv is None else argv)
    values = parser.parse(arguments).as_dict()
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
    return from_values(values), values["resume"]


def from_values(values: dict[str, Any]) -> TrainConfig:
    """The settings among parsed values."""
    return from_dict({k: v for k, v in values.items() if k not in ("config", "resume")})
