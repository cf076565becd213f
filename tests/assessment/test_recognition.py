from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score, roc_curve

from jaxear.assessment import recognition
from jaxear.assessment.recognition import drawn_rows, recognize, standardize


@pytest.fixture(scope="module")
def codes() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], np.ndarray]:
    """Of 24 subjects of 1 to 4 ears; "pca" is noisier. Axes of very different size."""
    rng = np.random.default_rng(0)
    subjects = np.repeat([f"s{i:02d}" for i in range(24)], rng.integers(1, 5, 24))
    _, numbers = np.unique(subjects, return_inverse=True)
    scale = np.asarray([10, 3, 1, 0.3, 0.1])
    centres = rng.normal(size=(24, 5))
    ears = {
        name: (centres[numbers] + noise * rng.normal(size=(len(subjects), 5))) * scale + 7
        for name, noise in (("model", 0.5), ("pca", 0.8))
    }
    training = {name: rng.normal(size=(200, 5)) * scale + 7 for name in ears}
    return ears, training, subjects


def test_codes_are_centred_and_whitened_by_those_of_training(codes):
    ears, training, _ = codes
    whitened = standardize(training["model"], training["model"], whiten=True)
    np.testing.assert_allclose(whitened.mean(axis=0), 0, atol=1e-9)
    np.testing.assert_allclose(np.cov(whitened.T), np.eye(5), atol=1e-9)
    centred = standardize(ears["model"], training["model"], whiten=False)
    np.testing.assert_allclose(centred, ears["model"] - training["model"].mean(axis=0))


def test_whitened_codes_compare_alike_in_any_units_and_axes(codes):
    ears, training, _ = codes
    mixing = np.random.default_rng(1).normal(size=(5, 5))

    def cosines(ears: np.ndarray, training: np.ndarray) -> np.ndarray:
        w = standardize(ears, training, whiten=True)
        w /= np.linalg.norm(w, axis=1, keepdims=True)
        return w @ w.T

    np.testing.assert_allclose(
        cosines(ears["model"] @ mixing + 3, training["model"] @ mixing + 3),
        cosines(ears["model"], training["model"]),
        atol=1e-6,
    )


def test_collapsed_directions_are_left_out(codes):
    ears, training, _ = codes
    rng = np.random.default_rng(2)

    def with_collapsed(x: np.ndarray) -> np.ndarray:
        return np.concatenate([x, 1e-3 * rng.normal(size=(len(x), 2))], axis=1)

    whitened = standardize(
        with_collapsed(ears["model"]), with_collapsed(training["model"]), whiten=True
    )
    assert whitened.shape[1] == 5
    few = standardize(ears["model"], training["model"][:3], whiten=True)
    assert few.shape[1] == 2
    assert np.isfinite(few).all()


def plain_figures(codes: np.ndarray, subjects: np.ndarray) -> dict[str, float]:
    """Rank-1, EER, AUC and verification rates, the long way."""
    codes = codes / np.linalg.norm(codes, axis=1, keepdims=True)
    cosine = codes @ codes.T
    hits = [
        subjects[np.argmax(np.where(np.arange(len(codes)) == i, -2, cosine[i]))] == subjects[i]
        for i in range(len(codes))
        if np.sum(subjects == subjects[i]) > 1
    ]
    first, second = np.triu_indices(len(codes), 1)
    genuine, scores = subjects[first] == subjects[second], cosine[first, second]
    far, vr, _ = roc_curve(genuine, scores, drop_intermediate=False)
    return {
        "rank1": float(np.mean(hits)),
        "eer": float(np.interp(0, far - (1 - vr), far)),
        "auc": float(roc_auc_score(genuine, scores)),
        "vr_at_far_1_percent": vr[far <= 0.01].max(),
        "vr_at_far_0_1_percent": vr[far <= 0.001].max(),
    }


def test_figures_and_curves_are_those_of_the_long_way(codes):
    ears, training, subjects = codes
    result = recognize(ears, training, subjects)
    expected = {}
    for coder in ("model", "pca"):
        mean, covariance = training[coder].mean(axis=0), np.cov(training[coder].T)
        whitening = np.linalg.cholesky(np.linalg.inv(covariance))  # any root: a turn of another
        expected[coder] = plain_figures((ears[coder] - mean) @ whitening, subjects)
        centred = plain_figures(ears[coder] - mean, subjects)
        expected[coder] |= {f"{name}_centred": centred[name] for name in ("rank1", "eer")}
    for coder, figures in expected.items():
        got = {name: estimate.value for name, estimate in result.estimates[coder].items()}
        assert got == pytest.approx(figures, abs=1e-6)
        assert result.curves[coder]["cmc"]["value"][0] == got["rank1"]
        roc = result.curves[coder]["roc"]
        at = np.interp(0.01, roc["far"], roc["value"])
        assert at == pytest.approx(figures["vr_at_far_1_percent"], abs=0.03)
    for name, estimate in result.estimates["difference"].items():
        difference = expected["model"][name] - expected["pca"][name]
        assert estimate.value == pytest.approx(difference, abs=1e-6)
    assert expected["model"]["rank1"] > expected["pca"]["rank1"] > 0.1
    rank1 = result.estimates["model"]["rank1"]
    counts = np.unique(subjects, return_counts=True)[1]
    assert (rank1.n, rank1.of) == (counts[counts > 1].sum(), "probes")
    genuine = (counts * (counts - 1) // 2).sum()
    assert result.estimates["pca"]["eer"].n == genuine


def test_intervals_of_differences_are_paired(codes):
    ears, training, subjects = codes
    same = recognize(
        {"a": ears["pca"], "b": ears["pca"]}, dict.fromkeys("ab", training["pca"]), subjects
    )
    for estimate in same.estimates["difference"].values():
        assert estimate[:3] == (0, 0, 0)
    for of in recognize(ears, training, subjects).estimates.values():
        assert all(e.low <= e.value <= e.high for e in of.values())
        assert of["auc"].low < of["auc"].high


@pytest.mark.parametrize(
    ("subjects", "reason"),
    [(np.arange(6), "1 images at most"), (np.zeros(6, int), "1 subjects")],
)
def test_where_identity_is_not_possible_it_says_why(subjects, reason):
    codes = {"model": np.random.default_rng(0).normal(size=(6, 3))}
    codes["pca"] = codes["model"]
    result = recognize(codes, codes, subjects)
    assert reason in result.reason
    assert (result.estimates, result.curves) == ({}, {})


def test_too_few_pairs_for_a_false_acceptance_rate_of_a_thousandth():
    codes = np.random.default_rng(0).normal(size=(12, 3))
    pair = {"model": codes, "pca": codes}
    result = recognize(pair, pair, np.arange(12) // 2)
    refused = result.estimates["model"]["vr_at_far_0_1_percent"]
    assert refused.value is None
    assert refused.note.startswith("60 impostor pairs")
    assert min(result.curves["model"]["roc"]["far"]) >= 1 / 60


def test_of_very_many_ears_whole_subjects_are_drawn(codes, monkeypatch):
    ears, training, subjects = codes
    rows = drawn_rows(subjects, most=20)
    kept = np.unique(subjects[rows])
    np.testing.assert_array_equal(rows, np.flatnonzero(np.isin(subjects, kept)))
    assert 20 <= len(rows) < 24
    np.testing.assert_array_equal(drawn_rows(subjects), np.arange(len(subjects)))
    monkeypatch.setattr(recognition, "drawn_rows", lambda subjects: rows)
    result = recognize(ears, training, subjects)
    assert f"{len(rows)} ears of {len(kept)} of the 24 subjects" in result.note
    assert result.estimates["model"]["rank1"].n <= len(rows)
