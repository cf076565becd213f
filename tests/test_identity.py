from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score, roc_curve

from jaxear.errors import UserError
from jaxear.identity import Comparisons, bootstrap_subjects, identity_metrics


def at_angles(*degrees: float) -> np.ndarray:
    """Codes in the plane, of different lengths, which must not matter."""
    radians = np.radians(degrees)
    lengths = np.arange(1, len(degrees) + 1)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1) * lengths[:, None]


@pytest.fixture
def noisy() -> tuple[np.ndarray, np.ndarray]:
    """30 subjects of 1 to 5 images, which overlap."""
    rng = np.random.default_rng(0)
    subjects = np.repeat(np.arange(30), rng.integers(1, 6, 30))
    rng.shuffle(subjects)
    centres = rng.normal(size=(30, 6))
    return centres[subjects] + 0.7 * rng.normal(size=(len(subjects), 6)), subjects


def test_subjects_apart_make_no_errors():
    codes = at_angles(0, 1, 90, 91, 180, 181)
    metrics = identity_metrics(codes, np.asarray(["a", "a", "b", "b", "c", "c"]))
    assert metrics["eer"] == 0
    for name in ("rank1", "auc", "vr_at_far_1_percent", "vr_at_far_0_1_percent"):
        assert metrics[name] == 1
    np.testing.assert_array_equal(metrics["cmc"], [1, 1, 1])
    assert (metrics["probes"], metrics["genuine_pairs"], metrics["impostor_pairs"]) == (6, 3, 12)


def test_codes_without_identity_are_right_half_of_the_time():
    rng = np.random.default_rng(0)
    metrics = identity_metrics(rng.normal(size=(900, 16)), np.arange(900) // 6)
    assert metrics["eer"] == pytest.approx(0.5, abs=0.03)
    assert metrics["auc"] == pytest.approx(0.5, abs=0.03)
    assert metrics["vr_at_far_1_percent"] == pytest.approx(0.01, abs=0.01)
    assert metrics["rank1"] < 0.04


def test_equal_codes_tell_nothing():
    code, lengths = np.random.default_rng(0).normal(size=50), np.linspace(0.1, 3, 9)
    metrics = identity_metrics(code * lengths[:, None], np.arange(9) // 3)
    np.testing.assert_array_equal(metrics["cmc"], [0, 0, 1])
    assert metrics["eer"] == metrics["auc"] == 0.5
    assert metrics["vr_at_far_1_percent"] == 0


def test_a_case_by_hand():
    # a at 0 and 40 degrees, b at 30 and 100, c alone at 170. Angles, nearest first: 10 impostor,
    # 30 i, 40 genuine, 60 i, 70 g, 70 i, 100 i, 130 i, 140 i, 170 i.
    codes, subjects = at_angles(0, 40, 30, 100, 170), np.asarray([0, 0, 1, 1, 2])
    metrics = identity_metrics(codes, subjects)
    # Probes: 0 has b (30) before a (40): rank 2; 40 has b (10): 2; 30 has a (10): 2; 100 has
    # a (60), then b and c alike (70): 3, as ties count against the probe.
    np.testing.assert_allclose(metrics["cmc"], [0, 0.75, 1])
    assert metrics["probes"] == 4
    # Points (FAR, VR): (2/8, 0), (2/8, 1/2), (3/8, 1/2), (4/8, 1), where 70 i and 70 g are one
    # step. On the last segment FAR = 3/8 + t/8 and FRR = 1/2 - t/2: equal at t = 1/5.
    assert metrics["eer"] == pytest.approx(0.4)
    assert metrics["auc"] == pytest.approx((1 / 8) * 0.5 + (1 / 8) * 0.75 + 4 / 8)
    assert metrics["vr_at_far_1_percent"] == 0
    np.testing.assert_allclose(metrics["roc_far"], [0, 0.25, 0.25, 0.375, 0.5, 1])
    np.testing.assert_allclose(metrics["roc_vr"], [0, 0, 0.5, 0.5, 1, 1])


def test_verification_rate_is_the_best_within_the_limit():
    # One genuine pair, more alike than most of the others.
    rng = np.random.default_rng(0)
    codes = np.concatenate([rng.normal(size=(60, 4)), np.eye(4)[:1], np.eye(4)[:1] + 0.2])
    subjects = np.append(np.arange(60), [60, 60])
    metrics = identity_metrics(codes, subjects)
    codes = codes / np.linalg.norm(codes, axis=1, keepdims=True)
    scores = (codes @ codes.T)[np.triu_indices(62, 1)]
    far = np.mean(np.delete(scores, -1) >= scores[-1])
    assert 0.001 < far < 0.01
    assert metrics["vr_at_far_1_percent"] == 1
    assert metrics["vr_at_far_0_1_percent"] == 0


def test_a_limit_that_is_met_exactly_is_kept():
    # 100 impostor pairs, one of them more alike than any genuine one.
    subjects = np.asarray([0, 0, 0, 1, 1, 2, 2, 3, 4, 5, 6, 7, 8, 9, 10])
    codes = np.eye(15)
    codes[14] = codes[13]
    codes[4] += codes[3]
    metrics = identity_metrics(codes, subjects)
    assert (metrics["genuine_pairs"], metrics["impostor_pairs"]) == (5, 100)
    assert metrics["vr_at_far_1_percent"] == 0.2
    assert metrics["vr_at_far_0_1_percent"] == 0


def test_roc_is_scikit_learns(noisy):
    codes, subjects = noisy
    metrics = identity_metrics(codes, subjects)
    codes = codes / np.linalg.norm(codes, axis=1, keepdims=True)
    pairs = np.triu_indices(len(codes), 1)
    scores, genuine = (codes @ codes.T)[pairs], subjects[pairs[0]] == subjects[pairs[1]]
    assert metrics["auc"] == pytest.approx(roc_auc_score(genuine, scores), abs=1e-6)
    far, vr, _ = roc_curve(genuine, scores)
    # All our corners are points of theirs; the equal area says that none is missing.
    curve = set(zip(far.round(9), vr.round(9), strict=True))
    ours = zip(metrics["roc_far"].round(9), metrics["roc_vr"].round(9), strict=True)
    assert curve.issuperset(ours)
    assert metrics["vr_at_far_1_percent"] == vr[far <= 0.01].max()
    crossing = np.argmax(far >= 1 - vr)
    low, high = sorted((far[crossing], 1 - vr[crossing - 1]))
    assert min(low, far[crossing - 1]) <= metrics["eer"] <= high


def test_cmc_counts_subjects_not_images(noisy):
    codes, subjects = noisy
    codes = codes / np.linalg.norm(codes, axis=1, keepdims=True)
    ranks = []
    for i in range(len(codes)):
        nearest = [j for j in np.argsort(-(codes @ codes[i])) if j != i]
        seen = list(dict.fromkeys(subjects[nearest]))  # by their nearest image
        if np.sum(subjects == subjects[i]) > 1:
            ranks.append(1 + seen.index(subjects[i]))
    expected = [np.mean(np.asarray(ranks) <= k) for k in range(1, 21)]
    np.testing.assert_allclose(identity_metrics(codes, subjects)["cmc"], expected)
    assert 0.2 < expected[0] < 0.9


def test_weights_count_comparisons_so_often(noisy):
    codes, subjects = noisy
    weights = np.random.default_rng(1).integers(0, 3, 30)[subjects]
    metrics = Comparisons(codes, subjects).metrics(weights)
    codes = codes / np.linalg.norm(codes, axis=1, keepdims=True)
    first, second = np.triu_indices(len(codes), 1)
    genuine = subjects[first] == subjects[second]
    counts = weights[first] * np.where(genuine, 1, weights[second])
    scores = (codes @ codes.T)[first, second]
    expected = roc_auc_score(genuine, scores, sample_weight=counts)
    assert metrics["auc"] == pytest.approx(expected, abs=1e-6)
    plain = identity_metrics(codes, subjects)
    doubled = Comparisons(codes, subjects).metrics(np.full(len(codes), 2))
    for name in ("rank1", "eer", "auc", "vr_at_far_1_percent"):
        assert doubled[name] == pytest.approx(plain[name], abs=1e-12)


def test_weights_bend_the_curve_where_it_was_straight():
    # Equal angles: 20 between the images of a and from a to b, 30 between those of b and to c.
    codes, subjects = at_angles(0, 20, 40, 70, 100), np.asarray([0, 0, 1, 1, 2])
    metrics = Comparisons(codes, subjects).metrics(np.asarray([1, 1, 3, 3, 1]))
    np.testing.assert_allclose(metrics["roc_far"], [0, 3 / 20, 6 / 20, 1])
    np.testing.assert_allclose(metrics["roc_vr"], [0, 1 / 4, 1, 1])


def test_figures_without_comparisons_are_nan():
    comparisons = Comparisons(at_angles(0, 1, 90), np.asarray([0, 0, 1]))
    only_impostors = comparisons.metrics(np.asarray([0, 0, 1]))
    assert np.isnan([only_impostors[name] for name in ("rank1", "eer", "auc")]).all()
    only_genuine = comparisons.metrics(np.asarray([2, 2, 0]))
    assert only_genuine["rank1"] == 1
    names = ("eer", "auc", "vr_at_far_1_percent", "vr_at_far_0_1_percent")
    assert np.isnan([only_genuine[name] for name in names]).all()


def test_bootstrap_draws_subjects_with_all_their_images():
    subjects = np.random.default_rng(0).permutation(np.repeat(np.arange(50), 4))
    seen = []

    def fn(weights: np.ndarray) -> float:
        seen.append(weights)
        return float(np.average(subjects, weights=weights))

    low, high = bootstrap_subjects(fn, subjects, n=400)
    weights = np.asarray(seen)
    assert (weights.sum(axis=1) == 200).all()
    of_subjects = weights[:, np.argsort(subjects)].reshape(400, 50, 4)
    assert (np.ptp(of_subjects, axis=2) == 0).all()
    # The mean of 50 draws from 0 .. 49: +- 1.96 standard errors; of 200 it would be half as wide.
    error = 1.96 * np.arange(50).std() / np.sqrt(50)
    assert low == pytest.approx(24.5 - error, abs=0.8)
    assert high == pytest.approx(24.5 + error, abs=0.8)
    assert bootstrap_subjects(fn, subjects, n=10) == bootstrap_subjects(fn, subjects, n=10)
    assert bootstrap_subjects(fn, subjects, n=10, seed=1) != bootstrap_subjects(fn, subjects, n=10)


def test_bootstrap_intervals_hold_the_figures(noisy):
    codes, subjects = noisy
    comparisons = Comparisons(codes, subjects)

    def figures(weights: np.ndarray | None = None) -> list[float]:
        metrics = comparisons.metrics(weights)
        return [metrics[name] for name in ("rank1", "eer", "auc")]

    low, high = bootstrap_subjects(figures, subjects, n=200)
    assert (low < figures()).all()
    assert (figures() < high).all()
    assert (high - low < 0.4).all()


def test_bootstrap_leaves_out_draws_without_a_figure():
    values = iter([np.nan, 1.0, np.nan, 3.0])
    assert bootstrap_subjects(lambda w: next(values), np.arange(3), n=4) == (1.05, 2.95)


@pytest.mark.parametrize(
    ("codes", "subjects", "what"),
    [
        (at_angles(0, 1), [0, 0], "1 subjects"),
        (at_angles(0, 1), [0, 1], "1 images at most"),
        (at_angles(0, 1, np.nan), [0, 0, 1], "finite"),
    ],
)
def test_codes_that_cannot_be_judged_are_refused(codes, subjects, what):
    with pytest.raises(UserError, match=what):
        identity_metrics(codes, np.asarray(subjects))
