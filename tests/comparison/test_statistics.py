"""Intervals against data whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from jaxear.comparison.statistics import (
    Replicates,
    holm,
    of_difference,
    of_row,
    p_above,
    p_below,
    seed_variance,
    subject_draws,
)


def test_draws_are_of_subjects_with_all_their_images_and_the_same_for_every_run():
    subjects = np.array(["b", "a", "b", "c", "a"])
    weights = subject_draws(subjects, 50)
    assert weights.shape == (50, 5)
    np.testing.assert_array_equal(weights[:, 0], weights[:, 2])
    per_subject = weights[:, [1, 0, 3]]  # a, b, c
    np.testing.assert_array_equal(per_subject.sum(axis=1), 3)
    order = [3, 0, 4, 2, 1]
    np.testing.assert_array_equal(subject_draws(subjects[order], 50), weights[:, order])


def test_without_seeds_the_interval_is_the_bootstraps():
    values = np.random.default_rng(0).normal(20, 2, 60)
    weights = subject_draws(np.arange(60).astype(str))
    means = weights @ values / 60
    figure = of_row(Replicates(np.array([values.mean()]), means[None]), seed_variance([]))
    assert figure.value == pytest.approx(values.mean())
    standard_error = values.std() / np.sqrt(60)
    assert figure.high - figure.low == pytest.approx(2 * 1.96 * standard_error, rel=0.06)
    assert p_above(figure.draws, figure.low) == pytest.approx(0.025, abs=0.002)
    assert p_below(figure.draws, figure.high) == pytest.approx(0.025, abs=0.002)


def test_intervals_of_paired_differences_hold_the_truth_as_often_as_they_say():
    """Two seeds of each of six rows, subjects that all rows share, seeds that differ."""
    rng = np.random.default_rng(1)
    n, rows, seeds, repeats, truth = 30, 6, 2, 300, 0.5
    weights = subject_draws(np.arange(n).astype(str), 500) / n
    held = 0
    for _ in range(repeats):
        subject = rng.normal(0, 3, n)  # cancels in a difference of rows
        own = rng.normal(0, 0.5, (rows, 1, n)) + rng.normal(0, 0.4, (rows, seeds, 1))
        values = subject + own + truth * (np.arange(rows) == 0)[:, None, None]
        measured = [Replicates(v.mean(axis=1), v @ weights.T) for v in values]
        between = seed_variance([row.values for row in measured])
        assert between.freedom == rows
        figure = of_difference(measured[0], measured[1], between)
        held += figure.low <= truth <= figure.high
    assert 0.91 <= held / repeats <= 0.985


def test_holm_against_an_example_done_by_hand():
    corrected = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert corrected == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.8, "b": 0.9}) == pytest.approx({"a": 1.0, "b": 1.0})
