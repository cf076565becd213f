"""A full disk, told as what it is."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxear.errors import UserError

_CODES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# TensorStore, which writes the checkpoints, has no codes to ask for.
_SIGNS = ("RESOURCE_EXHAUSTED", "No space left", "File too large")


def is_disk_full(error: BaseException) -> bool:
    """Whether a write failed for want of room."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _CODES
    return any(sign in str(error) for sign in _SIGNS)


@contextmanager
def disk_may_be_full(run_dir: Path) -> Iterator[None]:
    """Raises UserError in place of what is raised when there is no room to write in a run."""
    try:
        yield
    except (OSError, ValueError) as error:
        if not is_disk_full(error):
            raise
        raise UserError(
            f"The disk of {run_dir} is full. The checkpoints before this are intact; make room and "
            f"go on with: jaxear train --out {run_dir} --resume"
        ) from error
