"""Train, validation and test, divided by subject: no person is ever in two of them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from jaxear.data.records import Record
from jaxear.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Splits:
    """The records of each split, in the order that they were given in."""

    train: list[Record]
    val: list[Record]
    test: list[Record]

    def require(self, name: str) -> list[Record]:
        """The records of one split ("train", "val", "test"); a `UserError` if it is empty."""
        if name not in ("train", "val", "test"):
            raise UserError(f"unknown split {name!r}; known are train, val, test")
        if records := getattr(self, name):
            return records
        raise UserError(
            f"the {name} split is empty: no subject fell into it; give it a larger share, "
            "another seed or more subjects"
        )


def split_by_subject(
    records: Iterable[Record], *, val: float = 0.1, test: float = 0.1, seed: int = 0
) -> Splits:
    """Records divided by a hash of (seed, subject), which sends each subject to one split for good.

    What else is in the data set plays no part: adding files or subjects moves nobody, and neither
    does changing `val` move anybody out of test. The price is that the shares of subjects hold in
    expectation only: a share of 0.1 of 100 subjects is 4 to 16 of them in 97 of 100 seeds. A split
    that should have a share and got no subject is reported in the log, and is an error where it is
    used (`Splits.require`).

    Raises `UserError` for shares that leave nothing to train on, or if train comes out empty.
    """
    if not (val >= 0 and test >= 0 and val + test < 1):
        raise UserError(
            f"val={val} and test={test}: both must be at least 0 and their sum below 1, "
            "as the rest is for training"
        )
    splits = Splits([], [], [])
    subjects = set()
    for record in records:
        subjects.add(record.subject)
        position = _uniform(seed, record.subject)
        if position < test:
            splits.test.append(record)
        elif position < test + val:
            splits.val.append(record)
        else:
            splits.train.append(record)
    if not splits.train:
        raise UserError(
            f"nothing to train on: of {len(subjects)} subjects none fell into train with "
            f"val={val}, test={test}, seed={seed}; take smaller shares, another seed or more "
            "subjects"
        )
    for name, share in (("val", val), ("test", test)):
        if share > 0 and not getattr(splits, name):
            logger.warning("no subject of %d fell into %s (share %g)", len(subjects), name, share)
    return splits


def split_by_name(
    records: Iterable[Record], *, val: Collection[str] = (), test: Collection[str] = ()
) -> Splits:
    """Records divided by the names of their subjects, as a published protocol does; a subject in
    neither list is trained on.

    Raises `UserError` for a name in both lists or in no record, or if nobody is left to train on.
    """
    splits = Splits([], [], [])
    if both := set(val) & set(test):
        raise UserError(f"in val_subjects and in test_subjects: {', '.join(sorted(both))}")
    unknown = set(val) | set(test)
    for record in records:
        unknown.discard(record.subject)
        name = "test" if record.subject in test else "val" if record.subject in val else "train"
        getattr(splits, name).append(record)
    if unknown:
        raise UserError(f"no ear in the data is of the subjects {', '.join(sorted(unknown))}")
    if not splits.train:
        raise UserError("nothing to train on: all subjects are in val_subjects or test_subjects")
    return splits


def _uniform(seed: int, subject: str) -> float:
    """A number in [0, 1) that depends on nothing but its arguments, on any machine."""
    digest = hashlib.sha256(f"{seed}\n{subject}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
