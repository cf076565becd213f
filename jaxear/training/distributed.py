"""One run of several processes: each drives its own devices, all take the same steps."""

from __future__ import annotations

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxear.config import RunConfig
from jaxear.errors import UserError


def initialize(config: RunConfig) -> None:
    """Meet the other processes of the run, if there are any. Must precede all use of devices.

    Raises:
        UserError: the three settings are not given together, or the others cannot be reached.
    """
    given = (config.coordinator, config.num_processes, config.process_id)
    if all(value is None for value in given):
        return
    try:
        if config.coordinator == "auto":
            jax.distributed.initialize()
        elif any(value is None for value in given):
            raise UserError(
                "--coordinator, --num-processes and --process-id belong together; on a cluster, "
                "--coordinator auto finds all three."
            )
        else:
            jax.distributed.initialize(*given)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"The processes of this run did not meet: {error}") from error


def is_main() -> bool:
    """Whether this is the process that logs and draws."""
    return jax.process_index() == 0


def any_process(flag: bool) -> bool:
    """Whether the flag is up in any process; all of them must ask at the same point."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))
