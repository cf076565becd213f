"""The report's tables as text: every number of them is one of the report's, rounded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxear.comparison.claims import DOCUMENT_EPOCHS, NOT_TESTABLE, REFUTED, SUPPORTED
from jaxear.comparison.measurement import MEASURES
from jaxear.comparison.plan import FINE_TUNED, PRETRAINED, SCRATCH, TITLES
from jaxear.comparison.results import DONE, NOT_RUN

NO_NUMBER = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"

QUALITY = (
    "psnr", "ssim", "edge", "pc1", "first5", "anatomy_pc1", "anatomy", "anatomy_at_most", "eer",
)  # fmt: skip
COST = (
    "parameters", "parameters_total", "peak_bytes", "seconds_per_epoch", "training_seconds",
    "encode_ms",
)  # fmt: skip

# What the document predicts, section 6 (quality), 8 (cost), 3 (grid), 7 and 10 (other backbones).
PREDICTIONS: Mapping[str, Mapping[str, str]] = {
    "resnet50": {
        "psnr": "22 to 24 dB", "ssim": "0.65 to 0.75", "edge": "poor", "pc1": "8 to 12 %",
        "first5": "35 to 45 %", "anatomy": "generic blobs", "parameters": "25.6 M",
        "peak_bytes": "3 GB (batch 32)", "seconds_per_epoch": "40 s", "encode_ms": "50 ms",
        "grid": "4 cells",
    },
    "sam_vit_b": {
        "psnr": "27 to 32 dB", "ssim": "0.85 to 0.92", "edge": "excellent", "pc1": "15 to 25 %",
        "first5": "70 to 80 %", "anatomy": "clear structures", "parameters": "86 M",
        "peak_bytes": "6 GB (batch 32)", "seconds_per_epoch": "50 s", "encode_ms": "80 ms",
        "grid": "8 cells",
    },
    "sam_vit_l": {"psnr": "best quality", "peak_bytes": "12 GB"},
    "efficientnet_b3": {"psnr": "between ResNet-50 and SAM"},
    "mobilenetv3_large_100": {
        "psnr": "below ResNet-50", "peak_bytes": "low", "encode_ms": "very fast",
    },
    "convnextv2_tiny": {"psnr": "second to SAM"},
    "hybrid": {"psnr": "best of both", "peak_bytes": "twice", "seconds_per_epoch": "twice"},
}  # fmt: skip


class Column(NamedTuple):
    """A column: the measure it shows, or a word of its own; its heading and unit."""

    key: str
    title: str
    unit: str = ""


class Cell(NamedTuple):
    """A value with its interval below, both as text; a word where there is none."""

    text: str
    interval: str = ""
    kind: str = ""


class TableRow(NamedTuple):
    """A row of a table; `reason` in place of all cells where it was not run."""

    key: str
    label: str
    start: str
    cells: list[Cell]
    reason: str = ""


class TextTable(NamedTuple):
    """A table as it is printed."""

    key: str
    title: str
    caption: str
    columns: list[Column]
    rows: list[TableRow]


def tables(report: Mapping[str, Any]) -> list[TextTable]:
    """The report's tables, every number of which is one of the report's, rounded."""
    return [
        _measures_table(
            report, "quality", "Quality on ears of subjects never seen",
            "Means over held-out ears and seeds; below, 95 % intervals over subjects and seeds.",
            QUALITY,
        ),
        _measures_table(
            report, "cost", "What it costs",
            f"Batches of {report['study']['settings'].get('batch_size')} images"
            + (f" on {report['facts']['machine']['device']}." if report["facts"] else "."),
            COST,
        ),
        _predictions_table(report),
        _claims_table(report),
        _decisions_table(report),
    ]  # fmt: skip


def number(measure: str, value: float) -> str:
    """A value as shown: in the measure's unit, rounded."""
    shown = MEASURES[measure]
    text = f"{shown.times * value:.{shown.digits}f}"
    return text.replace("-", "\N{MINUS SIGN}") if float(text) else text.lstrip("-")


def interval(measure: str, of: Mapping[str, float]) -> str:
    """Its interval; nothing where there is none."""
    if "low" not in of:
        return ""
    return f"[{number(measure, of['low'])}, {number(measure, of['high'])}]"


def _cell(measure: str, measures: Mapping[str, Mapping[str, float]]) -> Cell:
    if measure not in measures:
        return Cell(NO_NUMBER)
    return Cell(number(measure, measures[measure]["value"]), interval(measure, measures[measure]))


def _measures_table(
    report: Mapping[str, Any], key: str, title: str, caption: str, names: Sequence[str]
) -> TextTable:
    shown = [n for n in names if any(n in line["measures"] for line in report["lines"])]
    columns = [Column(n, MEASURES[n].title, MEASURES[n].unit) for n in shown]
    rows = []
    for line in report["lines"]:
        if line["state"] != DONE:
            rows.append(
                TableRow(
                    line["key"], _plain_label(line), line["state"], [], f"{line['state']}: "
                    f"{line['reason'].removeprefix('failed: ')}",
                )
            )  # fmt: skip
            continue
        cells = [_cell(name, line["measures"]) for name in shown]
        rows.append(TableRow(line["key"], _plain_label(line), _start(line), cells))
    return TextTable(key, title, caption, columns, rows)


def _start(line: Mapping[str, Any]) -> str:
    """What the second column says: where it starts from, and that it is frozen."""
    if line["backbone"] is None:
        return "fitted to pixels"
    return line["start"] + (", frozen" if line["mode"] != FINE_TUNED else "")


def _plain_label(line: Mapping[str, Any]) -> str:
    if line["state"] == DONE or line["backbone"] is None:
        return TITLES.get(line["backbone"] or "", line["label"])
    return line["label"]


def _predictions_table(report: Mapping[str, Any]) -> TextTable:
    by_row = {
        (line["backbone"], line["planned"]): line
        for line in report["lines"]
        if line["mode"] == FINE_TUNED
    }
    rows = []
    backbones = dict.fromkeys(x["backbone"] for x in report["lines"] if x["backbone"])
    for backbone in backbones:
        for measure, predicted in PREDICTIONS.get(backbone, {}).items():
            cells = [Cell(predicted, kind="predicted")]
            for start in (PRETRAINED, SCRATCH):
                line = by_row.get((backbone, start))
                if line is None or line["state"] != DONE:
                    cells.append(Cell(line["state"] if line else NOT_RUN, kind="missing"))
                    continue
                name = measure
                if measure == "anatomy" and "anatomy_at_most" in line["measures"]:
                    name = "anatomy_at_most"
                cell = _cell(name, line["measures"])
                unit = f" {MEASURES[name].unit}".rstrip()
                more = "at most " if name == "anatomy_at_most" else ""
                text = cell.text if cell.text == NO_NUMBER else f"{more}{cell.text}{unit}"
                cells.append(cell._replace(text=text))
            rows.append(
                TableRow(
                    f"{backbone}/{measure}", f"{TITLES[backbone]}: {MEASURES[measure].title}",
                    "", cells,
                )
            )  # fmt: skip
    return TextTable(
        "predictions",
        "What the document predicts, and what was measured",
        "Fine-tuned rows. Its figures of memory and time are for a GPU and batches of 32, its "
        f"quality for {DOCUMENT_EPOCHS} epochs.",
        [
            Column("predicted", "Predicted"),
            Column(PRETRAINED, "Measured, pretrained"),
            Column(SCRATCH, "Measured, from scratch"),
        ],
        rows,
    )


def _claims_table(report: Mapping[str, Any]) -> TextTable:
    rows = []
    order = (SUPPORTED, REFUTED, NOT_TESTABLE)
    for claim in sorted(report["claims"], key=lambda claim: order.index(claim["verdict"])):
        cells = [Cell(claim["verdict"], claim["reason"], "verdict"), *_effect(claim)]
        rows.append(TableRow(claim["key"], claim["text"], f"§ {claim['section']}", cells))
    return TextTable(
        "claims",
        "The document's claims",
        "Effect: the first row named minus the second, or their ratio (times); below, the "
        "95 % interval over subjects and seeds, or the range over seeds where the figure is no "
        "sample's. p: two-sided, paired, corrected for the number of claims tested (Holm).",
        [Column("verdict", "Verdict"), Column("effect", "Effect"), Column("p", "p (Holm)")],
        rows,
    )


def _effect(claim: Mapping[str, Any]) -> list[Cell]:
    if "effect" not in claim:
        return [Cell(NO_NUMBER), Cell(NO_NUMBER)]
    measure = claim["measure"]
    if claim["kind"] == "ratio":
        texts = [f"{claim[name]:.2f}" for name in ("effect", "effect_low", "effect_high")]
        effect = Cell(f"{TIMES}{texts[0]}", f"[{texts[1]}, {texts[2]}]")
    else:
        value, low, high = (
            number(measure, claim[name]) for name in ("effect", "effect_low", "effect_high")
        )
        unit = {"%": " points" if claim["kind"] == "difference" else " %"}.get(
            MEASURES[measure].unit, f" {MEASURES[measure].unit}".rstrip()
        )
        plus = "+" if claim["kind"] == "difference" and claim["effect"] > 0 else ""
        effect = Cell(f"{plus}{value}{unit}", f"[{low}, {high}]")
    p = claim.get("p_holm")
    return [effect, Cell(NO_NUMBER if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}")]


def _decisions_table(report: Mapping[str, Any]) -> TextTable:
    rows = []
    for entry in report["decisions"]:
        measure, best = entry["measure"], entry["best"]
        cells = [Cell(entry["document"], kind="predicted")]
        if best is None:
            cells += [Cell("not measured", kind="missing"), Cell(NO_NUMBER), Cell(NO_NUMBER)]
        else:
            cells.append(_named(measure, best))
            cells.append(_named(measure, entry["next"]) if "next" in entry else Cell(NO_NUMBER))
            pca = entry.get("linear_pca")
            unit = MEASURES[measure].unit
            cells.append(
                Cell(f"{number(measure, pca['value'])} {unit}".rstrip() if pca else NO_NUMBER)
            )
        rows.append(TableRow(entry["priority"], entry["priority"], entry["rule"], cells))
    return TextTable(
        "decisions",
        "Which backbone for what",
        "The row that measured best by the rule given, and the next.",
        [
            Column("document", "The document"),
            Column("best", "Measured best"),
            Column("next", "Next"),
            Column("linear_pca", "Linear PCA"),
        ],
        rows,
    )


def _named(measure: str, of: Mapping[str, Any]) -> Cell:
    value = f"{number(measure, of['value'])} {MEASURES[measure].unit}".rstrip()
    return Cell(str(of["label"]), f"{value} {interval(measure, of)}".rstrip(), "named")
