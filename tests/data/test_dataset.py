"""Whole data sets: order, what is left out and why, and when that is too much."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console

from jaxear.data import load_images, load_records, prepare_image
from jaxear.data import progress as progress_module
from jaxear.data.records import Record
from jaxear.errors import UserError
from tests.data.conftest import write_image


@pytest.fixture
def records(tmp_path):
    """Twenty greys, the biggest pictures first so that threads finish out of order."""
    return [
        Record(
            write_image(tmp_path / f"{i:02}.png", (400 - 19 * i, 400 - 19 * i), (10 * i,) * 3), "s"
        )
        for i in range(20)
    ]


def spoil(record: Record) -> Record:
    record.path.write_bytes(b"no picture")
    return record


@pytest.mark.parametrize("workers", [None, 1, 8])
def test_pictures_come_in_the_order_of_the_records(records, workers):
    ears = load_images(records, image_size=16, workers=workers)
    assert ears.images.shape == (20, 16, 16, 3)
    assert ears.images.dtype == np.uint8
    assert ears.records == records
    assert len(ears) == 20
    np.testing.assert_array_equal(ears.images[:, 8, 8, 0], np.arange(20) * 10)


def test_settings_reach_every_picture(tmp_path):
    path = tmp_path / "x.png"
    write_image(path, (60, 30))
    record = Record(path, "s", "left", (10, 5, 20, 10))
    settings = {"image_size": 24, "fit": "crop", "margin": 0.2, "mirror_left": True}
    ears = load_images([record], **settings)
    np.testing.assert_array_equal(ears.images[0], prepare_image(record, **settings))
    with pytest.raises(UserError, match="megapixels"):
        load_images([record], **settings, max_pixels=1000)


def test_unreadable_pictures_are_listed_and_left_out(records, caplog):
    bad = [spoil(records[3]), spoil(records[0])]
    ears = load_images(records, image_size=16, max_bad=0.1)
    assert ears.records == [record for record in records if record not in bad]
    assert [record for record, _ in ears.rejected] == [records[0], records[3]]
    assert all("not an image" in reason for _, reason in ears.rejected)
    np.testing.assert_array_equal(
        ears.images[:, 8, 8, 0], [10 * i for i in range(20) if i not in (0, 3)]
    )
    assert len(caplog.records) == 1
    assert "2 of 20 images cannot be used" in caplog.text
    assert str(records[3].path) in caplog.text


def test_too_many_unreadable_pictures_are_an_error(records):
    spoil(records[3])
    spoil(records[0])
    with pytest.raises(UserError, match="2 of 20") as caught:
        load_images(records, image_size=16, max_bad=0.09)
    assert str(records[0].path) in str(caught.value)
    assert "max_bad=0.09" in str(caught.value)


def test_a_long_list_is_cut_after_ten(records):
    for record in records[:14]:
        spoil(record)
    with pytest.raises(UserError, match="and 4 more") as caught:
        load_images(records, image_size=16)
    assert str(caught.value).count("not an image") == 10


def test_nothing_readable_is_an_error_whatever_the_limit(records):
    with pytest.raises(UserError, match="1 of 1"):
        load_images([spoil(records[0])], image_size=16, max_bad=1.0)


def test_nothing_given_and_impossible_limits(records):
    with pytest.raises(UserError, match="empty"):
        load_images([], image_size=16)
    for max_bad in (-0.1, 5, float("nan")):
        with pytest.raises(UserError, match="between 0 and 1"):
            load_images(records, image_size=16, max_bad=max_bad)


def test_a_mistake_in_the_settings_is_not_taken_for_a_bad_picture(records):
    with pytest.raises(UserError, match="unknown fit"):
        load_images(records, image_size=16, fit="fill", max_bad=1.0)


@pytest.mark.parametrize(
    ("terminal", "progress", "shown"),
    [(True, True, True), (True, False, False), (False, True, False)],
)
def test_progress_bar_is_for_terminals(records, monkeypatch, terminal, progress, shown):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal)
    monkeypatch.setattr(progress_module, "Console", lambda **_: console)
    load_images(records, image_size=16, progress=progress)
    assert ("Reading images" in stream.getvalue()) is shown


def test_real_photographs(photographs):
    records = load_records(photographs / "ami")[:70]
    ears = load_images(records, image_size=64, mirror_left=True)
    assert len(ears) == 70
    assert not ears.rejected
    # Mirrored, the left ear looks towards the same side as the right ones.
    plain = load_images(records[:7], image_size=64)
    assert [(a != b).any() for a, b in zip(ears.images[:7], plain.images, strict=True)] == [
        record.side == "left" for record in records[:7]
    ]
