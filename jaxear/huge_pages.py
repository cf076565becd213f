"""Memory in huge pages, which makes training on a CPU faster.

XLA on CPU asks for a step's temporary memory anew each time, and Linux hands it out zeroed, 4 kB at
a time: tens of thousands of faults per step. In pages of 2 MB they are gone. glibc reads the
setting when a program starts, so the program is started again.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

TUNABLE = "glibc.malloc.hugetlb=1"
_GLIBC = (2, 35)  # knows the tunable
_STATE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def restart_with_huge_pages() -> None:
    """Start this program again, in the same process, with huge pages for large arrays.

    Nothing happens where they cannot be had for the asking (other systems than Linux with glibc; a
    kernel that gives them always or never), or where `GLIBC_TUNABLES` is set already, which is how
    to do without: `GLIBC_TUNABLES= jaxear train ...`. To be called first in a program, before the
    imports that take seconds.
    """
    if "GLIBC_TUNABLES" in os.environ or not _can_be_asked_for():
        return
    os.environ["GLIBC_TUNABLES"] = TUNABLE
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _can_be_asked_for() -> bool:
    if sys.platform != "linux" or "CS_GNU_LIBC_VERSION" not in os.confstr_names:
        return False
    try:
        library = os.confstr("CS_GNU_LIBC_VERSION") or ""  # "glibc 2.36"
        version = tuple(int(part) for part in library.split()[-1].split(".")[:2])
        return version >= _GLIBC and "[madvise]" in _STATE.read_text()
    except (OSError, ValueError, IndexError):
        return False
