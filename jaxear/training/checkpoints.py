"""A run's checkpoints, kept by Orbax: the two latest and the best."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from jaxear.errors import UserError
from jaxear.training.state import TrainState

BEST_METRIC = "val_psnr"


class Checkpoints:
    """The folder `checkpoints/` of a run; use as a context, since saving goes on in the background.

    A checkpoint holds the training state and the metrics known when it was made, and becomes
    visible only when it is complete.
    """

    def __init__(self, folder: Path, *, read_only: bool = False):
        self.folder = folder.resolve()
        if read_only and not self.folder.is_dir():
            raise UserError(f"There are no checkpoints in {folder}; was the run ever started?")
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                read_only=read_only,
                create=not read_only,
                cleanup_tmp_directories=not read_only,
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(
                    [
                        checkpoint_managers.LatestN(2),
                        checkpoint_managers.BestN(
                            get_metric_fn=lambda metrics: metrics[BEST_METRIC],
                            n=1,
                            keep_checkpoints_without_metrics=False,
                        ),
                    ]
                ),
                best_fn=lambda metrics: metrics[BEST_METRIC],
            ),
            item_handlers={"state": ocp.StandardCheckpointHandler()},
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._manager.close()

    def save(self, state: TrainState, metrics: Mapping[str, float] | None = None) -> None:
        """Save the state in the background; without `metrics` it does not compete for the best."""
        step = int(state.step)
        if step in self.steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(_as_dict(state))),
            metrics=None if metrics is None else {BEST_METRIC: float(metrics[BEST_METRIC])},
        )

    def wait(self) -> None:
        """Wait until everything is on disk."""
        self._manager.wait_until_finished()

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, in order."""
        return sorted(self._manager.all_steps())

    def find(self, which: str | int = "latest") -> int:
        """The step of a checkpoint: "latest", "best" (of those with metrics, else the latest).

        Raises:
            UserError: there is none, or not this one.
        """
        steps = self.steps()
        if not steps:
            raise UserError(f"There is no complete checkpoint in {self.folder}.")
        if which == "latest":
            return steps[-1]
        if which == "best":
            best = self._manager.best_step()
            return steps[-1] if best is None else best
        if not str(which).isdigit() or int(which) not in steps:
            raise UserError(
                f"There is no checkpoint {which!r} in {self.folder}; there are "
                f"{', '.join(map(str, steps))}, besides 'best' and 'latest'."
            )
        return int(which)

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Load a checkpoint into the shapes, dtypes and shardings of `like`."""
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _as_dict(like)
        )
        restored: Any = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        )
        return TrainState(**restored["state"])

    def load_leaves(self, step: int) -> dict[str, np.ndarray]:
        """Parameters and buffers of a checkpoint alone, on the host, whatever saved them."""
        metadata: Any = self._manager.item_metadata(step)["state"]
        groups = ("trainable", "frozen", "buffers")
        checkpointer = ocp.PyTreeCheckpointer()
        wanted = {group: dict(metadata[group]) for group in groups}
        restored = checkpointer.restore(
            self.folder / str(step) / "state",
            args=ocp.args.PyTreeRestore(
                item=wanted,
                restore_args=jax.tree.map(
                    lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted
                ),
                partial_restore=True,
            ),
        )
        return {name: leaf for group in groups for name, leaf in restored[group].items()}


def _as_dict(state: TrainState) -> dict[str, Any]:
    return {
        "step": state.step,
        "trainable": state.trainable,
        "frozen": state.frozen,
        "buffers": state.buffers,
        "opt_state": state.opt_state,
    }
