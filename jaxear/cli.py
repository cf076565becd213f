"""The `jaxear` command: `jaxear train ...` is `python -m jaxear.train ...`, and so on."""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Sequence

from jaxear.process_memory import restart_to_keep_memory
from jaxear.version import __version__

COMMANDS = {
    "train": "train a variational autoencoder of ears, and make its eigenears",
    "evaluate": "measure a trained model on ears that it has never seen",
    "eigenears": "draw the principal directions in which a model's ears vary",
    "compare": "train on several backbones alike, and report which is better for ears",
    "explore": "move ears along their components, in the browser",
    "data": "prepare photographs once, for many trainings",
}
_MODULES = {
    "data": "jaxear.data.__main__",
    "eigenears": "jaxear.eigenears.__main__",
    "explore": "jaxear.explore.__main__",
}  # the others are called as their commands are


def usage() -> str:
    """What `jaxear --help` prints."""
    lines = [f"  {name:<12}{what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: jaxear COMMAND [options]",
            "",
            "Eigenears from variational autoencoders on pretrained encoders, in JAX.",
            "",
            *lines,
            "",
            "`jaxear COMMAND --help` tells more. To begin: jaxear train --config "
            "configs/quickstart.yaml",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code.

    Without `argv` it is this program's own command, and may start the program anew
    (`restart_to_keep_memory`).
    """
    if argv is None:
        restart_to_keep_memory()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"jaxear {__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"error: there is no command {name!r}\n\n{usage()}", file=sys.stderr)
        return 2
    module = importlib.import_module(_MODULES.get(name, f"jaxear.{name}"))
    if argv is None:
        gc.freeze()  # what is imported stays: looking through it again and again takes a second
    return module.main(rest)


if __name__ == "__main__":
    sys.exit(main())
