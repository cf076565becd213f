"""Batches: the same order for every number of processes, every image once an epoch, read ahead."""

from __future__ import annotations

import threading
import time
from itertools import islice

import numpy as np
import pytest

from jaxear.config import DataConfig
from jaxear.data import EarImages
from jaxear.data.pipeline import Batches, load_split
from jaxear.data.records import Record
from jaxear.data.synthetic import synthetic_ears
from jaxear.errors import UserError


def ears_of(n: int) -> EarImages:
    """Images whose first pixel is their number."""
    pixels = np.zeros((n, 4, 4, 3), np.uint8)
    pixels[:, 0, 0, 0] = np.arange(n)
    return EarImages(pixels, [Record(f"{i}.png", str(i)) for i in range(n)], [])


def read_ahead_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("grain")]


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_the_global_batch_is_the_same_for_any_number_of_processes(process_count):
    ears = ears_of(50)
    one = Batches(ears, batch_size=8, seed=3)
    shares = [
        Batches(ears, batch_size=8, seed=3, process_index=i, process_count=process_count).iterate(4)
        for i in range(process_count)
    ]
    for step in range(4, 17):
        parts = [next(share) for share in shares]
        rows = np.concatenate([part.rows for part in parts])
        np.testing.assert_array_equal(rows, one.rows(step))
        np.testing.assert_array_equal(np.concatenate([p.positions for p in parts]), np.arange(8))
        images = np.concatenate([part.images for part in parts])
        np.testing.assert_array_equal(images[:, 0, 0, 0], rows)
        assert rows.dtype == parts[0].positions.dtype == np.int32
        assert images.dtype == np.uint8
    for share in shares:
        share.close()


def test_every_image_comes_once_at_most_in_an_epoch_and_epochs_differ():
    batches = Batches(ears_of(50), batch_size=8, seed=0)
    assert batches.steps_per_epoch == 6
    epochs = [np.concatenate([batches.rows(6 * e + i) for i in range(6)]) for e in range(40)]
    assert all(len(set(epoch)) == 48 for epoch in epochs)
    assert set(np.concatenate(epochs)) == set(range(50))
    assert (epochs[0] != epochs[1]).any()


def test_the_order_is_made_from_seed_and_step_alone():
    first, again = (
        Batches(ears_of(50), batch_size=8, seed=0),
        Batches(ears_of(50), batch_size=8, seed=0),
    )
    backwards = [again.rows(step) for step in reversed(range(30))][::-1]
    np.testing.assert_array_equal([first.rows(step) for step in range(30)], backwards)
    other = Batches(ears_of(50), batch_size=8, seed=1)
    assert (first.rows(0) != other.rows(0)).any()
    # Saved runs go on with the same data in later versions.
    np.testing.assert_array_equal(first.rows(7), [42, 0, 47, 1, 13, 22, 23, 15])


def test_iterating_from_a_step_goes_on_as_if_from_the_start():
    batches = Batches(ears_of(20), batch_size=3, seed=5)
    whole = [batch.rows for batch in batches.iterate(0, 30)]
    assert len(whole) == 30
    later = [batch.rows for batch in batches.iterate(11, 30)]
    np.testing.assert_array_equal(whole[11:], later)
    endless = batches.iterate(11)
    np.testing.assert_array_equal(whole[11:], [batch.rows for batch in islice(endless, 19)])
    endless.close()


def test_reads_ahead_in_threads_that_end_with_the_iterator():
    ears = ears_of(20)
    read = []
    take = ears.take
    ears.take = lambda rows: read.append(threading.current_thread()) or take(rows)
    before = set(read_ahead_threads())
    batches = Batches(ears, batch_size=4, seed=0).iterate(0)
    next(batches)
    deadline = time.monotonic() + 10
    while len(read) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(read) >= 3  # one was asked for
    assert threading.main_thread() not in read
    batches.close()
    while set(read_ahead_threads()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(read_ahead_threads()) - before


def test_a_failure_to_read_reaches_the_reader():
    ears = ears_of(20)

    def take(rows):
        raise OSError("the disk is gone")

    ears.take = take
    with pytest.raises(OSError, match="the disk is gone"):
        next(Batches(ears, batch_size=4, seed=0).iterate(0))


@pytest.mark.slow
def test_synthetic_ears_come_with_their_factors():
    config = DataConfig(image_size=48, demo_ears=24, test_fraction=0.3, split_seed=5)
    images, factors = synthetic_ears(5, 24, 48)
    found = []
    for split in ("train", "test"):
        ears = load_split(config, split)
        rows = [int(record.subject[-6:]) for record in ears.records]
        np.testing.assert_array_equal(ears.images, images[rows])
        assert ears.factors is not None
        assert ears.factors.keys() == factors.keys()
        for name, values in ears.factors.items():
            np.testing.assert_array_equal(values, factors[name][rows])
        found += rows
    assert len(set(found)) == len(found) > 12
    assert ears_of(3).factors is None


def test_batches_that_cannot_be():
    with pytest.raises(UserError, match="3 images, fewer than one batch of 4"):
        Batches(ears_of(3), batch_size=4, seed=0)
    with pytest.raises(UserError, match="batch of 9 cannot be shared evenly by 2"):
        Batches(ears_of(30), batch_size=9, seed=0, process_count=2)
