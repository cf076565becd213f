"""A study from its start to its report: what was run, and every number that is told of it."""

from __future__ import annotations

import io
import json
import math
import re
from collections import Counter, defaultdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from jaxear.compare import main, print_quality
from jaxear.comparison import runner
from jaxear.comparison.claims import SUPPORTED
from jaxear.comparison.measurement import MEASURES
from jaxear.comparison.report import build_report
from jaxear.comparison.results import Line, Results, read_results
from jaxear.comparison.writing import write_reports
from tests.comparison.conftest import SHA256, Happening
from tests.training.tiny import quick_compilation, tiny

PRETRAINED = "sam_vit_b-pretrained-fine-tuned"
SCRATCH = "sam_vit_b-from-scratch-fine-tuned"
LARGE = "sam_vit_l-from-scratch-fine-tuned"
MISSING = "sam_vit_l-pretrained-fine-tuned"
SHOWN = {"psnr": 2, "ssim": 3, "edge": 3, "pc1": 1, "first5": 1, "anatomy_at_most": 0, "eer": 1,
         "parameters": 1, "parameters_total": 1, "peak_bytes": 2, "seconds_per_epoch": 1,
         "training_seconds": 0, "encode_ms": 1, "grid": 0}  # fmt: skip
TIMES = {"pc1": 100, "first5": 100, "anatomy_at_most": 100, "eer": 100, "parameters": 1e-6,
         "parameters_total": 1e-6, "peak_bytes": 1e-9}  # fmt: skip
SAMPLED = ("psnr", "ssim", "edge", "pc1", "first5")


class Tables(HTMLParser):
    """The tables of a page: (section, row, column) -> text; rows without cells by their words."""

    def __init__(self, html: str):
        super().__init__()
        self.cells: dict[tuple[str, str, str], str] = {}
        self.not_run: list[str] = []
        self._section, self._into, self._row = "", None, None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        of = dict(attrs)
        if tag == "section":
            self._section = of["id"]
        if tag == "tr":
            self._row = of.get("class")
            self.not_run += [""] if self._row == "not-run" else []
        if tag == "td" and "data-row" in of:
            self._into = (self._section, of["data-row"], of["data-column"])
            self.cells[self._into] = ""
        if tag == "br" and self._into:
            self.cells[self._into] += " "

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "tr"):
            self._into = None
        if tag == "tr":
            self._row = None

    def handle_data(self, data: str) -> None:
        if self._into:
            self.cells[self._into] += data.strip()
        elif self._row == "not-run":
            self.not_run[-1] += data


@pytest.fixture(scope="module")
def html(study: Happening) -> str:
    return (study.out / "report.html").read_text()


@pytest.fixture(scope="module")
def report(study: Happening) -> dict[str, Any]:
    return json.loads((study.out / "report.json").read_text())


class Plain:
    """The runs' own files, and all figures made of them once more, one by one."""

    def __init__(self, out: Path):
        self.runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for path in sorted(out.glob("runs/*/seed*/measurement.json")):
            self.runs[path.parents[1].name].append(json.loads(path.read_text()))
        self.runs["linear_pca"] = [
            json.loads((out / "runs/linear_pca/measurement.json").read_text())
        ]

    def values(self, key: str, measure: str) -> list[float]:
        return [
            run["measures"][measure]
            for run in self.runs[key]
            if run["measures"].get(measure) is not None
        ]

    def draws(self, key: str, measure: str) -> np.ndarray:
        return np.array([run["replicates"][measure] for run in self.runs[key]])

    def seed_noise(self, measure: str, rows: int, n: int, *, log: bool = False, keys=None) -> Any:
        """Student's t with the variance pooled over rows, for `rows` rows of n seeds."""
        squares, freedom = 0.0, 0
        for key in keys or self.runs:
            values = np.array(self.values(key, measure))
            values = np.log(values) if log else values
            squares += sum((v - values.mean()) ** 2 for v in values)
            freedom += max(len(values) - 1, 0)
        t = np.random.default_rng(1).standard_t(freedom, size=2000)
        return np.sqrt(rows * squares / freedom / n) * t

    def interval(self, key: str, measure: str) -> tuple[float, float]:
        draws = self.draws(key, measure)
        over = draws.mean(axis=0) + self.seed_noise(measure, 1, len(draws))
        low, high = np.percentile(over, [2.5, 97.5])
        return low, high if measure == "psnr" else min(high, 1.0)

    def difference(self, a: str, b: str, measure: str) -> tuple[float, float, float, np.ndarray]:
        pairs = list(zip(self.runs[a], self.runs[b], strict=False))
        value = np.mean([x["measures"][measure] - y["measures"][measure] for x, y in pairs])
        draws = [np.subtract(x["replicates"][measure], y["replicates"][measure]) for x, y in pairs]
        backbones = [key for key in self.runs if key != "linear_pca"]
        over = np.mean(draws, axis=0) + self.seed_noise(measure, 2, len(pairs), keys=backbones)
        return float(value), *np.percentile(over, [2.5, 97.5]), over


def told(measure: str, value: float) -> str:
    text = f"{TIMES.get(measure, 1) * value:.{SHOWN[measure]}f}"
    return (text if float(text) else text.lstrip("-")).replace("-", "\N{MINUS SIGN}")


@pytest.fixture(scope="module")
def plain(study: Happening) -> Plain:
    return Plain(study.out)


def test_a_killed_study_goes_on_and_a_failed_run_stops_nothing(study: Happening):
    first, second, third, fourth = study.trained
    assert first == [("sam_vit_b", 0, False)]  # and killed after a checkpoint
    assert second == [("sam_vit_b", 0, True)]  # and killed before it was measured
    assert third == [  # which it then is, without being trained again
        ("sam_vit_b", 0, False),
        ("sam_vit_l", 0, False),
        ("sam_vit_b", 1, False),
        ("sam_vit_b", 1, False),
        ("sam_vit_l", 1, False),
    ]
    assert fourth == [("sam_vit_l", 1, False)]
    failure = json.loads((study.out / "runs" / LARGE / "seed1" / "failure.json").read_text())
    assert failure["reason"].startswith("RuntimeError: RESOURCE_EXHAUSTED")
    assert "in train" in failure["traceback"]
    lines = {line.key: line for line in read_results(study.out).lines}
    assert lines[LARGE].reason == (
        "1 of 2 seeds (failed: RuntimeError: RESOURCE_EXHAUSTED: out of memory)"
    )
    assert [len(lines[key].runs) for key in (PRETRAINED, SCRATCH, LARGE)] == [2, 2, 1]


def test_every_run_has_the_same_budget_and_says_what_it_started_from(plain: Plain):
    runs = [run for key, runs in plain.runs.items() for run in runs if key != "linear_pca"]
    assert {(run["epochs"], run["steps"] // run["steps_per_epoch"]) for run in runs} == {
        (round(10 / runs[0]["steps_per_epoch"]),) * 2
    }
    assert [run["weights_files"][0]["source_sha256"] for run in plain.runs[PRETRAINED]] == [
        SHA256
    ] * 2
    assert all(run["weights_files"] == [] for run in plain.runs[SCRATCH])


def test_every_number_of_the_tables_is_made_of_the_measurements(html: str, plain: Plain):
    cells = Tables(html).cells
    checked = 0
    for (section, row, column), text in cells.items():
        if section not in ("quality", "cost"):
            continue
        values = plain.values(row, column)
        if not values:
            assert text == "\N{EN DASH}"
            continue
        expected = told(column, float(np.mean(values)))
        if column in SAMPLED and not (row == "linear_pca" and column in ("pc1", "first5")):
            low, high = plain.interval(row, column)
            expected += f" [{told(column, low)}, {told(column, high)}]"
        assert text == expected, (row, column)
        checked += 1
    assert checked > 35
    assert {row for section, row, _ in cells if section == "quality"} == {
        PRETRAINED, SCRATCH, LARGE, "linear_pca",
    }  # fmt: skip


def test_predictions_stand_beside_what_was_measured(html: str, plain: Plain):
    cells = {key[1:]: text for key, text in Tables(html).cells.items() if key[0] == "predictions"}
    assert cells["sam_vit_b/psnr", "predicted"] == "27 to 32 dB"
    for start, key in (("pretrained", PRETRAINED), ("from scratch", SCRATCH)):
        value = told("psnr", float(np.mean(plain.values(key, "psnr"))))
        low, high = (told("psnr", end) for end in plain.interval(key, "psnr"))
        assert cells["sam_vit_b/psnr", start] == f"{value} dB [{low}, {high}]"
    assert cells["sam_vit_l/psnr", "pretrained"] == "not run"
    assert cells["sam_vit_l/peak_bytes", "predicted"] == "12 GB"


def test_claims_are_judged_by_differences_of_the_runs(
    html: str, report: dict[str, Any], plain: Plain
):
    cells = {key[1:]: text for key, text in Tables(html).cells.items() if key[0] == "claims"}
    measured = {claim["key"]: claim for claim in report["claims"] if "effect" in claim}
    assert set(measured) == {"pretraining_sam_vit_b", "sam_large_memory"}

    claim = measured["pretraining_sam_vit_b"]
    value, low, high, over = plain.difference(PRETRAINED, SCRATCH, "psnr")
    assert claim["effect"] == pytest.approx(value)
    assert (claim["effect_low"], claim["effect_high"]) == pytest.approx((low, high))
    beyond = np.sum(over <= 0) if value >= 0 else np.sum(over >= 0)
    p = min(1.0, 2 * (1 + beyond) / 2001)
    assert claim["p"] == claim["p_holm"] == pytest.approx(p)  # the only one tested
    sign = "+" if value > 0 else ""
    assert cells[claim["key"], "effect"] == (
        f"{sign}{told('psnr', value)} dB [{told('psnr', low)}, {told('psnr', high)}]"
    )
    assert cells[claim["key"], "p"] == ("< 0.001" if p < 0.001 else f"{p:.3f}")

    claim = measured["sam_large_memory"]
    ratio = plain.values(LARGE, "peak_bytes")[0] / plain.values(SCRATCH, "peak_bytes")[0]
    assert claim["effect"] == pytest.approx(ratio)
    times = f"{ratio:.2f}"
    assert cells[claim["key"], "effect"] == f"\N{MULTIPLICATION SIGN}{times} [{times}, {times}]"
    assert claim["verdict"] == (SUPPORTED if 1.5 <= ratio <= 2.5 else "refuted")

    for key in {claim["key"] for claim in report["claims"]} - measured.keys():
        assert cells[key, "effect"] == cells[key, "p"] == "\N{EN DASH}"
        assert cells[key, "verdict"].startswith("not testable here")


def test_the_decision_matrix_names_what_measured_best(html: str, plain: Plain):
    cells = {key[1:]: text for key, text in Tables(html).cells.items() if key[0] == "decisions"}
    labels = {
        PRETRAINED: "SAM ViT-B, pretrained",
        SCRATCH: "SAM ViT-B, from scratch",
        LARGE: "SAM ViT-L, from scratch",
    }
    for priority, measure, sign, unit in (
        ("Best quality", "psnr", 1, "dB"),
        ("Fastest training", "seconds_per_epoch", -1, "s"),
        ("Production speed", "encode_ms", -1, "ms"),
        ("Limited memory", "peak_bytes", -1, "GB"),
        ("Best for ears", "eer", -1, "%"),
    ):
        means = {key: float(np.mean(plain.values(key, measure))) for key in labels}
        ranked = sorted(means, key=lambda key: -sign * means[key])
        for column, key in zip(("best", "next"), ranked, strict=False):
            expected = f"{labels[key]} {told(measure, means[key])} {unit}"
            assert cells[priority, column].startswith(expected)
    pca = plain.values("linear_pca", "psnr")[0]
    assert cells["Best quality", "linear_pca"] == f"{told('psnr', pca)} dB"


def test_the_findings_are_those_of_the_runs(report: dict[str, Any], plain: Plain):
    means = {key: float(np.mean(plain.values(key, "psnr"))) for key in plain.runs}
    pca = means.pop("linear_pca")
    best, second = sorted(means, key=lambda key: -means[key])[:2]
    labels = {line["key"]: line["label"] for line in report["lines"]}
    assert report["findings"][0] == (
        f"Best reconstructions: {labels[best]}, {told('psnr', means[best])} dB; "
        f"linear PCA with as many numbers per ear reaches {told('psnr', pca)} dB."
    )
    value, low, high, _ = plain.difference(best, second, "psnr")
    assert report["findings"][1].startswith(
        f"Next is {labels[second]}, {told('psnr', value)} dB behind "
        f"[{told('psnr', low)}, {told('psnr', high)}]"
    )
    counts = Counter(claim["verdict"] for claim in report["claims"])
    assert report["findings"][2] == (
        f"Of the document's {len(report['claims'])} claims {counts['supported']} are supported, "
        f"{counts['refuted']} refuted and {counts['not testable here']} not testable here."
    )


def test_a_row_that_was_not_run_shows_no_number(study: Happening, html: str, report: dict):
    rows = Tables(html).not_run
    assert len(rows) == 2  # of quality, of cost
    command = "python scripts/port_sam.py --model vit_l"
    for words in rows:
        assert "SAM ViT-L, pretrained" in words
        assert f"not run: weights missing, run {command}" in words
        assert not re.search(r"\d", words.replace(command, ""))
    line = next(line for line in report["lines"] if line["key"] == MISSING)
    assert (line["measures"], line["seeds"], line["start"]) == ({}, [], "not run")
    markdown = (study.out / "report.md").read_text().splitlines()
    lines = [text for text in markdown if text.startswith("| SAM ViT-L, pretrained |")]
    assert len(lines) == 2
    assert not any(re.search(r"\d", text.replace(command, "")) for text in lines)


def test_a_narrow_screen_cuts_no_figure(report: dict):
    console = Console(width=60, record=True, file=io.StringIO())
    print_quality(report, console)
    shown = console.export_text()
    for line in report["lines"]:
        if "psnr" in line["measures"]:
            assert f" {line['measures']['psnr']['value']:.2f} " in shown
    assert "…" not in shown


def test_the_page_needs_nothing_but_itself_and_says_what_it_cannot_know(html: str):
    assert not re.search(r"""(src|href)=["'](?!data:)""", html)
    assert "url(" not in html
    assert "<script" not in html
    assert html.count("data:image/png;base64,") == 3
    assert SHA256 in html
    assert "No pretrained weights of SAM ViT-L were at hand" in html
    assert "pretrained weights of both are needed" in html
    assert "SAM ViT-B is not the published one here" in html
    words = re.sub(r"base64,[A-Za-z0-9+/=]+", "", html)
    assert "/tmp" not in words


def test_the_report_can_be_made_again_without_the_models(study: Happening, capsys):
    before = (study.out / "report.html").read_bytes()
    (study.out / "report.html").unlink()
    assert main(["--out", str(study.out), "--report-only"]) == 0
    assert (study.out / "report.html").read_bytes() == before
    printed = capsys.readouterr().out
    assert "SAM ViT-B, pretrained" in printed
    assert "not run: weights missing" in printed


def test_a_report_without_any_run_has_rows_and_no_numbers(study: Happening, tmp_path):
    (tmp_path / "study.json").write_bytes((study.out / "study.json").read_bytes())
    report = write_reports(tmp_path)
    assert {line["state"] for line in report["lines"]} == {"not run"}
    assert Tables((tmp_path / "report.html").read_text()).cells.keys() >= {
        ("decisions", "Best quality", "best")
    }
    assert all("effect" not in claim for claim in report["claims"])


def test_mistakes_are_told_without_a_traceback(tmp_path, capsys):
    assert main(["--out", str(tmp_path), "--report-only"]) == 2
    assert "There is no study in" in capsys.readouterr().err
    assert main(["--config", str(tmp_path / "none.yaml")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert main(["--data", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    assert main(["--budget-steps", "many"]) == 2


def test_the_anatomy_of_synthetic_ears_is_shown_with_its_error(study: Happening):
    """As measured of synthetic ears; here by hand, in the place of a run's measurement."""
    run = {
        "seed": 0, "epochs": 3, "steps": 9, "notes": [], "split": "test", "n_images": 9,
        "n_subjects": 9, "n_training_images": 9, "n_subjects_trained_on": 0, "numbers_per_ear": 8,
        "machine": {}, "versions": {},
        "measures": {"anatomy_pc1": 0.4, "anatomy": 0.2},
        "replicates": {"anatomy_pc1": list(np.linspace(0.3, 0.5, 2000))},
    }  # fmt: skip
    results = read_results(study.out)
    row = next(line.row for line in results.lines if line.key == PRETRAINED)
    line = Line(
        PRETRAINED, "SAM ViT-B, pretrained", row, "measured", "", [run, run | {"seed": 1}], None
    )
    report = build_report(Results(study.out, results.study, [line]))
    shown = report["lines"][0]["measures"]
    assert shown["anatomy_pc1"] == pytest.approx({"value": 0.4, "low": 0.305, "high": 0.495})
    assert shown["anatomy"] == {"value": 0.2}
    for measured in line.runs:
        measured["replicates"] = {"anatomy_pc1": list(np.linspace(0.3, 1.3, 2000))}
    report_of_wide = build_report(Results(study.out, results.study, [line]))
    assert report_of_wide["lines"][0]["measures"]["anatomy_pc1"]["high"] == 1  # a share
    (wide,) = (c for c in report_of_wide["claims"] if c["key"] == "sam_anatomy_pc1")
    assert wide["effect_high"] == 1
    claim = next(c for c in report["claims"] if c["key"] == "sam_anatomy_pc1")
    assert (claim["effect"], claim["verdict"]) == (0.4, "refuted")
    assert MEASURES["anatomy"].title in report["definitions"]["anatomy"]


def test_a_step_is_timed_with_all_that_a_run_carries(photographs, tmp_path):
    config = tiny(photographs, tmp_path / "run", ema_decay=0.9)
    with quick_compilation():
        assert 0 < runner.seconds_per_step(config) < math.inf
