"""Writing the files that a user asked for."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from jaxear import files
from jaxear.errors import UserError


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """As `jaxear.files.replacing`.

    Raises:
        UserError: the file cannot be written, e.g. because the disk is full.
    """
    try:
        with files.replacing(path) as temporary:
            yield temporary
    except (OSError, SafetensorError) as error:  # safetensors has its own for a full disk
        raise UserError(
            f"Cannot write {path} ({error}); nothing was left there. Free some space, or choose "
            "another place with --out."
        ) from None
