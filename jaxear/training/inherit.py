"""Start a run from another's model: what fits is taken over, and every part is accounted for."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxear.errors import UserError

logger = logging.getLogger(__name__)

BACKBONE = "encoder.backbone."


class Inheritance(NamedTuple):
    """Dotted paths of leaves: taken over, new (absent before or of another shape), left behind."""

    inherited: tuple[str, ...]
    new: tuple[str, ...]
    left_behind: tuple[str, ...]

    def report(self) -> str:
        """Which parts were taken over and which are new, by name, with their numbers of leaves."""
        lines = []
        for title, names in zip(("inherited", "new", "left behind"), self, strict=True):
            parts: dict[str, int] = {}
            for name in names:
                part = ".".join(name.split(".")[:3])
                parts[part] = parts.get(part, 0) + 1
            listed = ", ".join(f"{part} ({count})" for part, count in sorted(parts.items()))
            lines.append(f"{title}: {listed or 'nothing'}")
        return "\n".join(lines)


def inherit(
    shapes: Mapping[str, tuple[int, ...]], run_dir: str | Path, *, same_backbone: bool
) -> tuple[dict[str, jax.Array], Inheritance]:
    """The leaves of a run's best checkpoint that a new model can take over.

    Args:
        shapes: the new model's leaves: dotted path -> shape.
        run_dir: the run to inherit from.
        same_backbone: whether its backbone is the new model's; leaves of another are never taken.

    Returns:
        The leaves to take over, and the account of all.

    Raises:
        UserError: the run has no checkpoint, or nothing of it fits.
    """
    from jaxear.training.checkpoints import Checkpoints  # here, as Orbax takes long to import

    with Checkpoints(Path(run_dir) / "checkpoints", read_only=True) as checkpoints:
        found = checkpoints.load_leaves(checkpoints.find("best"))
    taken = {
        name: jnp.asarray(leaf)
        for name, leaf in found.items()
        if shapes.get(name) == np.shape(leaf) and (same_backbone or not name.startswith(BACKBONE))
    }
    if not taken:
        raise UserError(f"Nothing in {run_dir} fits this model: every part differs in shape.")
    account = Inheritance(
        tuple(sorted(taken)),
        tuple(sorted(shapes.keys() - taken.keys())),
        tuple(sorted(found.keys() - taken.keys())),
    )
    logger.info("From %s\n%s", run_dir, account.report())
    return taken, account
