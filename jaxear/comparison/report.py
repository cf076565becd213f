"""What a study says: its numbers, its verdicts, the decision matrix and the words between."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxear.comparison.claims import (
    DOCUMENT_EPOCHS,
    NOT_TESTABLE,
    REFUTED,
    SUPPORTED,
    Runs,
    judge_all,
)
from jaxear.comparison.measurement import LINEAR_PCA, MEASURES
from jaxear.comparison.plan import FINE_TUNED, PRETRAINED, TITLES
from jaxear.comparison.results import DONE, Line, Results
from jaxear.comparison.statistics import of_difference, seed_variance
from jaxear.comparison.tables import interval, number

FEW_SEEDS = 3


class Priority(NamedTuple):
    """A line of the decision matrix: what a user wants, what the document advises, and the row that
    is best by a measure, of those that `among` keeps."""

    name: str
    document: str
    measure: str
    rule: str
    among: Callable[[dict[str, dict[str, Any]]], set[str]] | None = None


def _quick(lines: dict[str, dict[str, Any]]) -> set[str]:
    """Those whose epoch takes at most twice the shortest."""
    seconds = {key: of["seconds_per_epoch"]["value"] for key, of in lines.items()}
    return {key for key, value in seconds.items() if value <= 2 * min(seconds.values())}


def _large(lines: dict[str, dict[str, Any]]) -> set[str]:
    """Those that take more memory than half of all do."""
    memory = {key: of["peak_bytes"]["value"] for key, of in lines.items()}
    middle = sorted(memory.values())[(len(memory) - 1) // 2]
    return {key for key, value in memory.items() if value >= middle}


PRIORITIES: tuple[Priority, ...] = (
    Priority("Best quality", "SAM ViT-B", "psnr", "highest PSNR"),
    Priority("Fastest training", "ResNet-50", "seconds_per_epoch", "shortest epoch"),
    Priority(
        "Best efficiency", "ConvNeXt-T", "psnr",
        "highest PSNR of those whose epoch takes at most twice the shortest", _quick,
    ),
    Priority("Production speed", "MobileNetV3", "encode_ms", "shortest time to encode one ear"),
    Priority("Limited memory", "ResNet-50", "peak_bytes", "least memory in training"),
    Priority(
        "Large memory", "SAM ViT-L", "psnr", "highest PSNR of the more memory-hungry half", _large
    ),
    Priority("Best for ears", "SAM ViT-B", "eer", "lowest identity EER"),
    Priority("Best for ears", "SAM ViT-B", "anatomy", "largest anatomy share"),
)  # fmt: skip


def build_report(results: Results, *, command: str = "") -> dict[str, Any]:
    """All that the report says, for JSON; texts and tables are made of it by `tables`.

    Args:
        results: the study's.
        command: that repeats it.
    """
    cells = results.cells()
    runs = [run for line in results.measured() for run in line.runs]
    epochs = [int(run["epochs"]) for run in runs if "epochs" in run]
    photographs = results.study.data is not None
    reasons = {line.row: line.reason for line in results.lines if line.row is not None}
    claims = judge_all(
        Runs(
            {
                line.row: line.replicates()
                for line in results.measured(backbones=True)
                if line.row is not None
            },
            reasons,
            photographs,
            min(epochs, default=0),
        )
    )
    lines = [
        {
            "key": line.key,
            "label": line.label,
            "backbone": line.row.backbone if line.row else None,
            "start": line.start,
            "planned": line.row.weights if line.row else None,
            "mode": line.row.mode if line.row else None,
            "state": line.state,
            "reason": line.reason,
            "seeds": [run["seed"] for run in line.runs],
            "steps": sorted({run["steps"] for run in line.runs if "steps" in run}),
            "epochs": sorted({run["epochs"] for run in line.runs if "epochs" in run}),
            "weights_files": line.runs[0].get("weights_files", []) if line.runs else [],
            "measures": cells.get(line.key, {}),
        }
        for line in results.lines
    ]
    report = {
        "data": Path(results.study.data).name if results.study.data else "synthetic ears",
        "photographs": photographs,
        "budget": results.study.budget,
        "command": command,
        "study": {
            "seeds": results.study.seeds,
            "settings": {**results.study.settings, "data": None},
            "backbone_options": results.study.backbone_options,
        },
        "facts": {
            name: runs[0][name]
            for name in (
                "split", "n_images", "n_subjects", "n_training_images", "n_subjects_trained_on",
                "numbers_per_ear", "machine", "versions",
            )
        }
        if runs
        else {},
        "epochs": sorted(set(epochs)),
        "notes": list(dict.fromkeys(note for run in runs for note in run["notes"])),
        "lines": lines,
        "claims": claims,
        "decisions": _decisions(results, cells, photographs),
        "definitions": {
            name: f"{measure.title}: {measure.definition}" for name, measure in MEASURES.items()
        },
    }  # fmt: skip
    return report | {"caveats": _caveats(report), "findings": _findings(report)}


def _decisions(
    results: Results, cells: dict[str, dict[str, dict[str, float]]], photographs: bool
) -> list[dict[str, Any]]:
    """The decision matrix from measurements; where too little was measured it says so."""
    lines = {line.key: line for line in results.measured(backbones=True)}
    matrix = []
    for priority in PRIORITIES:
        if priority.measure in ("eer", "anatomy") and (priority.measure == "eer") != photographs:
            continue
        entry: dict[str, Any] = {
            "priority": priority.name, "document": priority.document,
            "measure": priority.measure, "rule": priority.rule, "best": None,
        }  # fmt: skip
        matrix.append(entry)
        having = {key: cells[key] for key in lines if priority.measure in cells[key]}
        if having and priority.among is not None:
            kept = priority.among(having)
            having = {key: of for key, of in having.items() if key in kept}
        if not having:
            continue
        sign = -1 if MEASURES[priority.measure].better == "lower" else 1
        ranked = sorted(having, key=lambda key: -sign * having[key][priority.measure]["value"])
        entry["best"] = {
            "key": ranked[0],
            "label": lines[ranked[0]].label,
            **having[ranked[0]][priority.measure],
        }
        if len(ranked) > 1:
            entry["next"] = {
                "key": ranked[1],
                "label": lines[ranked[1]].label,
                **having[ranked[1]][priority.measure],
            }
            if MEASURES[priority.measure].sampled:
                entry["lead"] = _lead(lines, ranked[:2], priority.measure)
        if priority.measure in cells.get(LINEAR_PCA, {}):
            entry["linear_pca"] = cells[LINEAR_PCA][priority.measure]
    return matrix


def _lead(lines: Mapping[str, Line], keys: Sequence[str], measure: str) -> dict[str, float]:
    """How far the best is ahead of the next, with its interval."""
    all_values = [
        of[measure].values for line in lines.values() if measure in (of := line.replicates())
    ]
    a, b = (lines[key].replicates()[measure] for key in keys)
    figure = of_difference(a, b, seed_variance(all_values))
    return {"value": figure.value, "low": figure.low, "high": figure.high}


def _caveats(report: Mapping[str, Any]) -> list[str]:
    """What keeps these figures from saying more than they do."""
    caveats = []
    lacking = [
        line for line in report["lines"] if line["planned"] == PRETRAINED and line["state"] != DONE
    ]
    if names := list(dict.fromkeys(TITLES.get(x["backbone"], x["backbone"]) for x in lacking)):
        caveats.append(
            f"No pretrained weights of {_listed(names)} were at hand: nothing is said here of what "
            "their pretraining is worth, and their rows from scratch do not stand for it."
        )
    caveats += [
        f"{TITLES.get(backbone, backbone)} is not the published one here, but has other options: "
        + ", ".join(f"{name} {value}" for name, value in options.items()) + "."
        for backbone, options in report["study"]["backbone_options"].items()
        if options and any(line["backbone"] == backbone for line in report["lines"])
    ]  # fmt: skip
    if report["epochs"] and min(report["epochs"]) < DOCUMENT_EPOCHS:
        caveats.append(
            f"The budget is {report['budget']} ({_epochs(report['epochs'])}), where the document "
            f"has {DOCUMENT_EPOCHS} epochs in mind: rows are compared as far as they come with "
            "this budget, and large networks from scratch need more."
        )
    if not report["photographs"]:
        caveats.append(
            "The ears are synthetic. What they say of anatomy is exact, what they say of the level "
            "of any measure on photographs is nothing."
        )
    if report["study"]["seeds"] < FEW_SEEDS:
        caveats.append(
            f"Each row has {report['study']['seeds']} seed{'s' * (report['study']['seeds'] > 1)}; "
            "the variance between seeds is pooled over all rows"
            + (" and unknown." if report["study"]["seeds"] == 1 else ".")
        )
    return caveats + [note[0].upper() + note[1:] + "." for note in report["notes"]]


def _findings(report: Mapping[str, Any]) -> list[str]:
    """The report in a few sentences."""
    findings = []
    quality = next((d for d in report["decisions"] if d["priority"] == "Best quality"), None)
    if quality and quality["best"]:
        best = quality["best"]
        text = f"Best reconstructions: {best['label']}, {number('psnr', best['value'])} dB"
        if "linear_pca" in quality:
            value = quality["linear_pca"]["value"]
            text += f"; linear PCA with as many numbers per ear reaches {number('psnr', value)} dB"
        findings.append(text + ".")
        if "lead" in quality:
            lead = quality["lead"]
            told = "" if lead["low"] > 0 else ", which the data do not tell apart"
            findings.append(
                f"Next is {quality['next']['label']}, {number('psnr', lead['value'])} dB behind "
                f"{interval('psnr', lead)}{told}."
            )
    counts = {
        verdict: sum(claim["verdict"] == verdict for claim in report["claims"])
        for verdict in (SUPPORTED, REFUTED, NOT_TESTABLE)
    }
    findings.append(
        f"Of the document's {len(report['claims'])} claims {counts[SUPPORTED]} are supported, "
        f"{counts[REFUTED]} refuted and {counts[NOT_TESTABLE]} not testable here."
    )
    pretrained = [x for x in report["lines"] if x["start"] == PRETRAINED]
    names = {x["backbone"] for x in pretrained if x["mode"] == FINE_TUNED}
    if not {"sam_vit_b", "resnet50"} <= names:
        findings.append(
            "Whether SAM's pretraining serves ears better than ImageNet's cannot be said here: "
            "pretrained weights of both are needed."
        )
    return findings


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _epochs(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low if low == high else f'{low} to {high}'} epoch{'s' * (high > 1)}"
