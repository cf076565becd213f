"""Subjects stay whole, stay put, and are shared out as asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxear.data.records import Record
from jaxear.data.splits import split_by_name, split_by_subject
from jaxear.errors import UserError


def records(subjects: int, each: int = 3) -> list[Record]:
    return [
        Record(Path(f"{subject:03}_{number}.jpg"), f"{subject:03}")
        for subject in range(subjects)
        for number in range(each)
    ]


def home(given: list[Record], **settings) -> dict[str, str]:
    splits = split_by_subject(given, **settings)
    return {
        record.subject: name
        for name in ("train", "val", "test")
        for record in getattr(splits, name)
    }


def test_every_record_is_in_one_split_and_no_subject_in_two():
    given = records(200)
    splits = split_by_subject(given)
    everything = splits.train + splits.val + splits.test
    assert sorted(everything, key=str) == sorted(given, key=str)
    names = [
        {record.subject for record in part} for part in (splits.train, splits.val, splits.test)
    ]
    assert sum(map(len, names)) == len(set.union(*names)) == 200
    assert splits.train == [record for record in given if record.subject in names[0]]


def test_shares_hold_in_expectation():
    places = list(home(records(5000, 1), val=0.2, test=0.1).values())
    assert places.count("val") / 5000 == pytest.approx(0.2, abs=0.02)
    assert places.count("test") / 5000 == pytest.approx(0.1, abs=0.02)


def test_more_files_and_subjects_move_nobody():
    before, after = home(records(100, 1)), home(records(300, 5))
    assert all(after[subject] == place for subject, place in before.items())


def test_order_does_not_matter_and_the_seed_does():
    assert home(records(100)) == home(records(100)[::-1])
    assert home(records(100), seed=1) != home(records(100), seed=0)


def test_the_split_is_the_same_on_every_machine_and_in_every_version():
    held_out = {subject: place for subject, place in home(records(40)).items() if place != "train"}
    assert held_out == {
        "004": "val",
        "005": "val",
        "007": "val",
        "010": "test",
        "013": "val",
        "015": "test",
        "016": "test",
        "017": "val",
        "018": "test",
        "027": "test",
        "034": "test",
    }


def test_changing_val_leaves_test_alone():
    few, many = home(records(300), val=0.05), home(records(300), val=0.4)
    assert {s for s, p in few.items() if p == "test"} == {s for s, p in many.items() if p == "test"}


def test_empty_split_is_reported_and_an_error_where_it_is_used(caplog):
    splits = split_by_subject(records(2), seed=0)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (6, 0, 0)
    assert "no subject of 2 fell into val" in caplog.text
    assert splits.require("train") == splits.train
    with pytest.raises(UserError, match="val split is empty"):
        splits.require("val")
    with pytest.raises(UserError, match="unknown split 'valid'"):
        splits.require("valid")


def test_no_share_no_report(caplog):
    splits = split_by_subject(records(2), val=0, test=0)
    assert len(splits.train) == 6
    assert caplog.text == ""


def test_nothing_to_train_on():
    with pytest.raises(UserError, match="nothing to train on"):
        split_by_subject(records(1), val=0.49, test=0.5, seed=2)


@pytest.mark.parametrize(("val", "test"), [(0.5, 0.5), (-0.1, 0.1), (1, 0), (float("nan"), 0)])
def test_impossible_shares(val, test):
    with pytest.raises(UserError, match="below 1"):
        split_by_subject(records(10), val=val, test=test)


def test_subjects_named_for_a_split_are_all_of_it():
    splits = split_by_name(records(4), val=["001"], test=["003"])
    assert {r.subject for r in splits.val} == {"001"}
    assert {r.subject for r in splits.test} == {"003"}
    assert {r.subject for r in splits.train} == {"000", "002"}
    with pytest.raises(UserError, match="no ear in the data is of the subjects 9"):
        split_by_name(records(4), val=["9"])
    with pytest.raises(UserError, match="in val_subjects and in test_subjects: 001"):
        split_by_name(records(4), val=["001"], test=["001"])
    with pytest.raises(UserError, match="nothing to train on"):
        split_by_name(records(1), val=["000"])
