"""Every number of an evaluation of a tiny run, computed again the long way."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from scipy.ndimage import correlate
from skimage.metrics import structural_similarity
from sklearn.decomposition import PCA

import jaxear
from jaxear.assessment.coders import Code, ModelCoder
from jaxear.assessment.measures import MEASURES
from jaxear.assessment.report import COLUMNS, Evaluation, print_report, write_evaluation
from jaxear.assessment.stability import PERTURBATIONS
from jaxear.data.pipeline import load_split
from jaxear.errors import UserError
from jaxear.evaluate import _notes, default_folder, evaluate, main, subjects_seen
from jaxear.inference import decode_codes, encode_images
from jaxear.model import load_config
from tests.assessment.test_recognition import plain_figures
from tests.test_metrics import plain_ms_ssim

PER_EAR = ("psnr", "ssim", "ms_ssim", "edge")


@pytest.fixture(scope="module")
def evaluation(finished: Path) -> Evaluation:
    """Of the validation split, whose subjects have three ears each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXEAR_WEIGHTS", "no-weights")
        return evaluate(finished, split="val", repeats=3, progress=False)


@pytest.fixture(scope="module")
def written(evaluation: Evaluation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evaluation") / "new" / "folder"
    write_evaluation(evaluation, out)
    return out


@pytest.fixture(scope="module")
def report(written: Path) -> dict:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads((written / "evaluation.json").read_text(), parse_constant=refuse)


class Plain:
    """The model and PCA without any of the package's evaluation, in numpy and scikit-learn."""

    def __init__(self, run: Path):
        config = load_config(run)
        ears = load_split(config, "val", progress=False)
        self.images = ears.images
        self.subjects = np.asarray([record.subject for record in ears.records])
        self.training = load_split(config, "train", progress=False).images
        self.model = jaxear.load_model(run)
        flat = self.training.reshape(len(self.training), -1) / 255
        self.pca = PCA(self.model.latent_dim, svd_solver="full").fit(flat)

    def encode(self, coder: str, images: np.ndarray) -> np.ndarray:
        if coder == "pca":
            return self.pca.transform(images.reshape(len(images), -1) / 255)
        return encode_images(self.model, images)[0].astype(np.float64)

    def decode(self, coder: str, codes: np.ndarray) -> np.ndarray:
        if coder == "pca":
            flat = np.clip(self.pca.inverse_transform(codes), 0, 1)
            return flat.reshape(len(codes), *self.images.shape[1:])
        return decode_codes(self.model, codes).astype(np.float64)


@pytest.fixture(scope="module")
def plain(finished: Path) -> Plain:
    return Plain(finished)


@pytest.fixture(scope="module")
def expected(plain: Plain) -> dict[str, dict[str, np.ndarray]]:
    """coder -> measure -> of each ear."""
    return {coder: plain_measures(plain, coder) for coder in ("model", "pca")}


def plain_measures(plain: Plain, coder: str) -> dict[str, np.ndarray]:
    original = plain.images / 255
    codes = plain.encode(coder, plain.images)
    made = plain.decode(coder, codes)
    values = {
        "psnr": -10 * np.log10(np.square(made - original).mean(axis=(1, 2, 3))),
        "ssim": [
            structural_similarity(
                x, y, channel_axis=-1, data_range=1, gaussian_weights=True, sigma=1.5,
                use_sample_covariance=False,
            )
            for x, y in zip(made, original, strict=True)
        ],
        "ms_ssim": [plain_ms_ssim(x, y, 2) for x, y in zip(made, original, strict=True)],
        "edge": [plain_edges(x, y) for x, y in zip(made, original, strict=True)],
    }  # fmt: skip
    for name, perturb in PERTURBATIONS.items():
        moved = plain.encode(coder, perturb(plain.images, np.arange(len(original))))
        for what, a, b, yardstick in (
            ("code", moved, codes, codes),
            ("image", plain.decode(coder, moved), made, original),
        ):
            distances = np.sqrt(np.square(a - b).reshape(len(a), -1).sum(axis=1))
            values[f"{what}_{name}"] = distances / between(yardstick, plain.subjects)
    return {name: np.asarray(value) for name, value in values.items()}


def plain_edges(made: np.ndarray, original: np.ndarray) -> float:
    kernel = np.outer([1, 2, 1], [-1, 0, 1])
    a, b = (
        np.stack([correlate(x @ [0.299, 0.587, 0.114], k)[1:-1, 1:-1] for k in (kernel, kernel.T)])
        for x in (made, original)
    )
    return float((a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum()))


def between(vectors: np.ndarray, subjects: np.ndarray) -> float:
    flat = vectors.reshape(len(vectors), -1)
    squares = np.square(flat[:, None] - flat).sum(axis=-1)
    return float(np.sqrt(squares[subjects[:, None] != subjects].mean()))


def resampled(values: np.ndarray, subjects: np.ndarray) -> tuple[float, float]:
    """The interval of a mean: subjects drawn a thousand times, each with all of its ears."""
    names = np.unique(subjects)
    draws = np.random.default_rng(0).multinomial(
        len(names), np.full(len(names), 1 / len(names)), 1000
    )
    means = []
    for draw in draws:
        drawn = np.concatenate([values[subjects == s] for s in np.repeat(names, draw)])
        means.append(drawn.mean())
    return tuple(np.percentile(means, [2.5, 97.5]))


def test_what_every_ear_has_is_measured(report, plain, expected):
    subjects = plain.subjects
    of_difference = {
        name: expected["model"][name] - expected["pca"][name] for name in expected["pca"]
    }
    for coder, columns in {**expected, "difference": of_difference}.items():
        for name, column in columns.items():
            figure = report["measures"][coder][name]
            # Single precision, and steps of a perturbed pixel that rounds the other way
            assert figure["value"] == pytest.approx(column.mean(), rel=2e-3, abs=2e-4), (
                coder,
                name,
            )
            low, high = resampled(column, subjects)
            assert figure["low"] == pytest.approx(low, rel=2e-3, abs=2e-4), (coder, name)
            assert figure["high"] == pytest.approx(high, rel=2e-3, abs=2e-4), (coder, name)
            assert (figure["n"], figure["of"]) == (len(subjects), "ears")


def test_the_code_is_measured(report, plain):
    mu, logvar = (x.astype(np.float64) for x in encode_images(plain.model, plain.images))
    kl = 0.5 * (mu**2 + np.exp(logvar) - 1 - logvar).sum(axis=1)
    figures = report["measures"]["model"]
    assert figures["kl"]["value"] == pytest.approx(kl.mean(), rel=1e-4)
    low, high = resampled(kl, plain.subjects)
    assert (figures["kl"]["low"], figures["kl"]["high"]) == pytest.approx((low, high), rel=1e-4)
    assert figures["active_units"]["value"] == np.sum(mu.var(axis=0) > 0.01)
    assert figures["active_units"]["low"] is None
    assert not {"kl", "active_units"} & (
        report["measures"]["pca"].keys() | report["measures"]["difference"].keys()
    )


def test_identity_is_measured(report, plain):
    expected = {}
    for coder in ("model", "pca"):
        training = plain.encode(coder, plain.training)
        centred = plain.encode(coder, plain.images) - training.mean(axis=0)
        variances, axes = np.linalg.eigh(np.cov(training.T))
        kept = variances > 1e-4 * variances[-1]
        whitened = centred @ axes[:, kept] / np.sqrt(variances[kept])
        figures = plain_figures(whitened, plain.subjects)
        others = plain_figures(centred, plain.subjects)
        expected[coder] = figures | {f"{n}_centred": others[n] for n in ("rank1", "eer")}
    expected["difference"] = {n: v - expected["pca"][n] for n, v in expected["model"].items()}
    for coder, figures in expected.items():
        got = report["measures"][coder]
        assert got["vr_at_far_0_1_percent"]["value"] is None  # too few pairs
        for name in figures.keys() - {"vr_at_far_0_1_percent"}:
            assert got[name]["value"] == pytest.approx(figures[name], abs=1e-6), (coder, name)
            assert got[name]["low"] <= got[name]["value"] <= got[name]["high"]
    for coder in ("model", "pca"):
        cmc = report["curves"][coder]["cmc"]
        assert cmc["value"][0] == pytest.approx(expected[coder]["rank1"])
        assert (np.diff(cmc["value"]) >= 0).all()
        assert len(report["curves"][coder]["roc"]["far"]) == len(
            report["curves"][coder]["roc"]["low"]
        )


def test_the_rest_of_the_report(report, plain, expected, finished):
    names, counts = np.unique(plain.subjects, return_counts=True)
    config = load_config(finished)
    assert report["run"] == str(finished)
    assert report["data"] == config.data
    assert report["split"] == "val"
    assert (report["n_images"], report["n_subjects"]) == (counts.sum(), len(names))
    assert (report["n_subjects_trained_on"], report["n_training_images"]) == (
        0,
        len(plain.training),
    )
    assert report["numbers_per_ear"] == {"model": 8, "pca": 8}
    assert report["names"]["difference"] == "sam - linear PCA"
    assert report["checkpoint"] == plain.model.checkpoint
    assert report["machine"]["platform"] == "cpu"
    assert any("intervals come out too narrow" in note for note in report["notes"])
    for name, count in zip(names, counts, strict=True):
        entry = report["psnr_by_subject"][name]
        assert entry["n_images"] == count
        for coder in ("model", "pca"):
            mean = expected[coder]["psnr"][plain.subjects == name].mean()
            assert entry[coder] == pytest.approx(mean, abs=1e-3)
    for coder in ("model", "pca"):
        for name in ("encode_ms", "decode_ms", "encode_per_second", "decode_per_second"):
            time = report["measures"][coder][name]
            assert 0 < time["low"] <= time["value"] <= time["high"]
    everything = {name for figures in report["measures"].values() for name in figures}
    assert everything == MEASURES.keys() == report["definitions"].keys()


def test_without_vgg16_there_is_no_number_but_the_way_to_get_one(report):
    for figures in report["measures"].values():
        assert figures["lpips_style"]["value"] is None
        assert "port_timm.py --model vgg16" in figures["lpips_style"]["note"]


def test_csv_is_the_same_numbers_one_a_row(written, report):
    with (written / "evaluation.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    found = {(row["model"], row["measure"]): row for row in rows}
    assert len(found) == len(rows) == sum(map(len, report["measures"].values()))
    for coder, figures in report["measures"].items():
        for name, figure in figures.items():
            row = found[report["names"][coder], name]
            for key in ("value", "low", "high"):
                assert (float(row[key]) if row[key] else None) == figure[key]
            assert (int(row["n"]), row["of"], row["note"]) == (
                figure["n"],
                figure["of"],
                figure["note"],
            )
            assert (row["split"], row["run"]) == (report["split"], report["run"])
            assert row["numbers_per_ear"] == ("" if coder == "difference" else "8")


def test_images_csv_has_every_ear(written, expected, plain):
    with (written / "images.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * len(plain.images)
    for coder, name in (("model", "sam"), ("pca", "linear PCA")):
        own = [row for row in rows if row["model"] == name]
        assert [row["subject"] for row in own] == list(plain.subjects)
        assert all(Path(row["path"]).is_file() for row in own)
        for measure in PER_EAR:
            values = [float(row[measure]) for row in own]
            np.testing.assert_allclose(values, expected[coder][measure], atol=2e-3)
        assert all(bool(row["kl"]) == (coder == "model") for row in own)


def test_figures_are_written_for_screen_and_print(written):
    for name in ("identity", "reconstructions", "psnr_by_subject"):
        assert (written / f"{name}.png").stat().st_size > 5000
        assert (written / f"{name}.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_shows_every_measure(evaluation, report, width):
    console = Console(width=width, record=True, file=io.StringIO())
    print_report(evaluation, console)
    text = console.export_text()
    for name, measure in MEASURES.items():
        assert f" {measure.title} " in text
        for figures in report["measures"].values():
            value = figures.get(name, {}).get("value")
            assert value is None or f"{value:.{measure.digits}f}" in text
    psnr = report["measures"]["model"]["psnr"]
    assert f"[{psnr['low']:.2f}, {psnr['high']:.2f}]" in text
    assert "port_timm.py --model vgg16" in " ".join(text.split())


def test_ears_of_subjects_with_one_image_have_no_identity(finished, evaluation, tmp_path, capsys):
    """A folder of its own, where each picture is a subject; written beside the run's own."""
    folder = tmp_path / "others"
    folder.mkdir()
    for i, record in enumerate(evaluation.records):
        (folder / f"{i}.png").write_bytes(record.path.read_bytes())
    assert main(["--run", str(finished), "--data", str(folder), "--repeats", "0"]) == 0
    out = finished / "evaluation-others"
    report = json.loads((out / "evaluation.json").read_text())
    assert any("No identity" in note and "1 images at most" in note for note in report["notes"])
    assert report["curves"] == {}
    assert not {"rank1", "eer", "encode_ms"} & report["measures"]["model"].keys()
    assert not (out / "identity.png").exists()
    assert (report["split"], report["n_images"]) == ("all", len(evaluation.records))
    assert not (finished / "evaluation").exists()
    assert "No identity" in capsys.readouterr().out

    again = tmp_path / "elsewhere" / "others"
    folder.rename(tmp_path / "kept")
    again.mkdir(parents=True)
    assert main(["--run", str(finished), "--data", str(again)]) == 2
    assert "another folder by --out" in capsys.readouterr().err


def test_one_subject_has_means_and_no_intervals(finished, evaluation, tmp_path):
    """Its ears are grey pictures, wider than high."""
    lines = ["path,subject"]
    for i, record in enumerate(evaluation.records):
        Image.open(record.path).convert("L").resize((40, 30)).save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png,somebody")
    (tmp_path / "one.csv").write_text("\n".join(lines))
    one = evaluate(finished, data=str(tmp_path / "one.csv"), repeats=0, progress=False)
    psnr = one.estimates["model"]["psnr"]
    assert psnr.value == pytest.approx(one.values["model"]["psnr"].mean())
    assert psnr[1:3] == (None, None)
    assert one.estimates["model"]["code_shift"].value is None
    assert any("1 subjects" in note for note in one.notes)
    assert any(note.startswith(f"{len(one.records)} of the ears are grey") for note in one.notes)
    write_evaluation(one, tmp_path / "out")
    print_report(one, Console(quiet=True))
    assert not (tmp_path / "out/psnr_by_subject.png").exists()


def test_ears_that_were_trained_on_are_noticed(plain):
    training = plain.training
    subjects = np.repeat(np.arange(len(training)), 3)[: len(training)]  # one alike, two others
    ears = np.concatenate([training[:4], training[4:] ^ 1])
    assert subjects_seen(ears, subjects, training) == {"0", "1"}
    assert subjects_seen(plain.images, plain.subjects, training) == set()
    about = {"n_subjects_trained_on": 2, "n_subjects": 50, "n_training_images": 60}
    coders = dict.fromkeys(("model", "pca"), SimpleNamespace(numbers=8))
    (note,) = _notes(about, coders, plain.images)
    assert note.startswith("2 of the 50 subjects were trained on")


def test_pca_of_few_training_images_says_that_it_has_fewer_numbers():
    about = {"n_subjects_trained_on": 0, "n_subjects": 50, "n_training_images": 6}
    coders = {"model": SimpleNamespace(numbers=8), "pca": SimpleNamespace(numbers=5)}
    notes = _notes(about, coders, np.zeros((0, 4, 4, 3), np.uint8))
    assert notes == ["PCA has 5 numbers per ear, not 8: 6 training images have no more components"]


def test_codes_that_are_not_numbers_are_refused(finished, monkeypatch):
    def broken(self, images):
        return Code(jnp.full((len(images), 8), jnp.nan))

    monkeypatch.setattr(ModelCoder, "encode", broken)
    with pytest.raises(UserError, match="not all finite"):
        evaluate(finished, split="val", repeats=0, progress=False)


def test_each_evaluation_has_a_folder_of_its_own(tmp_path):
    assert default_folder("runs/a", None, None) == Path("runs/a/evaluation")
    assert default_folder("runs/a", None, "test") == Path("runs/a/evaluation")
    assert default_folder("runs/a", None, "val") == Path("runs/a/evaluation-val")
    assert default_folder("runs/a", "data/iitd/", None) == Path("runs/a/evaluation-iitd")


def test_mistakes_end_with_exit_code_2(finished, tmp_path, capsys):
    assert main(["--run", str(tmp_path)]) == 2
    assert main(["--run", str(finished), "--split", "val", "--data", str(tmp_path)]) == 2
    assert main(["--run", str(finished), "--split", "nothing", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "not a run" in error
    assert "give --split or --data" in error
    assert "no split 'nothing'" in error
    assert "Traceback" not in error


def test_help_defines_what_is_measured(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name, measure in MEASURES.items():
        assert f"{name}: {measure.definition}" in text
