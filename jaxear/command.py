"""What the commands have in common: how they log, and how they end."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

from rich.console import Console
from rich.logging import RichHandler

from jaxear.compilation_cache import keep_compiled_programs
from jaxear.errors import UserError
from jaxear.process_memory import keep_memory_of_jax


def run_command(command: Callable[[], None]) -> int:
    """Run a command; its exit code is 0, 2 after a user's mistake, 130 after an interruption.

    What JAX compiles for it is kept on disk, for the next start.

    A user's mistake is told in one message on stderr, without a traceback; anything else that goes
    wrong is a fault of the program and keeps its traceback.
    """
    console = Console(stderr=True)
    logger = logging.getLogger("jaxear")
    handler = RichHandler(console=console, show_path=False, show_time=False, markup=False)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    # Orbax speaks of its own affairs through absl; what goes wrong there is raised, too.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    keep_compiled_programs()
    if "jax" in sys.modules:  # commands that have not imported it compute little
        keep_memory_of_jax()
    try:
        command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interruption:
        print(f"\nInterrupted. {interruption}".rstrip(), file=sys.stderr)
        return 130
    finally:
        logger.removeHandler(handler)
        logger.propagate = True
    return 0
