import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.decomposition import PCA

from jaxear import EigenEars, PixelModel
from jaxear.config import DataConfig
from jaxear.data.pipeline import load_split
from jaxear.eigenears import __main__ as command
from jaxear.eigenears import write_pixel_eigenears, writing
from jaxear.errors import UserError
from jaxear.inference import decode_codes, encode_images

SIZE = 24


@pytest.fixture(scope="module")
def ears(photographs):
    return load_split(DataConfig(data=str(photographs), image_size=SIZE), "all", progress=False)


@pytest.fixture(scope="module")
def classic(ears):
    return EigenEars.fit(PixelModel(SIZE), ears.images, n_components=5)


@pytest.fixture(scope="module")
def written(tmp_path_factory, photographs):
    """The folder of the classic eigenears of 60 photographs, and what the command said."""
    out = tmp_path_factory.mktemp("pixels") / "eigenears"
    arguments = ["--data", str(photographs), "--out", str(out), "--image-size", str(SIZE)]
    arguments += ["--n-components", "5", "--bootstrap", "30", "--permutations", "30"]
    assert command.main(arguments) == 0
    return out


def test_pixels_are_their_own_code(ears):
    model = PixelModel((SIZE, SIZE))
    codes, _ = encode_images(model, ears.images)
    assert codes.shape == (60, model.latent_dim) == (60, SIZE * SIZE * 3)
    np.testing.assert_allclose(decode_codes(model, codes), ears.images / 255, atol=1e-6)
    assert decode_codes(model, codes + 2).max() == 1
    with pytest.raises(UserError, match="24x24"):
        encode_images(PixelModel(SIZE), np.zeros((1, 8, 8, 3), np.uint8))


def test_classic_eigenears_are_scikit_learns_pca_of_pixels(ears, classic):
    pixels = ears.images.reshape(60, -1) / 255
    reference = PCA(5, svd_solver="full").fit(pixels)
    np.testing.assert_allclose(
        classic.explained_variance_ratio_, reference.explained_variance_ratio_, rtol=1e-3
    )
    scores = classic.project(ears.images)
    expected = reference.transform(pixels) / np.sqrt(reference.explained_variance_)
    signs = np.sign((scores * expected).sum(axis=0))
    np.testing.assert_allclose(scores * signs, expected, atol=5e-3)
    np.testing.assert_allclose(scores.std(axis=0, ddof=1), 1, rtol=1e-3)
    back = classic.synthesize(scores).reshape(60, -1)
    expected = np.clip(reference.inverse_transform(reference.transform(pixels)), 0, 1)
    np.testing.assert_allclose(back, expected, atol=5e-3)


def test_traverses_are_each_components_own(classic):
    together = classic.traverses([-2.0, 0.0, 1.5])
    assert together.shape == (5, 3, SIZE, SIZE, 3)
    for i in range(5):
        np.testing.assert_allclose(together[i], classic.traverse(i, [-2.0, 0.0, 1.5]), atol=1e-6)
    assert np.abs(together[0, 2] - together[1, 2]).max() > 0.05


def test_classic_eigenears_are_saved_and_loaded_without_a_run(ears, classic, tmp_path):
    classic.save(tmp_path / "deep" / "eigenears.safetensors")
    loaded = EigenEars.load(tmp_path / "deep" / "eigenears.safetensors")
    assert isinstance(loaded.model, PixelModel)
    assert loaded.model.image_size == (SIZE, SIZE)
    assert loaded.n_samples_ == 60
    np.testing.assert_array_equal(loaded.project(ears.images), classic.project(ears.images))


@pytest.mark.parametrize("n_components", [0, 60])
def test_components_that_cannot_be_had(ears, n_components):
    with pytest.raises(UserError, match="ask for 59 at most"):
        EigenEars.fit(PixelModel(SIZE), ears.images, n_components)


def test_the_command_writes_what_its_help_promises(written):
    for name in ("traversals", "atlas", "scree", "scores", "neighbours", "meaning"):
        with Image.open(written / f"{name}.png") as image:
            assert np.asarray(image).std() > 1, name
        assert (written / f"{name}.pdf").read_bytes().startswith(b"%PDF"), name
    names = [path.name for path in sorted((written / "components").iterdir())]
    assert names == [f"pc0{i}.gif" for i in range(1, 6)]


def test_its_numbers_are_those_of_the_library(written, ears, classic):
    report = json.loads((written / "eigenears.json").read_text())
    assert report["model"] == "pixels"
    assert (report["n_samples"], report["n_subjects"]) == (60, 20)
    ratios = classic.explained_variance_ratio_
    np.testing.assert_allclose(report["explained_variance_ratio"], ratios, rtol=1e-5)
    assert report["pc1"] == pytest.approx(ratios[0])
    assert report["pc_first5"] == pytest.approx(ratios.sum())
    low, high = np.transpose(report["explained_variance_ratio_ci95"])
    assert ((low < ratios) & (ratios < high)).all()
    assert len(report["p_values"]) == len(report["chance_ratio_95"]) == 5
    assert 1 <= report["n_real_components"] <= 5
    assert [c["component"] for c in report["meaning"]["components"]] == [1, 2, 3, 4, 5]
    scores = classic.project(ears.images)
    with (written / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["subject"] for row in rows] == [record.subject for record in ears.records]
    np.testing.assert_allclose([float(row["pc02"]) for row in rows], scores[:, 1], atol=1e-3)
    for i, component in enumerate(report["components"]):
        assert component["component"] == i + 1
        assert component["lowest"][0]["score"] == pytest.approx(scores[:, i].min(), abs=1e-4)
        assert component["highest"][-1]["score"] == pytest.approx(scores[:, i].max(), abs=1e-4)
        assert Path(component["lowest"][0]["image"]).name in ("0.png", "1.png", "2.png")
        assert len(component["along"]) == 7


def test_the_command_prints_a_table(written, photographs, capsys, monkeypatch):
    report = json.loads((written / "eigenears.json").read_text())
    calls = []
    monkeypatch.setattr(
        command, "write_pixel_eigenears", lambda *args, **options: calls.append(options)
    )
    assert command.main(["--data", str(photographs), "--out", str(written), "--split", "test"]) == 0
    assert calls[0]["split"] == "test"
    shown = capsys.readouterr().out
    low, high = report["explained_variance_ratio_ci95"][0]
    assert f"{100 * report['pc1']:.1f}" in shown
    assert f"[{100 * low:.1f}, {100 * high:.1f}]" in shown
    assert f"{report['p_values'][0]:.3f}" in shown
    assert "60 ears of 20 subjects" in shown


def test_without_draws_nothing_is_claimed(photographs, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxear.eigenears.report.save_animation", lambda *args: None)
    monkeypatch.setattr("jaxear.eigenears.report.save_figure", lambda *args: None)
    write_pixel_eigenears(
        str(photographs), tmp_path, image_size=SIZE, bootstrap=0, permutations=0, progress=False
    )
    report = json.loads((tmp_path / "eigenears.json").read_text())
    for key in ("explained_variance_ratio_ci95", "p_values", "n_real_components"):
        assert report[key] is None


def test_a_prepared_store_keeps_its_settings(photographs, tmp_path, monkeypatch):
    from jaxear.data.__main__ import main as data_main

    store = tmp_path / "store"
    size = ["--image-size", "20", "--fit", "stretch"]
    assert data_main(["prepare", str(photographs), "--out", str(store), *size]) == 0
    seen = []
    monkeypatch.setattr(writing, "_write", lambda model, ears, *rest: seen.append(ears))
    write_pixel_eigenears(str(store), tmp_path / "out", progress=False)
    assert seen[0].images.shape == (60, 20, 20, 3)
    with pytest.raises(UserError, match="prepared otherwise"):
        write_pixel_eigenears(str(store), tmp_path / "out", image_size=32, progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--run RUN"),
        (["--data", "photographs"], "--out DIR"),
        (["--run", "runs/none"], "not a run"),
        (["--run", "runs/none", "--image-size", "64"], "without --run"),
        (["--run", "runs/none", "--bootstrap", "-1"], "0 or more"),
    ],
    ids=str,
)
def test_what_the_command_cannot_do_it_says(arguments, message, capsys):
    assert command.main(arguments) == 2
    assert message in capsys.readouterr().err
