from __future__ import annotations

import time

import numpy as np

from jaxear.assessment import timing
from jaxear.assessment.coders import Code
from jaxear.assessment.timing import time_coder


class Sleeper:
    """Takes 2 ms for a batch and 1 ms for each ear; encoding takes twice as long."""

    name, numbers = "sleeper", 2

    def __init__(self):
        self.batches: list[int] = []

    def encode(self, images):
        self.batches.append(len(images))
        time.sleep(2 * (0.002 + 0.001 * len(images)))
        return Code(np.zeros((len(images), 2)))

    def decode(self, codes):
        time.sleep(0.002 + 0.001 * len(codes))
        return np.zeros((len(codes), 4, 4, 3))


def test_latency_is_of_one_ear_and_throughput_of_batches():
    coder = Sleeper()
    images = np.zeros((3, 4, 4, 3), np.uint8)
    times = time_coder(coder, images, repeats=5, batch_size=20)
    # Sleeping takes no less than it should, and on a busy machine it takes longer.
    assert 6 <= times["encode_ms"].value < 60
    assert 3 <= times["decode_ms"].value < times["encode_ms"].value
    assert 20 < times["encode_per_second"].value <= 20 / 0.044
    assert times["encode_per_second"].value < times["decode_per_second"].value <= 20 / 0.022
    for estimate in times.values():
        assert estimate.low <= estimate.value <= estimate.high
        assert (estimate.n, estimate.of) == (5, "repeats")
    assert set(coder.batches) == {1, 20}


def test_what_takes_long_is_not_repeated_often(monkeypatch):
    monkeypatch.setattr(timing, "LONGEST", 0.0)
    times = time_coder(Sleeper(), np.zeros((3, 4, 4, 3), np.uint8), repeats=50, batch_size=2)
    assert {estimate.n for estimate in times.values()} == {3}
