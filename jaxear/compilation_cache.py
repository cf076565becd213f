"""Compiled programs kept on disk, so that a command's second start need not compile them again."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

CACHE_DIR = "~/.cache/jaxear/jax"
# What compiles faster is not worth a file; JAX's own limit is 1 (seconds).
MIN_COMPILE_SECONDS = 0.3


def keep_compiled_programs(folder: str | os.PathLike[str] = CACHE_DIR) -> None:
    """Let JAX, imported already or later, keep what it compiles in a folder and find it there.

    JAX's own settings go before: `JAX_COMPILATION_CACHE_DIR` names another folder, and
    `JAX_ENABLE_COMPILATION_CACHE=false` wants none. A folder that cannot be written is not used.
    What goes wrong later (a full disk, a damaged file) JAX warns of, and compiles.

    A program's key holds the versions of JAX and XLA, XLA's flags and the processor's features, so
    that machines that differ may share the folder.
    """
    if _is_set_already():
        return
    path = Path(folder).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except (OSError, RuntimeError) as error:  # RuntimeError where there is no home
        logger.info("Compiled programs are not kept: %s", error)
        return
    settings = {
        "jax_compilation_cache_dir": str(path),
        "jax_persistent_cache_min_compile_time_secs": MIN_COMPILE_SECONDS,
    }
    for name, value in settings.items():
        if "jax" in sys.modules:
            sys.modules["jax"].config.update(name, value)
        else:  # commands that show their help without JAX import it later
            os.environ.setdefault(name.upper(), str(value))


def _is_set_already() -> bool:
    if "jax" in sys.modules:
        config = sys.modules["jax"].config
        return bool(config.jax_compilation_cache_dir) or not config.jax_enable_compilation_cache
    enabled = os.environ.get("JAX_ENABLE_COMPILATION_CACHE", "true").lower()
    off = enabled not in ("y", "yes", "t", "true", "on", "1")  # as JAX reads it
    return off or "JAX_COMPILATION_CACHE_DIR" in os.environ
