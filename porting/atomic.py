"""Files that are there completely or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from jaxear.errors import UserError


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path to write to, which becomes `path` when all went well.

    Raises:
        UserError: the file cannot be written, e.g. because the disk is full.
    """
    path = Path(path)
    # In the same folder, or the replacement would not be atomic.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:  # safetensors has its own for a full disk
        raise UserError(
            f"Cannot write {path} ({error}); nothing was left there. Free some space, or choose "
            "another place with --out."
        ) from None
    finally:
        with contextlib.suppress(OSError):  # gone already where all went well
            temporary.unlink()
