"""Memory that a process keeps, in huge pages, which makes training on a CPU faster.

XLA on CPU asks for a step's temporary memory anew each time, gigabytes of it. By default glibc gets
as much from Linux and gives it back after the step, and Linux hands it out zeroed, 4 kB at a time:
hundreds of thousands of faults per step. Kept by the process, and in pages of 2 MB, there are none
after the first steps. The price is memory that stays with the process where holes are left in it.
glibc reads such settings when a program starts, so the program is started again.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Nothing is too large for the heap, and the heap never shrinks.
KEPT = (
    "glibc.malloc.mmap_threshold=1000000000000",
    "glibc.malloc.trim_threshold=1000000000000",
)
HUGE_PAGES = "glibc.malloc.hugetlb=1"
_GLIBC = (2, 35)  # knows all of these
_STATE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def restart_to_keep_memory() -> None:
    """Start this program again, in the same process, with memory that it keeps.

    Nothing happens on other systems than Linux with glibc, or where `GLIBC_TUNABLES` is set
    already, which is how to do without: `GLIBC_TUNABLES= jaxear train ...`. To be called first in a
    program, before the imports that take seconds.
    """
    if "GLIBC_TUNABLES" in os.environ or not (settings := tunables()):
        return
    os.environ["GLIBC_TUNABLES"] = settings
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def keep_memory_of_jax() -> None:
    """Let JAX, before its first computation, ask for a step's memory where it is kept.

    Only the heap of the main thread takes arrays of more than 64 MB, so XLA on CPU must not hand
    its computations to other threads. They still share the work; the caller waits for the end, as
    the commands do anyway. Nothing happens in a program that has not been started by
    `restart_to_keep_memory`. (One heap for all threads, by glibc's `arena_max`, keeps as much, but
    compiling takes half as long again, as XLA's threads wait for each other there.)
    """
    settings = tunables()
    if settings and os.environ.get("GLIBC_TUNABLES") == settings:
        import jax

        jax.config.update("jax_cpu_enable_async_dispatch", False)


def tunables() -> str:
    """The settings for this system, as `GLIBC_TUNABLES` has them; empty where there are none.

    Huge pages are asked for where the kernel gives them for the asking, not always or never.
    """
    if sys.platform != "linux" or "CS_GNU_LIBC_VERSION" not in os.confstr_names:
        return ""
    try:
        library = os.confstr("CS_GNU_LIBC_VERSION") or ""  # "glibc 2.36"
        version = tuple(int(part) for part in library.split()[-1].split(".")[:2])
    except (OSError, ValueError, IndexError):
        return ""
    if version < _GLIBC:
        return ""
    try:
        asked = "[madvise]" in _STATE.read_text()
    except OSError:
        asked = False
    return ":".join((*KEPT, HUGE_PAGES) if asked else KEPT)
