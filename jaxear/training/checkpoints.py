"""A run's checkpoints, kept by Orbax: the two latest and the best ones."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from jaxear.errors import UserError
from jaxear.training.state import TrainState

logger = logging.getLogger(__name__)

BEST_METRIC = "val_psnr"
STATE, FINGERPRINTS = "state", "fingerprints"
_GROUPS = ("trainable", "frozen", "buffers")


class DamagedCheckpointError(UserError):
    """A checkpoint cannot be read, or holds other numbers than were saved."""


class Checkpoints:
    """The folder `checkpoints/` of a run; use as a context, as saving goes on in the background.

    A checkpoint holds the training state, a fingerprint of each of its arrays, and the metrics
    known when it was made, and becomes visible only when it is complete.

    Args:
        folder: where they are.
        read_only: change nothing there.
        keep_best: how many of the best are kept, beside the two latest.
        minutes: how long after a save the next is due; 0 is never.
    """

    def __init__(
        self, folder: Path, *, read_only: bool = False, keep_best: int = 1, minutes: float = 0.0
    ):
        self.folder = folder.resolve()
        self._seconds = 60 * minutes
        self._last_save = time.monotonic()
        if read_only and not self.folder.is_dir():
            raise UserError(f"There are no checkpoints in {folder}; was the run ever started?")
        if not read_only and jax.process_index() == 0:
            _remove_unfinished(self.folder)
        options = ocp.CheckpointManagerOptions(
            read_only=read_only,
            create=not read_only,
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(
                [
                    checkpoint_managers.LatestN(2),
                    checkpoint_managers.BestN(
                        get_metric_fn=lambda metrics: metrics[BEST_METRIC],
                        n=keep_best,
                        keep_checkpoints_without_metrics=False,
                    ),
                ]
            ),
            best_fn=lambda metrics: metrics[BEST_METRIC],
        )
        if read_only:
            options.multiprocessing_options = _alone()
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=options,
            item_handlers={
                STATE: ocp.StandardCheckpointHandler(),
                FINGERPRINTS: ocp.JsonCheckpointHandler(),
            },
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

    def is_due(self) -> bool:
        """Whether it is time to save without waiting for the epoch's end."""
        return 0 < self._seconds <= time.monotonic() - self._last_save

    def save(self, state: TrainState, metrics: Mapping[str, float] | None = None) -> None:
        """Save the state in the background; without `metrics` it does not compete for the best."""
        step = int(state.step)
        self._last_save = time.monotonic()
        if step in self.steps():
            return
        tree = _as_dict(state)
        prints = {k: int(v) for k, v in fingerprints(_flat(tree)).items()}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                **{
                    STATE: ocp.args.StandardSave(tree),
                    FINGERPRINTS: ocp.args.JsonSave(prints),
                }
            ),
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

    def restore_latest(self, like: TrainState) -> TrainState:
        """The newest checkpoint that is whole, in the shapes, dtypes and shardings of `like`.

        Damaged ones are named in the log and put aside, into `damaged/` beside the folder. Without
        any checkpoint, as after a start that was killed early, it is `like` itself.

        Raises:
            UserError: there are checkpoints, and all of them are damaged.
        """
        for step in reversed(self.steps()):
            try:
                state = self._restore(step, like)
            except DamagedCheckpointError as error:
                logger.warning("%s It is put aside, and the one before is used.", error)
                self._put_aside(step)
            else:
                logger.info("Going on after step %d", step)
                return state
        if (self.folder.parent / "damaged").is_dir():
            raise UserError(
                f"All checkpoints in {self.folder} were damaged and are in "
                f"{self.folder.parent / 'damaged'} now. To start anew, remove both folders."
            )
        logger.warning("There was no checkpoint yet in %s; starting at step 0.", self.folder)
        return like

    def _restore(self, step: int, like: TrainState) -> TrainState:
        abstract = jax.tree.map(_abstract, _as_dict(like))
        with _damage(self.folder / str(step)):
            expected = self._fingerprints(step)
        if expected.keys() != (names := _flat(abstract).keys()):
            raise UserError(
                f"The checkpoint {self.folder / str(step)} holds other arrays than this run has "
                f"({len(expected.keys() ^ names)} differ): the settings were changed, or another "
                "version of jaxear saved it. Resume with what it was made with, or start another "
                "run from its model: --init-from."
            )
        with _damage(self.folder / str(step)):
            restored: Any = self._manager.restore(
                step, args=ocp.args.Composite(**{STATE: ocp.args.StandardRestore(abstract)})
            )
        self._verify(step, _flat(restored[STATE]), expected)
        return TrainState(**restored[STATE])

    def _fingerprints(self, step: int) -> dict[str, int]:
        """Those that were saved with a checkpoint."""
        restored: Any = self._manager.restore(
            step, args=ocp.args.Composite(**{FINGERPRINTS: ocp.args.JsonRestore()})
        )
        return restored[FINGERPRINTS]

    def _verify(self, step: int, leaves: Mapping[str, Any], expected: Mapping[str, int]) -> None:
        wrong = [name for name, value in fingerprints(leaves).items() if expected[name] != value]
        if wrong:
            raise DamagedCheckpointError(
                f"The checkpoint {self.folder / str(step)} is damaged: {len(wrong)} arrays are not "
                f"as they were saved, {wrong[0]} first."
            )

    def _put_aside(self, step: int) -> None:
        if jax.process_index() == 0:
            damaged = self.folder.parent / "damaged"
            damaged.mkdir(exist_ok=True)
            (self.folder / str(step)).rename(damaged / f"{step}-{time.time_ns()}")
        self._manager.reload()

    @staticmethod
    def _reader() -> ocp.Checkpointer:
        handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=_alone())
        return ocp.Checkpointer(handler, multiprocessing_options=_alone())

    def load_leaves(self, step: int) -> dict[str, np.ndarray]:
        """The arrays of a checkpoint's model, on the host, whatever saved them.

        Where training kept a moving average of the parameters, it is that.

        Raises:
            UserError: the checkpoint is damaged.
        """
        folder = self.folder / str(step)
        with _damage(folder):
            metadata: Any = self._manager.item_metadata(step)[STATE]
            wanted = {group: dict(metadata[group]) for group in (*_GROUPS, "average")}
            if wanted["average"]:
                wanted["trainable"] = {}
            wanted = {group: leaves for group, leaves in wanted.items() if leaves}
            restored = self._reader().restore(
                folder / STATE,
                args=ocp.args.PyTreeRestore(
                    item=wanted,
                    restore_args=jax.tree.map(
                        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted
                    ),
                    partial_restore=True,
                ),
            )
            expected = self._fingerprints(step)
        self._verify(step, _flat(restored), expected)
        return {name: leaf for group in restored.values() for name, leaf in group.items()}


def _remove_unfinished(folder: Path, seconds: float = 10.0) -> None:
    """Remove what saves that never ended have left.

    Orbax's own removal gives up where a file appears meanwhile: where the disk was full, the save
    ends with the first array that does not fit, and others of it are still being written.
    """
    until = time.monotonic() + seconds
    for unfinished in folder.glob(f"*{ocp.step.TMP_DIR_SUFFIX}"):
        while unfinished.exists():
            shutil.rmtree(unfinished, ignore_errors=time.monotonic() < until)
            time.sleep(0.01)


def _alone() -> ocp.options.MultiprocessingOptions:
    """Reading concerns this process alone: the others of the run need not wait for it."""
    me = jax.process_index()
    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    return ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"reader{me}"
    )


def fingerprints(leaves: Mapping[str, Any]) -> dict[str, int]:
    """One number for each array, the same however it is cut over devices.

    The sum of its words of 32 bits (16 or 8 for narrower types) modulo 2^32: exact in any order,
    and never the same when one of them has changed.
    """
    return {name: _fingerprint(leaf) for name, leaf in leaves.items()}


def _fingerprint(leaf: Any) -> int:
    if getattr(leaf, "is_fully_addressable", True) or leaf.is_fully_replicated:
        x = np.ascontiguousarray(leaf)
        return int(x.reshape(-1).view(_word(x.dtype)).sum(dtype=np.uint32))
    return int(_sum_of_words(leaf))


@jax.jit
def _sum_of_words(x: jax.Array) -> jax.Array:
    words = jax.lax.bitcast_convert_type(x, _word(x.dtype))
    return jnp.sum(words.astype(jnp.uint32), dtype=jnp.uint32)


def _word(dtype: Any) -> np.dtype:
    return np.dtype(f"uint{8 * min(np.dtype(dtype).itemsize, 4)}")


@contextmanager
def _damage(folder: Path) -> Iterator[None]:
    """What a checkpoint's reader raises on files that are not as they were written."""
    try:
        yield
    except Exception as error:
        # TensorStore's errors come as bare Exceptions, too. Others are faults of the program.
        if isinstance(error, UserError) or not (
            isinstance(error, (OSError, ValueError, KeyError)) or type(error) is Exception
        ):
            raise
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise DamagedCheckpointError(
            f"The checkpoint {folder} cannot be read ({first_line[:200]})."
        ) from error


def _abstract(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    return leaf


def _as_dict(state: TrainState) -> dict[str, Any]:
    return {
        "step": state.step,
        **{group: getattr(state, group) for group in _GROUPS},
        "opt_state": state.opt_state,
        "average": state.average,
        "bad_steps": state.bad_steps,
    }


def _flat(tree: Any) -> dict[str, Any]:
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in paths}
