"""What components of ears mean: how much of each is anatomy, pose, light, colour, ...

Two measures, both shares of the variance of a component's scores (see shares.py):

- by the factors that synthetic ears are made from. They are independent, so their shares add up to
  those of anatomy, pose, light, skin, background and camera. What is left unexplained is what
  factors do only together, hair, spots and noise that no factor decides, and the model's own.
- by statistics of the images (see image_statistics.py), for any ears: how much of a component
  follows from the picture's brightness, contrast, colour and from the size of what it shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from jaxear.data.synthetic import FACTORS
from jaxear.eigenears.image_statistics import STATISTICS, image_statistics
from jaxear.eigenears.meaning_figures import meaning_figure
from jaxear.eigenears.shares import IMAGES_PER_COLUMN, Regression, Shares, best_degree, polynomials
from jaxear.errors import UserError

__all__ = ["describe_components", "meaning_figure", "print_description", "sentence"]

KINDS = ("anatomy", "pose", "light", "skin", "background", "camera")
_FACTOR = {factor.name: factor for factor in FACTORS}
GROUPS = tuple(dict.fromkeys(statistic.group for statistic in STATISTICS))
SPOKEN = 0.03  # shares below this are not worth a word


def describe_components(
    scores: np.ndarray, images: np.ndarray, factors: Mapping[str, np.ndarray] | None = None
) -> dict[str, Any]:
    """How much of each component is anatomy and how much is everything else.

    All shares are of the variance of a component's scores, cross-validated (see shares.py): for
    what plays no part they are 0 on average, a little above or below. Standard errors take images
    as independent; several of one person say less than so many of different people.

    Args:
        scores: [n, k], as `EigenEars.project` gives them for the images.
        images: [n, H, W, 3], uint8 or floats in [0, 1], prepared as for training.
        factors: {name: [n]} of synthetic ears, some or all of `jaxear.data.synthetic.FACTORS`.

    Returns:
        A dictionary for JSON: n_images; `notes`, what could not be measured and why; and
        components: one dictionary each, with
            component: its number, from 1.
            sentence: what it is, in words.
            statistics: {group: share} of brightness, contrast, colour, ..., each its fair part in
                what they explain together (correlated as they are, see `Regression.fair_shares`).
                With too few images this and what follows is left out, which `notes` says.
            statistics_alone: {group: share} of each by itself.
            statistics_share, statistics_share_se: what they explain together.
            rest: 1 - statistics_share, which is what they say nothing of.
            anatomy_at_most: rest and the part of scale; for how large an ear looks tells both how
                large it is and how near the camera was, and one picture cannot say which.
        With factors, each component also has
            factors: {name: share}; correlations: {name: r} of score and factor.
            kinds: {kind: share}, the sums over anatomy, pose, light, ...; unexplained: the rest.
            anatomy_share, anatomy_share_se.
        and the dictionary, too,
            factors: per factor its name, kind and unit; r2 and r2_se: how much of it can be read
                from all the scores together.
            image_statistics: per statistic its name and group, and kinds: what it shows.
            check: how far the statistics can be believed, as they have to be for photographs:
                mean_difference and mean_absolute_difference, over the components, of
                statistics_share from the true share of all kinds but anatomy; and below_bound, for
                how many of the components anatomy_share is no more than anatomy_at_most.

    Raises:
        UserError: the arrays do not belong together, or a factor is unknown.
    """
    scores = np.asarray(scores, np.float64)
    _check(scores, images, factors)
    n, k = scores.shape
    notes: list[str] = []
    description: dict[str, Any] = {"n_images": n, "notes": notes}
    components: list[dict[str, Any]] = [{"component": i + 1} for i in range(k)]
    statistics: dict[str, np.ndarray] = {}
    if degree := best_degree(n, len(STATISTICS)):
        statistics = image_statistics(images)
        _explain_by_statistics(components, scores, statistics, degree)
    else:
        notes.append(_too_few(n, len(STATISTICS), "statistics of the images"))
    if factors:
        if degree := best_degree(n, len(factors)):
            _explain_by_factors(components, scores, factors, degree)
            if statistics:
                description["image_statistics"] = _what_statistics_show(statistics, factors, degree)
                description["check"] = _check_of_statistics(components)
        else:
            notes.append(_too_few(n, len(factors), "factors"))
        if degree := best_degree(n, k):
            description["factors"] = _readable(scores, factors, degree)
        else:
            notes.append(_too_few(n, k, "scores"))
    for component in components:
        component["sentence"] = sentence(component)
    return {**description, "components": components}


def print_description(description: Mapping[str, Any], console: Console, n: int = 8) -> None:
    """The first n components as a table, each with its sentence."""
    components = description["components"][:n]
    known, seen = (key in components[0] for key in ("kinds", "statistics"))
    table = Table(
        title=f"What components mean ({description['n_images']} ears)",
        caption="shares of the variance of a component's scores, cross-validated",
    )
    table.add_column("")
    if known:
        table.add_column("anatomy", justify="right", no_wrap=True)
    if seen:
        table.add_column("image statistics", justify="right", no_wrap=True)
    table.add_column("made of", ratio=1)
    for c in components:
        cells = []
        if known:
            cells.append(f"{_percent(c['anatomy_share'])} ± {100 * c['anatomy_share_se']:.0f}")
        if seen:
            cells.append(
                f"{_percent(c['statistics_share'])} ± {100 * c['statistics_share_se']:.0f}"
            )
        number, words = c["sentence"].split(": ", 1)
        table.add_row(number, *cells, words)
    console.print(table)
    for note in description["notes"]:
        console.print(note)


def sentence(component: Mapping[str, Any]) -> str:
    """What one component of a description is, in words.

    Shares below `SPOKEN` are left out, and where a group has one cause alone that is named in its
    place.
    """
    start = f"PC{component['component']}: "
    said = []
    if "kinds" in component:
        for kind, share in _by_size(component["kinds"]):
            names = [
                f"{name} {_percent(part)}"
                for name, part in _by_size(component["factors"])
                if _FACTOR[name].kind == kind and part >= SPOKEN
            ]
            said.append(f"{_percent(share)} {kind}" + (f" ({', '.join(names)})" if names else ""))
        said.append(f"{_percent(component['unexplained'])} unexplained")
        return start + ", ".join(said) + "."
    if component.get("statistics") is None:
        return start + "too few images to say."
    said = [f"{group} {_percent(share)}" for group, share in _by_size(component["statistics"])]
    return (
        f"{start}{_percent(component['statistics_share'])} follow from the picture's "
        f"{', '.join(said) or 'statistics'}; anatomy is {_percent(component['anatomy_at_most'])} "
        "at most."
    )


def _by_size(shares: Mapping[str, float]) -> list[tuple[str, float]]:
    """The shares worth a word, the largest first."""
    spoken = [(name, share) for name, share in shares.items() if share >= SPOKEN]
    return sorted(spoken, key=lambda item: -item[1])


def _percent(share: float) -> str:
    return f"{max(100 * share, 0):.0f} %"


def _explain_by_statistics(
    components: list[dict[str, Any]],
    scores: np.ndarray,
    statistics: Mapping[str, np.ndarray],
    degree: int,
) -> None:
    """Adds to each component what the images' statistics say of it."""
    columns = {
        group: np.concatenate(
            [polynomials(statistics[s.name], degree) for s in STATISTICS if s.group == group],
            axis=1,
        )
        for group in GROUPS
    }
    regression = Regression(columns, scores)
    parts, together = regression.fair_shares()
    alone = {group: regression.share(regression.predicted([group])) for group in GROUPS}
    for i, component in enumerate(components):
        component["statistics"] = {group: float(parts[group][i]) for group in GROUPS}
        component["statistics_alone"] = {group: float(alone[group].value[i]) for group in GROUPS}
        component["statistics_share"] = float(together.value[i])
        component["statistics_share_se"] = float(together.error[i])
        component["rest"] = 1.0 - component["statistics_share"]
        component["anatomy_at_most"] = component["rest"] + component["statistics"]["scale"]


def _explain_by_factors(
    components: list[dict[str, Any]],
    scores: np.ndarray,
    factors: Mapping[str, np.ndarray],
    degree: int,
) -> None:
    """Adds to each component what the factors say of it."""
    shares, by_kind = _shares_of_factors(scores, factors, degree)
    for i, component in enumerate(components):
        component["factors"] = {name: float(share[i]) for name, share in shares.items()}
        component["correlations"] = {
            name: _correlation(scores[:, i], values) for name, values in factors.items()
        }
        component["kinds"] = {kind: float(share.value[i]) for kind, share in by_kind.items()}
        component["unexplained"] = 1.0 - sum(component["kinds"].values())
        component["anatomy_share"] = component["kinds"]["anatomy"]
        component["anatomy_share_se"] = float(by_kind["anatomy"].error[i])


def _readable(
    scores: np.ndarray, factors: Mapping[str, np.ndarray], degree: int
) -> list[dict[str, Any]]:
    """How much of each factor all scores together tell."""
    columns = {str(i): polynomials(column, degree) for i, column in enumerate(scores.T)}
    regression = Regression(columns, np.column_stack(list(factors.values())))
    r2 = regression.share(regression.predicted())
    return [
        {
            "name": name,
            "kind": _FACTOR[name].kind,
            "unit": _FACTOR[name].unit,
            "r2": float(r2.value[i]),
            "r2_se": float(r2.error[i]),
        }
        for i, name in enumerate(factors)
    ]


def _what_statistics_show(
    statistics: Mapping[str, np.ndarray], factors: Mapping[str, np.ndarray], degree: int
) -> list[dict[str, Any]]:
    """The share of each kind of factor in each statistic."""
    _, kinds = _shares_of_factors(
        np.column_stack([statistics[s.name] for s in STATISTICS]), factors, degree
    )
    return [
        {
            "name": statistic.name,
            "group": statistic.group,
            "description": statistic.description,
            "kinds": {kind: float(share.value[i]) for kind, share in kinds.items()},
        }
        for i, statistic in enumerate(STATISTICS)
    ]


def _check_of_statistics(components: list[dict[str, Any]]) -> dict[str, float]:
    """What the statistics say of the components, beside what the factors do."""
    differences = np.array(
        [
            c["statistics_share"] - sum(c["kinds"][kind] for kind in KINDS if kind != "anatomy")
            for c in components
        ]
    )
    return {
        "mean_difference": float(differences.mean()),
        "mean_absolute_difference": float(np.abs(differences).mean()),
        "below_bound": sum(c["anatomy_share"] <= c["anatomy_at_most"] for c in components),
    }


def _shares_of_factors(
    values: np.ndarray, factors: Mapping[str, np.ndarray], degree: int
) -> tuple[dict[str, np.ndarray], dict[str, Shares]]:
    """The share of each factor, and that of each kind, in values [n, k]."""
    causes = {name: polynomials(column, degree) for name, column in factors.items()}
    regression = Regression(causes, values)
    parts = regression.contributions()
    by_kind = {kind: np.zeros(values.shape) for kind in KINDS}
    for name, part in parts.items():
        by_kind[_FACTOR[name].kind] += part
    return (
        {name: regression.share(part).value for name, part in parts.items()},
        {kind: regression.share(part) for kind, part in by_kind.items()},
    )


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's; 0 where one of them does not vary."""
    a, b = a - a.mean(), b - np.mean(b)
    norm = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / norm) if norm > 0 else 0.0


def _check(
    scores: np.ndarray, images: np.ndarray, factors: Mapping[str, np.ndarray] | None
) -> None:
    """Raises UserError where the arrays do not belong together."""
    n = len(images)
    lengths = {name: len(values) for name, values in (factors or {}).items()}
    if scores.ndim != 2 or len(scores) != n or any(length != n for length in lengths.values()):
        raise UserError(
            f"Scores of shape {scores.shape} do not describe {n} images"
            + (f" with {sorted(set(lengths.values()))} values of their factors" if lengths else "")
            + "; expected [n, k] scores, n images and n values of each factor, of the same ears."
        )
    if not np.isfinite(scores).all():
        raise UserError("Some scores are not finite; the model that made them is not sound.")
    if unknown := sorted(lengths.keys() - _FACTOR.keys()):
        raise UserError(
            f"Unknown factors {unknown}; known are those of jaxear.data.synthetic.FACTORS."
        )


def _too_few(n: int, causes: int, what: str) -> str:
    return (
        f"{n} images are too few for the shares of {causes} {what}: "
        f"{IMAGES_PER_COLUMN * causes} are needed at least."
    )
