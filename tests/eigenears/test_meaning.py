"""What components mean is found where it is known, and said so that it can be read."""

from __future__ import annotations

import json

import numpy as np
import pytest
from rich.console import Console

from jaxear.data.synthetic import FACTORS
from jaxear.eigenears.meaning import describe_components, meaning_figure, print_description
from jaxear.errors import UserError
from jaxear.figures import save_figure

N = 512


def standardised(x: np.ndarray) -> np.ndarray:
    return (x - x.mean()) / x.std()


@pytest.fixture(scope="module")
def case():
    """Scores of known composition, images that follow brightness and shift, and the factors."""
    rng = np.random.default_rng(0)
    factors = {
        f.name: np.float32(f.mean + f.std * np.clip(rng.normal(size=N), -f.reach, f.reach))
        for f in FACTORS
    }
    y, x = np.mgrid[-1:1:24j, -1:1:24j]
    right = 0.05 * standardised(factors["shift_x"])[:, None, None]
    size = (0.5 * factors["scale"])[:, None, None]
    ears = np.exp(-(np.hypot((x - right) / size, y / size / 1.4) ** 4))
    gain = (1 + 0.15 * standardised(factors["exposure"]))[:, None, None]
    images = np.clip((0.25 + 0.35 * ears) * gain, 0, 1)[..., None] * np.array([1.0, 0.8, 0.7])
    z = {name: standardised(values) for name, values in factors.items()}
    bend = standardised(z["light_azimuth"] ** 2)
    mixtures = [
        np.sqrt(0.5) * z["ear_length"] + np.sqrt(0.3) * bend - np.sqrt(0.15) * z["melanin"],
        np.sqrt(0.9) * z["exposure"] + np.sqrt(0.05) * z["concha_depth"],
        np.sqrt(0.95) * z["shift_x"],
    ]
    scores = np.stack(mixtures, axis=1) + np.sqrt(0.05) * rng.normal(size=(N, 3))
    return scores, np.float32(images), factors


@pytest.fixture(scope="module")
def described(case):
    return describe_components(*case)


@pytest.fixture(scope="module")
def photographs_described(case):
    scores, images, _ = case
    return describe_components(scores, images)


def test_components_are_made_of_what_they_were_made_of(described):
    first, second, third = described["components"]
    for name, share in {"ear_length": 0.5, "light_azimuth": 0.3, "melanin": 0.15}.items():
        assert abs(first["factors"][name] - share) < 0.06, name
    assert abs(first["anatomy_share"] - 0.5) < 4 * first["anatomy_share_se"] < 0.3
    assert abs(first["kinds"]["light"] - 0.3) < 0.07
    assert first["correlations"]["ear_length"] > 0.6 > 0 > first["correlations"]["melanin"]
    for component in described["components"]:
        assert abs(sum(component["kinds"].values()) + component["unexplained"] - 1) < 1e-9
        assert abs(sum(component["factors"].values()) - sum(component["kinds"].values())) < 1e-9
        assert abs(component["unexplained"] - 0.05) < 0.06
    assert second["kinds"]["camera"] > 0.8 > 0.1 > second["anatomy_share"]
    assert third["kinds"]["pose"] > 0.85


def test_the_scores_tell_the_factors_they_carry_and_no_others(described):
    r2 = {factor["name"]: factor["r2"] for factor in described["factors"]}
    assert r2.keys() == {factor.name for factor in FACTORS}
    assert r2["exposure"] > 0.8
    assert r2["shift_x"] > 0.8
    carried = {"ear_length", "light_azimuth", "melanin", "exposure", "concha_depth", "shift_x"}
    others = [value for name, value in r2.items() if name not in carried]
    assert abs(np.mean(others)) < 0.01
    assert max(others) < 0.06


def test_statistics_see_light_and_place_without_knowing_them(described, photographs_described):
    first, second, third = described["components"]
    # Brighter pictures have more contrast and colour here, and the three share what they explain.
    light = [second["statistics"][group] for group in ("brightness", "contrast", "colour")]
    assert min(light) > 0.15
    assert sum(light) > 0.8
    assert second["statistics_alone"]["brightness"] > 0.8
    assert third["statistics"]["position"] + third["statistics"]["shading"] > 0.9
    assert third["statistics_alone"]["position"] > 0.5 > 0.1 > third["statistics_alone"]["scale"]
    assert first["statistics_share"] < 0.1
    assert first["anatomy_at_most"] > 0.9
    shown = {statistic["name"]: statistic["kinds"] for statistic in described["image_statistics"]}
    assert shown["lightness"]["camera"] > 0.8
    assert shown["right"]["pose"] > 0.8
    # Light is no anatomy, which statistics, too, say of the last two; of the first they cannot.
    assert described["check"]["below_bound"] == 3
    assert described["check"]["mean_difference"] < -0.1
    for known, unknown in zip(
        described["components"], photographs_described["components"], strict=True
    ):
        assert unknown["statistics"] == known["statistics"]
        assert "anatomy_share" not in unknown


def test_sentences_can_be_quoted(described, photographs_described):
    sentence = described["components"][0]["sentence"]
    assert sentence.startswith("PC1: ")
    order = ["anatomy (ear_length", "light (light_azimuth", "skin (melanin", "unexplained."]
    places = [sentence.index(words) for words in order]
    assert places == sorted(places)
    assert "pose" not in sentence
    sentence = photographs_described["components"][2]["sentence"]
    assert "% follow from the picture's " in sentence
    assert "position" in sentence
    assert "colour" not in sentence
    assert "anatomy is" in sentence


def test_a_description_is_json(described):
    again = json.loads(json.dumps(described, allow_nan=False))
    assert again == described


def test_few_images_are_said_to_be_too_few(case, tmp_path):
    scores, images, factors = (
        {name: values[:40] for name, values in part.items()}
        if isinstance(part, dict)
        else part[:40]
        for part in case
    )
    description = describe_components(scores, images, factors)
    assert "40 images are too few for the shares of 12 statistics" in description["notes"][0]
    assert "36 factors: 144 are needed" in description["notes"][1]
    assert description["components"][0]["sentence"] == "PC1: too few images to say."
    save_figure(meaning_figure(description), tmp_path / "meaning")
    console = Console(record=True, width=120)
    print_description(description, console)
    assert "too few" in console.export_text()


def test_the_figure_shows_what_is_known(described, photographs_described, tmp_path):
    figure = meaning_figure(described)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert [title[0] for title in titles] == ["a", "b", "c"]
    rows = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert {"ear length", "light azimuth", "melanin", "exposure", "shift x"} <= set(rows)
    assert "blur" not in rows
    widths = sum(patch.get_width() for patch in figure.axes[1].patches)
    assert abs(widths - 3 * 100) < 8
    save_figure(figure, tmp_path / "known")
    assert (tmp_path / "known.pdf").stat().st_size > 5000
    only_bars = meaning_figure(photographs_described, n=2)
    assert len(only_bars.axes) == 1
    assert [label.get_text() for label in only_bars.axes[0].get_yticklabels()] == ["PC1", "PC2"]


def test_the_table_has_a_line_for_each_component(described):
    console = Console(record=True, width=140)
    print_description(described, console, n=2)
    text = console.export_text()
    assert "PC1" in text
    assert "PC3" not in text
    assert "ear_length" in text


def test_what_does_not_belong_together_is_refused(case):
    scores, images, factors = case
    with pytest.raises(UserError, match="do not describe 511 images"):
        describe_components(scores, images[1:])
    with pytest.raises(UserError, match=r"512 images with \[500\] values"):
        describe_components(scores, images, {"yaw": factors["yaw"][:500]})
    with pytest.raises(UserError, match=r"Unknown factors \['beauty'\]"):
        describe_components(scores, images, {"beauty": factors["yaw"]})
    with pytest.raises(UserError, match="not finite"):
        describe_components(scores * np.nan, images)
