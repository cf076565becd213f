from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from jaxear.eigenears import figures as draw
from jaxear.figures import (
    FRAME_MS,
    HOLD_MS,
    TRACK,
    reconstruction_grid,
    save_animation,
    save_figure,
    to_uint8,
)

SCORES = np.linspace(-3, 3, 19)
RATIOS = np.asarray([0.4, 0.2, 0.1, 0.05, 0.02])


@pytest.fixture(scope="module")
def traverses():
    """Grey pictures: component i goes from 0.5 - 0.1 (i + 1) to 0.5 + 0.1 (i + 1), all over."""
    slopes = 0.1 * np.arange(1, 6)
    values = 0.5 + slopes[:, None] * SCORES / 3
    images = np.broadcast_to(values[..., None, None, None], (5, 19, 8, 8, 3)).astype(np.float32)
    return draw.Traverses(images, SCORES)


def words(figure: Figure) -> list[str]:
    found = [text.get_text() for axes in figure.axes for text in axes.texts]
    return [text for text in found if text]


def assert_nothing_overlaps(figure: Figure):
    """No words lie over others, or outside of the figure."""
    figure.canvas.draw()
    boxes = [t.get_window_extent() for axes in figure.axes for t in axes.texts if t.get_text()]
    for i, box in enumerate(boxes):
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= figure.bbox.width
        assert box.y1 <= figure.bbox.height
        assert not any(box.overlaps(other) for other in boxes[:i])


def test_floats_become_bytes():
    values = np.asarray([-1, 0, 0.5, 1, 2, np.nan, np.inf])
    np.testing.assert_array_equal(to_uint8(values), [0, 0, 128, 255, 255, 0, 255])
    assert to_uint8(np.uint8([7])).tolist() == [7]


def test_ears_stand_above_their_reconstructions():
    grid = reconstruction_grid(np.zeros((3, 8, 8, 3)), np.full((3, 8, 8, 3), 0.5))
    assert grid.shape == (24, 36, 3)
    assert (grid[2:10, 2:10] == 0).all()
    assert (grid[14:22, 26:34] == 128).all()


def test_traversals_show_each_component_and_the_difference_of_its_ends(traverses):
    figure = draw.traversals(traverses, RATIOS, n_components=3)
    pictures = figure.axes[0].images
    assert len(pictures) == 3 * 8
    values = [float(p.get_array().mean()) for p in pictures]
    for i, row in enumerate(np.reshape(values, (3, 8))):
        slope = 0.1 * (i + 1)
        np.testing.assert_allclose(row[:7], 255 * (0.5 + slope * np.arange(-3, 4) / 3), atol=0.6)
        assert row[7] == pytest.approx(2 * slope, abs=1e-5)
    for picture in pictures[7::8]:  # one scale for all
        assert (picture.norm.vmin, picture.norm.vmax) == pytest.approx((-0.6, 0.6))
    assert "PC3\n10.0 %" in words(figure)
    assert_nothing_overlaps(figure)


def test_the_atlas_has_real_ears_at_both_ends(traverses):
    lowest = [np.full((2, 8, 8, 3), 10 + i, np.uint8) for i in range(5)]
    highest = [np.full((2, 8, 8, 3), 200 + i, np.uint8) for i in range(5)]
    figure = draw.atlas(traverses, RATIOS, lowest, highest)
    pictures = figure.axes[0].images
    assert len(pictures) == 5 * 12
    row = sorted(pictures[12:24], key=lambda p: p.get_extent()[0])
    values = [float(p.get_array().mean()) for p in row]
    assert values[:2] == [11, 11]
    assert values[9:11] == [201, 201]
    assert values[2] < values[5] < values[8]
    assert {"lowest real ears", "decoded", "highest real ears"} <= set(words(figure))
    assert_nothing_overlaps(figure)


def test_neighbours_stand_below_what_is_decoded_there(traverses):
    photographs = [np.full((7, 8, 8, 3), 20 * i, np.uint8) for i in range(2)]
    scores = np.tile(np.arange(-3, 4) + 0.1, (2, 1))
    scores[1, 6] = np.nan
    figure = draw.neighbours(traverses, draw.INTEGERS, photographs, scores, RATIOS)
    assert len(figure.axes[0].images) == 2 * 14 - 1
    assert "+1.10" in words(figure)
    assert f"{draw.MINUS}2.90" in words(figure)
    assert_nothing_overlaps(figure)


def test_scree_fills_what_is_more_than_chance():
    intervals = np.stack([0.8 * RATIOS, 1.2 * RATIOS], axis=1)
    figure = draw.scree(RATIOS, intervals, np.full(5, 0.07), n_real=3)
    single, running = figure.axes
    lines = {line.get_label(): line for line in single.lines}
    filled, hollow = lines["more than chance (p < 0.05)"], lines["not more than chance"]
    np.testing.assert_allclose(filled.get_ydata(), [40, 20, 10])
    np.testing.assert_allclose(hollow.get_ydata(), [5, 2])
    assert hollow.get_markerfacecolor() == "white"
    np.testing.assert_allclose(lines["95th percentile of permuted codes"].get_ydata(), 7)
    (bars,) = single.containers
    segments = bars.lines[2][0].get_segments()
    np.testing.assert_allclose([s[:, 1] for s in segments], 100 * intervals)
    np.testing.assert_allclose(running.lines[0].get_ydata(), [40, 60, 70, 75, 77])


def test_scree_tells_what_cannot_be_tested():
    hidden = np.asarray([True, False, False, True, False])
    figure = draw.scree(RATIOS, None, np.full(5, 0.07), n_real=3, hidden=hidden)
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    np.testing.assert_allclose(lines["more than chance (p < 0.05)"].get_ydata(), [40, 20, 10])
    np.testing.assert_allclose(lines["not testable: along one dimension"].get_ydata(), [5])
    np.testing.assert_allclose(lines["not more than chance"].get_ydata(), [2])


def test_scree_without_draws_claims_nothing():
    labels = [text.get_text() for text in draw.scree(RATIOS).axes[0].get_legend().get_texts()]
    assert labels == ["component"]


def test_scatter_tells_the_most_photographed_apart():
    scores = np.random.default_rng(0).normal(size=(20, 5))
    subjects = np.asarray(["a"] * 8 + ["b"] * 6 + [f"one{i}" for i in range(6)])
    figure = draw.score_scatter(scores, subjects, RATIOS)
    left, right = figure.axes
    named = {c.get_label(): c for c in left.collections}
    np.testing.assert_allclose(named["a"].get_offsets(), scores[:8, :2])
    assert len(left.collections[0].get_offsets()) == 6
    colours = {tuple(c.get_facecolors()[0]) for c in left.collections}
    assert len(colours) == 3
    assert right.get_xlabel() == "PC3 score (SD), 10.0 %"
    assert figure.legends[0].get_title().get_text().startswith("2 of 8 subjects")


@pytest.mark.parametrize("k", [1, 2, 3])
def test_scatter_of_few_components_and_no_subject_with_two_images(k):
    figure = draw.score_scatter(np.random.default_rng(0).normal(size=(9, k)), np.arange(9), RATIOS)
    assert len(figure.axes[0].collections[0].get_offsets()) == 9
    assert not figure.legends


def test_animations_go_there_and_back_and_wait_at_the_ends(tmp_path, traverses):
    path = tmp_path / "components" / "pc01.gif"
    save_animation(path, traverses.images[4], SCORES, side=96)
    with Image.open(path) as gif:
        assert gif.n_frames == 36
        assert gif.size == (96, 96 + TRACK)
        frames, durations = [], []
        for i in range(36):
            gif.seek(i)
            frames.append(np.asarray(gif.convert("RGB")).astype(float))
            durations.append(gif.info["duration"])
        assert gif.info["loop"] == 0
    assert [i for i, d in enumerate(durations) if d == HOLD_MS] == [0, 18]
    assert durations.count(FRAME_MS) == 34
    greys = [frame[:96].mean() for frame in frames]
    np.testing.assert_allclose(greys[:19], 255 * (0.5 + 0.5 * SCORES / 3), atol=4)
    assert greys[19:] == greys[17:0:-1]
    dots = [np.argwhere(f[96:].sum(axis=2) < 60)[:, 1].mean() for f in (frames[0], frames[18])]
    assert dots[0] < 12
    assert dots[1] > 84


def test_figures_are_written_for_screen_and_print(tmp_path):
    save_figure(draw.scree(RATIOS), tmp_path / "deep" / "scree")
    with Image.open(tmp_path / "deep" / "scree.png") as image:
        assert image.width == 1440
    assert (tmp_path / "deep" / "scree.pdf").read_bytes().startswith(b"%PDF")


def test_a_figure_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    save_figure(draw.scree(RATIOS), tmp_path / "scree")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(self, file, **options):
        Path(file).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OSError, match="No space"):
        save_figure(draw.scree(2 * RATIOS), tmp_path / "scree")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
