"""Which real ears stand for a place in the space of scores: pure choices, by number.

Scores [n, k] are in standard deviations; what is returned are numbers of rows. No subject is taken
twice for one place, or for one row of places, as photographs of one person resemble each other for
reasons of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

WINDOW = 0.25
"""How near, in standard deviations, an ear's score has to be to stand for a place."""


def extremes(scores: np.ndarray, subjects: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The ears of the lowest and of the highest scores on one component.

    Args:
        scores: on the component, [m].
        subjects: whose each ear is, [m].
        n: how many at each end, one per subject; with few subjects fewer, and none at both ends.

    Returns:
        Rows of the lowest and of the highest, both by rising score.
    """
    order = np.argsort(scores, kind="stable")
    n = min(n, len(np.unique(subjects)) // 2)
    lowest = _first_of_each(order, subjects)[:n]
    taken = np.isin(subjects, subjects[lowest])
    highest = _first_of_each(order[::-1][~taken[order[::-1]]], subjects)[:n]
    return lowest, highest[::-1]


def along(
    scores: np.ndarray, component: int, places: Sequence[float], subjects: np.ndarray
) -> np.ndarray:
    """For each place on a component, the ear that stands there and is otherwise most typical.

    Of the ears within `WINDOW` of the place it is the one whose other scores have the least sum of
    squares; where there are none, the ear that comes nearest. Places far out choose first, having
    the fewest ears to choose from.

    Args:
        scores: on all components, [m, k].
        component: which, from 0.
        places: scores on it.
        subjects: whose each ear is, [m].

    Returns:
        Rows, one for each place; -1 where there are more places than subjects.
    """
    own = scores[:, component]
    others = np.square(np.delete(scores, component, axis=1)).sum(axis=1)
    rows = np.full(len(places), -1)
    free = np.ones(len(scores), bool)
    for i in sorted(range(len(places)), key=lambda i: -abs(places[i])):
        candidates = np.flatnonzero(free)
        if len(candidates) == 0:
            break
        distance = np.abs(own[candidates] - places[i])
        near = candidates[distance <= WINDOW]
        rows[i] = near[np.argmin(others[near])] if len(near) else candidates[np.argmin(distance)]
        free &= subjects != subjects[rows[i]]
    return rows


def most_photographed(subjects: np.ndarray, n: int) -> list[str]:
    """The n subjects with most images, of equal ones the first by name; none with one image."""
    names, counts = np.unique(subjects, return_counts=True)
    order = np.lexsort((np.arange(len(names)), -counts))
    return [str(names[i]) for i in order[:n] if counts[i] > 1]


def _first_of_each(order: np.ndarray, subjects: np.ndarray) -> np.ndarray:
    """Of rows in an order, the first of each subject, in that order."""
    _, first = np.unique(subjects[order], return_index=True)
    return order[np.sort(first)]
