from __future__ import annotations

import numpy as np
import pytest

from jaxear.assessment.measures import Estimate
from jaxear.assessment.plots import (
    Example,
    choose_examples,
    psnr_by_subject,
    recognition,
    reconstructions,
)

NAMES = {"model": "sam", "pca": "linear PCA"}


def test_examples_are_the_best_the_median_and_the_worst():
    psnr = np.random.default_rng(0).permutation(np.arange(30.0))
    chosen = choose_examples(psnr, np.arange(30))
    assert [group for group, _ in chosen] == ["best"] * 3 + ["median"] * 3 + ["worst"] * 3
    assert [psnr[row] for _, row in chosen] == [29, 28, 27, 16, 15, 14, 2, 1, 0]


def test_examples_are_of_different_subjects_where_there_are_enough():
    psnr = np.arange(30.0)[::-1]
    chosen = choose_examples(psnr, np.arange(30) // 2)
    assert [psnr[row] for _, row in chosen[:3]] == [29, 27, 25]
    chosen = choose_examples(psnr, np.arange(30) // 20)
    assert [psnr[row] for _, row in chosen[:3]] == [29, 28, 27]


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_of_few_ears_none_is_shown_twice(n):
    rows = [row for _, row in choose_examples(np.arange(float(n)), np.zeros(n))]
    assert len(set(rows)) == len(rows)
    assert len(rows) == (n if n < 3 else 3)


def test_reconstructions_stand_below_their_photographs():
    rng = np.random.default_rng(0)
    examples = [
        Example(
            group,
            rng.integers(0, 256, (8, 8, 3), dtype=np.uint8),
            {"model": rng.uniform(size=(8, 8, 3)), "pca": rng.uniform(size=(8, 8, 3))},
            {"model": 20 + i, "pca": 30 + i},
        )
        for i, group in enumerate(["best", "best", "worst"])
    ]
    figure = reconstructions(examples, NAMES, {"model": 8, "pca": 5})
    assert len(figure.axes) == 9
    for example, column in zip(examples, np.reshape(figure.axes, (3, 3)), strict=True):
        shown = [axes.images[0].get_array() for axes in column]
        np.testing.assert_array_equal(shown[0], example.image)
        for image, key in zip(shown[1:], ("model", "pca"), strict=True):
            np.testing.assert_array_equal(image, np.round(255 * example.reconstructions[key]))
        assert len({round(axes.get_position().x0, 9) for axes in column}) == 1
    texts = [text.get_text() for text in figure.texts]
    assert [text for text in texts if "dB" in text] == [
        "20.0 dB", "30.0 dB", "21.0 dB", "31.0 dB", "22.0 dB", "32.0 dB",
    ]  # fmt: skip
    assert texts.count("best") == texts.count("worst") == 1


@pytest.mark.parametrize("n", [2, 60])
def test_subjects_stand_in_the_order_of_their_gain(n):
    rng = np.random.default_rng(0)
    subjects = {
        f"s{i}": {"n_images": 2, "model": rng.uniform(20, 30), "pca": rng.uniform(20, 30)}
        for i in range(n)
    }
    estimates = {"model": Estimate(25, 24, 26), "pca": Estimate(24, 23, 25)}
    figure = psnr_by_subject(subjects, estimates, NAMES)
    axes = figure.axes[0]
    drawn = {line.get_label(): line for line in axes.lines}
    model = drawn["sam: mean 25.0 [24.0, 26.0] dB"].get_xdata()
    pca = drawn["linear PCA: mean 24.0 [23.0, 25.0] dB"].get_xdata()
    assert sorted(model) == sorted(s["model"] for s in subjects.values())
    gains = np.subtract(model, pca)
    np.testing.assert_array_equal(gains, np.sort(gains))
    labels = [label.get_text() for label in axes.get_yticklabels()]
    if n == 2:
        assert [subjects[label]["model"] for label in labels] == list(model)
    else:
        assert labels == []


def test_curves_are_drawn_with_their_bands():
    curve = {"value": [0.5, 0.75], "low": [0.4, 0.6], "high": [0.6, 0.9]}
    curves = {coder: {"cmc": curve, "roc": {"far": [0.01, 1.0], **curve}} for coder in NAMES}
    rate = Estimate(0.5, 0.4, 0.6)
    estimates = {coder: {"rank1": rate, "eer": rate} for coder in NAMES}
    figure = recognition(curves, estimates, NAMES)
    cmc, roc = figure.axes
    assert cmc.lines[0].get_label() == "sam: rank-1 50 % [40, 60]"
    np.testing.assert_allclose(cmc.lines[0].get_xydata(), [[1, 50], [2, 75]])
    np.testing.assert_allclose(roc.lines[0].get_xydata(), [[1, 50], [100, 75]])
    for axes in (cmc, roc):
        band = axes.collections[0].get_paths()[0].vertices[:, 1]
        assert (band.min(), band.max()) == pytest.approx((40, 90))
