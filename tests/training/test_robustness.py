"""Nothing is lost, whatever happens to a run."""

import gc
import os
import resource
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from jaxear.data.pipeline import Batches
from jaxear.errors import UserError
from jaxear.model import create_vae, load_model, random_stream
from jaxear.train import main, train
from jaxear.training.batch import Resident, TrainBatch
from jaxear.training.checkpoints import Checkpoints, fingerprints
from jaxear.training.lock import exclusive
from jaxear.training.optimizer import create_optimizer, create_schedule
from jaxear.training.state import create_state, split_model
from jaxear.training.step import make_train_step
from scripts.kill_resume import kill_and_resume
from tests.training.tiny import tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("no_eigenears"),
    # Orbax's threads complain of files that are gone or cannot be written, beside what they raise.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
]


@pytest.fixture(autouse=True)
def _complaints_end_with_their_test():
    yield
    gc.collect()


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def leaves(run_dir, which="latest"):
    with Checkpoints(run_dir / "checkpoints", read_only=True) as checkpoints:
        return checkpoints.load_leaves(checkpoints.find(which))


def steps(run_dir):
    with Checkpoints(run_dir / "checkpoints", read_only=True) as checkpoints:
        return checkpoints.steps()


def assert_same_end(a, b):
    left, right = leaves(a), leaves(b)
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


# ------------------------------------------------------------------ damaged checkpoints


def largest_file(folder):
    return max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_is_used(run, finished, damage, capsys):
    *_, before, last = steps(run)
    damage(largest_file(run / "checkpoints" / str(last)))
    assert main(["--out", str(run), "--resume"]) == 0
    error = " ".join(capsys.readouterr().err.split())
    assert "put aside, and the one before is used" in error
    assert f"Going on after step {before}" in error
    assert list((run / "damaged").iterdir())
    assert_same_end(run, finished)


def test_a_model_is_not_loaded_from_a_damaged_checkpoint(run):
    last = steps(run)[-1]
    for file in (run / "checkpoints" / str(last) / "state").rglob("*"):
        if file.is_file() and file.stat().st_size > 4096:
            truncate(file)
    with pytest.raises(UserError, match="cannot be read"):
        load_model(run, checkpoint="latest")


def test_a_run_with_nothing_but_damaged_checkpoints_says_so(run, photographs):
    for step in steps(run):
        truncate(largest_file(run / "checkpoints" / str(step)))
    with pytest.raises(UserError, match=r"All checkpoints .* were damaged"):
        train(tiny(photographs, run), resume=True, progress=False)


def test_a_run_of_other_arrays_is_not_resumed_and_stays_as_it_is(run, photographs):
    before = steps(run)
    with pytest.raises(UserError, match=r"holds other arrays than this run has .*--init-from"):
        train(tiny(photographs, run, ema_decay=0.9, epochs=6), resume=True, progress=False)
    assert steps(run) == before
    assert not (run / "damaged").exists()


def test_what_a_killed_save_leaves_is_no_checkpoint(run, finished):
    last = steps(run)[-1]
    half = run / "checkpoints" / f"{last + 1}.orbax-checkpoint-tmp"
    shutil.copytree(run / "checkpoints" / str(last), half)
    assert main(["--out", str(run), "--resume"]) == 0
    assert steps(run)[-1] == last
    assert not half.exists()
    assert_same_end(run, finished)


def test_what_a_failed_save_still_writes_does_not_stop_the_next(run, finished):
    """Its first array has failed, and others are not written yet."""
    half = run / "checkpoints" / f"{steps(run)[-1] + 1}.orbax-checkpoint-tmp" / "state"
    half.mkdir(parents=True)
    ends = time.monotonic() + 1

    def write():
        while time.monotonic() < ends and half.is_dir():
            with suppress(FileNotFoundError):
                (half / str(time.monotonic_ns())).touch()

    with ThreadPoolExecutor(4) as pool:
        writers = [pool.submit(write) for _ in range(4)]
        with Checkpoints(run / "checkpoints") as checkpoints:
            assert not half.parent.exists()
            assert checkpoints.steps() == steps(finished)
        for writer in writers:
            writer.result()


def test_fingerprints_see_every_changed_bit():
    values = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    reference = fingerprints({"a": values})
    for bit in range(32):
        other = values.copy()
        other.view(np.uint32)[3, 2] ^= np.uint32(1 << bit)
        assert fingerprints({"a": other}) != reference
    half = jnp.asarray(values, jnp.bfloat16)
    assert fingerprints({"a": half}) != fingerprints({"a": half.at[3, 2].multiply(-1)})
    assert fingerprints({"n": jnp.arange(3)}) == {"n": 3}


# ------------------------------------------------------------------ a full disk


@pytest.fixture
def disk(monkeypatch):
    """`disk.fills_up_at(step)`: from the checkpoint of that step on, writes over 4 kB fail as they
    do on a full disk; `disk.has_room()` undoes it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    save = Checkpoints.save

    class Disk:
        def fills_up_at(self, step):
            def filling(self, state, metrics=None):
                if int(state.step) >= step:
                    self.wait()  # for the checkpoint before, which is written in the background
                    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
                save(self, state, metrics)

            monkeypatch.setattr(Checkpoints, "save", filling)

        def has_room(self):
            monkeypatch.setattr(Checkpoints, "save", save)
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    disk = Disk()
    yield disk
    disk.has_room()


def test_a_full_disk_stops_the_run_and_spoils_nothing(finished, photographs, tmp_path, disk):
    config = tiny(photographs, tmp_path / "run")
    disk.fills_up_at(6)
    with pytest.raises(UserError, match=r"The disk of .* is full.*--resume"):
        train(config, progress=False)
    disk.has_room()
    assert steps(tmp_path / "run") == [3]
    train(config, resume=True, progress=False)
    assert_same_end(tmp_path / "run", finished)


# ------------------------------------------------------------------ losses that are not finite


def test_a_step_that_is_not_finite_changes_nothing(tmp_path):
    config = tiny(tmp_path, tmp_path, ema_decay=0.9)
    model = create_vae(config, 32, rngs=random_stream(0))
    skeleton, parts = split_model(model)
    schedule = create_schedule(config, 5)
    optimizer = create_optimizer(config, schedule)
    state = create_state(parts, optimizer, average=True)
    step = jax.jit(make_train_step(config, skeleton, optimizer, schedule, 5))
    places = jnp.arange(8)
    images = jax.random.randint(jax.random.key(0), (8, 32, 32, 3), 0, 256, jnp.uint8)
    batch = TrainBatch(places, places, places, images)
    good, _ = step(state, Resident(), batch)
    name = "decoder.out.bias"
    sick = {**good.trainable, name: good.trainable[name] * jnp.nan}
    bad = type(good)(**{**vars(good), "trainable": sick})
    after, metrics = step(bad, Resident(), batch)
    assert metrics["bad_steps"] == after.bad_steps == 1
    assert after.step == 2
    for part in ("opt_state", "average", "buffers", "frozen"):
        before = jax.tree.leaves(getattr(bad, part))
        for x, y in zip(before, jax.tree.leaves(getattr(after, part)), strict=True):
            np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(
        after.trainable["decoder.out.kernel"], bad.trainable["decoder.out.kernel"]
    )
    well, metrics = step(
        type(good)(**{**vars(after), "trainable": good.trainable}), Resident(), batch
    )
    assert metrics["bad_steps"] == well.bad_steps == 0


def test_training_that_explodes_stops_and_names_the_images(photographs, tmp_path):
    run = tmp_path / "run"
    config = tiny(
        photographs, run, learning_rate=1e38, warmup_epochs=0.0, clip_norm=0.0, max_bad_steps=3
    )
    with pytest.raises(UserError, match="3 steps in a row") as stopped:
        train(config, progress=False)
    assert str(photographs) in str(stopped.value)
    assert "nothing was saved yet" in str(stopped.value)
    assert steps(run) == []


def test_training_that_explodes_late_leaves_the_last_good_checkpoint(run, photographs, finished):
    """Resumed with a rate that is far too high, it goes back to where it was well."""
    well = steps(run)[-1]
    wild = tiny(photographs, run, learning_rate=1e38, clip_norm=0.0, max_bad_steps=3, epochs=6)
    with pytest.raises(UserError, match=f"go on from step {well}"):
        train(wild, resume=True, progress=False)
    assert steps(run)[-1] == well
    assert_same_end(run, finished)


# ------------------------------------------------------------------ interruptions


def test_a_second_program_on_a_run_is_refused(run, photographs):
    with exclusive(run), pytest.raises(UserError, match=rf"Another program .*{os.getpid()}"):
        train(tiny(photographs, run), resume=True, progress=False)


def test_sigterm_saves_and_stops(photographs, tmp_path, monkeypatch, finished):
    taken = 0
    iterate = Batches.rows

    def rows(self, step):
        nonlocal taken
        taken += 1
        if taken == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return iterate(self, step)

    monkeypatch.setattr(Batches, "rows", rows)
    config = tiny(photographs, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt, match="saved at step"):
        train(config, progress=False)
    monkeypatch.undo()
    assert 0 < steps(tmp_path / "run")[-1] < 9
    train(config, resume=True, progress=False)
    assert_same_end(tmp_path / "run", finished)


def test_a_run_killed_before_its_first_checkpoint_starts_anew(photographs, tmp_path, finished):
    config = tiny(photographs, tmp_path / "run")
    config.run_dir.mkdir()
    config.save(config.run_dir / "config.yaml")
    train(config, resume=True, progress=False)
    assert_same_end(tmp_path / "run", finished)


def test_ten_kills_change_nothing(tmp_path):
    outcome = kill_and_resume(10, tmp_path, epochs=8, seconds=(1, 8), seed=0)
    assert outcome.kills == 10
    assert outcome.starts == 10 + outcome.runs
    assert not outcome.differ
