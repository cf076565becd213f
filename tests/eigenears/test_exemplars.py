import numpy as np
import pytest

from jaxear.eigenears.exemplars import along, extremes, most_photographed


def test_extremes_are_of_different_subjects_by_rising_score():
    scores = np.asarray([-3.0, -2.9, -1.0, 0.0, 1.0, 2.0, 2.1, -2.0])
    subjects = np.asarray(["a", "a", "b", "c", "d", "e", "e", "f"])
    lowest, highest = extremes(scores, subjects, 2)
    assert lowest.tolist() == [0, 7]
    assert highest.tolist() == [4, 6]


def test_a_subject_stands_at_one_end_only():
    lowest, highest = extremes(np.asarray([-2.0, 2.0, -1.0, 1.0]), np.asarray(list("aabb")), 2)
    assert lowest.tolist() == [0]
    assert highest.tolist() == [3]
    lowest, highest = extremes(np.asarray([-2.0, 2.0]), np.asarray(["a", "a"]), 2)
    assert len(lowest) == len(highest) == 0


def test_of_those_at_a_place_the_most_typical_stands_for_it():
    scores = np.asarray([[1.0, 2.0], [0.8, 0.1], [0.7, 0.0], [0.0, 0.5], [2.6, 9.0]])
    rows = along(scores, 0, [0.0, 1.0, 3.0], np.arange(5))
    # At 1: row 1, as row 2 is out of reach and row 0 is not typical. At 3 nobody: the nearest.
    assert rows.tolist() == [3, 1, 4]
    assert along(scores, 1, [0.0], np.arange(5)).tolist() == [2]


def test_no_subject_stands_twice_and_some_places_may_stay_empty():
    scores = np.asarray([[-1.0, 0], [0.0, 0], [1.0, 0], [0.9, 3]])
    rows = along(scores, 0, [-1.0, 0.0, 1.0], np.asarray(["a", "a", "a", "b"]))
    assert sorted(rows.tolist()) == [-1, 0, 3]


@pytest.mark.parametrize(
    ("names", "n", "expected"),
    [("ccbbaad", 2, ["a", "b"]), ("abbbcc", 2, ["b", "c"]), ("abc", 2, []), ("aab", 3, ["a"])],
)
def test_subjects_are_shown_by_their_images_then_by_name(names, n, expected):
    assert most_photographed(np.asarray(list(names)), n) == expected
