"""The explorer without its page."""

import dataclasses
import io
import json
import logging
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from sklearn.neighbors import NearestNeighbors

from jaxear.data.images import prepare_image
from jaxear.data.pipeline import load_split
from jaxear.data.records import Record
from jaxear.data.synthetic import synthetic_ears
from jaxear.eigenears import EigenEars
from jaxear.errors import UserError
from jaxear.explore import session
from jaxear.explore.pictures import gif, jpeg, png
from jaxear.explore.session import REACH, Explorer, spread
from jaxear.inference import decode_codes, encode_images


def deviations(explorer):
    return np.sqrt(explorer.eigenears.explained_variance_)


def residual(explorer, code):
    """What of a code no component describes."""
    centred = code - explorer.eigenears.mean_
    basis = explorer.eigenears.components_
    return centred - (centred @ basis.T) @ basis


def test_an_ear_that_was_not_moved_keeps_its_code_to_the_bit(few):
    ear = few.from_run(7)
    assert np.abs(residual(few, ear.code)).max() > 0.1  # or the test would say nothing
    np.testing.assert_array_equal(few.moved(ear, list(ear.shown)), ear.code)
    # The browser sends decimal numbers.
    sent = json.loads(json.dumps([round(float(v), 1) for v in ear.shown]))
    np.testing.assert_array_equal(few.moved(ear, sent), ear.code)
    expected = decode_codes(few.eigenears.model, ear.code[None])[0]
    np.testing.assert_allclose(few.picture(ear.code), 255 * expected, atol=0.51)


def test_a_slider_moves_its_component_and_nothing_else(few):
    ear = few.from_run(7)
    sliders = ear.shown + np.array([0, 1.5, 0])
    code = few.moved(ear, sliders)
    np.testing.assert_allclose(few.scores(code) - few.scores(ear.code), [0, 1.5, 0], atol=1e-4)
    np.testing.assert_allclose(residual(few, code), residual(few, ear.code), atol=1e-5)


def test_settling_starts_from_the_ear_as_it_stands(few):
    ear = few.from_run(7)
    assert few.settle(ear, ear.shown) is ear
    sliders = ear.shown + np.array([0.5, 0, -1])
    settled = few.settle(ear, sliders)
    np.testing.assert_array_equal(settled.code, few.moved(ear, sliders))
    np.testing.assert_allclose(settled.shown, sliders, atol=0.051)
    assert settled.name == f"{ear.name}, moved"
    assert settled.row is None
    np.testing.assert_array_equal(settled.photo, ear.photo)


def test_sliders_show_the_scores_and_reach_as_far_as_they_lie(few):
    mean = few.mean()
    assert mean.reach == REACH
    np.testing.assert_array_equal(mean.shown, 0)
    out = few._ear(
        "far out", few.eigenears.mean_ + 4.62 * deviations(few)[1] * few.eigenears.components_[1]
    )
    np.testing.assert_allclose(out.shown, [0, 4.6, 0], atol=1e-6)
    assert out.reach == 5


def test_a_random_ear_has_standard_normal_scores(few):
    rng = np.random.default_rng(0)
    scores = np.array([few.scores(few.random(rng).code) for _ in range(400)])
    np.testing.assert_allclose(scores.mean(axis=0), 0, atol=0.2)
    np.testing.assert_allclose(scores.std(axis=0), 1, atol=0.1)


def test_a_photograph_is_prepared_as_the_runs_own(few, run_config):
    record = load_split(run_config, "all", progress=False).records[7]
    uploaded, known = few.from_photo(record.path), few.from_run(7)
    np.testing.assert_array_equal(uploaded.photo, known.photo)
    np.testing.assert_allclose(uploaded.code, known.code, atol=1e-5)
    np.testing.assert_allclose(uploaded.shown, known.shown, atol=0.101)
    assert (uploaded.row, known.row) == (None, 7)


def test_a_left_ear_is_mirrored_as_the_run_does(few, run_config, tmp_path):
    path = tmp_path / "wide.png"
    Image.fromarray(np.uint8(np.arange(30 * 50 * 3).reshape(30, 50, 3) % 251)).save(path)
    for mirror in (True, False):
        config = dataclasses.replace(run_config, mirror_left=mirror, fit="crop")
        explorer = Explorer(few.eigenears, config)
        expected = prepare_image(
            Record(path, "", side="left"), image_size=32, fit="crop", mirror_left=mirror
        )
        np.testing.assert_array_equal(explorer.from_photo(path, side="left").photo, expected)
    unknown, left = few.from_photo(path).photo, few.from_photo(path, side="left").photo
    np.testing.assert_array_equal(left, unknown[:, ::-1])


def bomb(path):
    """A small PNG that says it has 30000x30000 pixels."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"0" * 1000)))


def test_what_is_no_picture_is_refused_with_advice_and_without_its_folder(
    few, tmp_path, monkeypatch
):
    text = tmp_path / "notes.jpg"
    text.write_text("no picture")
    huge = tmp_path / "huge.png"
    bomb(huge)
    for path, reason in ((text, "not an image"), (huge, "900000000 pixels")):
        with pytest.raises(UserError, match=reason) as caught:
            few.from_photo(path)
        message = str(caught.value)
        assert path.name in message
        assert "JPEG, PNG" in message
        assert str(tmp_path) not in message
    monkeypatch.setattr(session, "MAX_BYTES", 5)
    with pytest.raises(UserError, match=r"MB\. Give a photograph"):
        few.from_photo(text)


def test_a_morph_goes_straight_from_one_code_to_the_other(few):
    a, b = few.from_run(3), few.from_run(30)
    assert few.morph(a, b, 0) is a
    assert few.morph(a, b, 1) is b
    ear = few.morph(a, b, 0.25)
    np.testing.assert_allclose(ear.code, 0.75 * a.code + 0.25 * b.code, rtol=1e-6)
    assert ear.reach >= max(a.reach, b.reach)
    assert ear.photo is None


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_neighbours_are_scikit_learns(few, run_config, metric):
    images = load_split(run_config, "all", progress=False).images
    scores = few.eigenears.project(images)
    reference = NearestNeighbors(n_neighbors=6, metric=metric).fit(scores)
    code = few.moved(few.from_run(7), few.from_run(7).shown + np.array([0.3, -0.4, 0.5]))
    distances, rows = reference.kneighbors(few.scores(code)[None])
    found = few.neighbours(code, metric)
    assert [n.row for n in found] == list(rows[0])
    values = distances[0] if metric == "euclidean" else 1 - distances[0]
    np.testing.assert_allclose([n.value for n in found], values, atol=1e-4)
    assert [n.name for n in found] == [few.names[row] for row in rows[0]]


def test_an_ear_is_not_its_own_neighbour(few):
    code = few.from_run(7).code
    assert few.neighbours(code, "euclidean")[0].row == 7
    others = few.neighbours(code, "euclidean", but=7)
    assert 7 not in [n.row for n in others]
    assert len(others) == 6


def test_nothing_is_near_the_mean_ear_by_cosine(few):
    assert few.neighbours(few.eigenears.mean_, "cosine") == []


def test_ears_are_spread_evenly_over_the_data(run_config):
    ears = load_split(run_config, "all", progress=False)
    assert spread(ears, 60) is ears
    kept = spread(ears, 4)
    assert [ears.records.index(record) for record in kept.records] == [0, 20, 39, 59]
    np.testing.assert_array_equal(kept.images, ears.images[[0, 20, 39, 59]])


def test_a_traversal_and_a_morph_go_there_and_back(few):
    ear = few.from_run(7)
    frames = few.traversal(ear, list(ear.shown), 1)
    ends = [few.moved(ear, [ear.shown[0], s, ear.shown[2]]) for s in (-ear.reach, ear.reach)]
    np.testing.assert_array_equal(frames[0], few.picture(ends[0]))
    np.testing.assert_array_equal(frames[24], few.picture(ends[1]))
    np.testing.assert_array_equal(frames[1], frames[-1])
    frames = few.morph_frames(few.from_run(3), ear)
    np.testing.assert_array_equal(frames[0], few.picture(few.from_run(3).code))
    np.testing.assert_array_equal(frames[24], few.picture(ear.code))


def test_files(few):
    ear = few.from_run(7)
    image = few.picture(ear.code)
    saved = Image.open(io.BytesIO(png(image, {"Title": "an ear · ü"})))
    np.testing.assert_array_equal(np.asarray(saved), image)
    assert saved.text["Title"] == "an ear · ü"
    assert Image.open(io.BytesIO(jpeg(image, side=16))).size == (16, 16)
    assert Image.open(io.BytesIO(gif(few.morph_frames(few.from_run(3), ear)))).n_frames == 48


def test_an_animation_keeps_the_colours_of_ears():
    ears, _ = synthetic_ears(0, 9, 32)
    moving = Image.open(io.BytesIO(gif(list(ears))))
    assert moving.n_frames == 9
    assert moving.info["loop"] == 0
    for i, ear in enumerate(ears):
        moving.seek(i)
        error = np.abs(np.asarray(moving.convert("RGB"), float) - ear)
        assert error.mean() < 4  # two ears differ by 26 and more


def test_opening_a_run_without_eigenears_fits_them_and_says_so(run, run_config, caplog):
    with caplog.at_level(logging.INFO, "jaxear"):
        explorer = Explorer.open(run, n_ears=5, progress=False)
    assert "fitting eigenears to the run's training split" in caplog.text
    assert explorer.fitted
    assert len(explorer.names) == 5
    train = load_split(run_config, "train", progress=False).images
    assert explorer.eigenears.n_samples_ == len(train)
    expected = encode_images(explorer.eigenears.model, train)[0].mean(axis=0)
    np.testing.assert_allclose(explorer.eigenears.mean_, expected, atol=1e-5)


def test_opening_a_run_takes_the_eigenears_that_it_has(few, run, monkeypatch):
    path = run / "eigenears" / "eigenears.safetensors"
    few.eigenears.save(path)
    monkeypatch.setattr(EigenEars, "fit", lambda *args: pytest.fail("fitted again"))
    try:
        explorer = Explorer.open(run, n_ears=0)
    finally:
        path.unlink()
    assert not explorer.fitted
    assert explorer.n_components == 3
    assert explorer.names == []
    assert explorer.neighbours(explorer.eigenears.mean_, "euclidean") == []


def test_data_that_has_gone_is_an_error_that_tells_the_way_without_it(
    few, run, run_config, monkeypatch
):
    path = run / "eigenears" / "eigenears.safetensors"
    few.eigenears.save(path)

    def gone(*args, **kwargs):
        raise UserError("There is nothing at photographs/.")

    monkeypatch.setattr(session, "load_split", gone)
    try:
        with pytest.raises(UserError, match=r"nothing at photographs/(.|\n)*--ears 0"):
            Explorer.open(run)
    finally:
        path.unlink()
