"""One run, one directory, one program at a time."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxear.errors import UserError


@contextmanager
def exclusive(run_dir: Path) -> Iterator[None]:
    """Hold the directory for the time of the context; the system lets go if the program dies.

    Raises:
        UserError: another program holds it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise UserError(
                f"Another program is training in {run_dir} (process {owner}). Wait for it, stop "
                "it, or give another --out."
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
