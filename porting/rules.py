"""Rule tables: which torch key is which Flax leaf, strict in both directions.

A rule is a pair of patterns and a transform:

    Rule("blocks.{i}.attn.qkv.weight", "blocks.{i}.attn.qkv.kernel", LINEAR)

`{i}` stands for a number; `{name:regex}` for whatever the regex matches, e.g. `{n:1|2|3}`. The same
placeholders stand on both sides, so that a table reads from torch to Flax and back.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from jaxear.errors import UserError
from porting.transforms import IDENTITY, Transform

_PLACEHOLDER = re.compile(r"\{(\w+)(?::([^{}]*))?\}")


class PortingError(UserError):
    """A state dict does not fit its rule table; `problems` lists everything that is wrong."""

    def __init__(self, source: str, problems: list[str]):
        self.problems = sorted(problems)
        shown = self.problems[:40]
        if len(self.problems) > len(shown):
            shown.append(f"... and {len(self.problems) - len(shown)} more")
        super().__init__(
            f"{source} does not fit ({len(self.problems)} problems):\n  " + "\n  ".join(shown)
        )


@dataclass(frozen=True)
class Rule:
    """One kind of parameter: torch pattern, Flax pattern, transform from one to the other."""

    torch: str
    flax: str
    transform: Transform = IDENTITY

    @cached_property
    def _placeholders(self) -> dict[str, str]:
        return {name: regex or r"\d+" for name, regex in _PLACEHOLDER.findall(self.torch)}

    def _regex(self, pattern: str) -> re.Pattern[str]:
        parts = _PLACEHOLDER.split(pattern)
        # re.split yields literal, name, regex, literal, name, regex, ..., literal
        out = [re.escape(parts[0])]
        for i in range(1, len(parts), 3):
            out.append(f"(?P<{parts[i]}>{self._placeholders[parts[i]]})")
            out.append(re.escape(parts[i + 2]))
        return re.compile("".join(out))

    @cached_property
    def torch_regex(self) -> re.Pattern[str]:
        return self._regex(self.torch)

    @cached_property
    def flax_regex(self) -> re.Pattern[str]:
        return self._regex(self.flax)

    def to_flax(self, key: str) -> str | None:
        """The Flax path of a torch key, or None where the rule does not speak of it."""
        match = self.torch_regex.fullmatch(key)
        return match and _PLACEHOLDER.sub(lambda m: match[m[1]], self.flax)

    def to_torch(self, path: str) -> str | None:
        """The torch key of a Flax path, or None where the rule does not speak of it."""
        match = self.flax_regex.fullmatch(path)
        return match and _PLACEHOLDER.sub(lambda m: match[m[1]], self.torch)


@dataclass(frozen=True)
class Exempt:
    """Torch keys (a regex) that have no place in the Flax model, and why."""

    regex: str
    reason: str


@dataclass(frozen=True)
class RuleTable:
    """All rules of a family, and the named exceptions."""

    rules: tuple[Rule, ...]
    exempt: tuple[Exempt, ...] = ()

    def is_exempt(self, key: str) -> bool:
        return any(re.fullmatch(exempt.regex, key) for exempt in self.exempt)


def torch_to_flax(
    table: RuleTable,
    state: Mapping[str, np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    source: str = "the state dict",
) -> dict[str, np.ndarray]:
    """Turn a torch state dict into the leaves of a Flax model.

    Args:
        table: the family's rules.
        state: torch keys -> arrays.
        shapes: the Flax leaves to fill, buffers included: dotted path -> shape.
        source: what to call the state dict in an error.

    Returns:
        Dotted Flax path -> array, exactly the keys of `shapes`.

    Raises:
        PortingError: a torch key meets no rule or several, a leaf is filled never or twice, a shape
            differs, a value is not finite. All of these are collected before it is raised.
    """
    leaves: dict[str, np.ndarray] = {}
    origin: dict[str, str] = {}
    problems: list[str] = []
    for key, value in state.items():
        hits = [(rule, path) for rule in table.rules if (path := rule.to_flax(key)) is not None]
        if table.is_exempt(key):
            if hits:
                problems.append(f"both exempt and ruled: {key}")
            continue
        if len(hits) != 1:
            what = "unexpected key" if not hits else f"key meets {len(hits)} rules"
            problems.append(f"{what}: {key} {list(value.shape)}")
            continue
        rule, path = hits[0]
        if path in origin:
            problems.append(f"written twice: {path}, by {origin[path]} and {key}")
            continue
        if path not in shapes:
            problems.append(f"no such leaf in the model: {path}, from {key}")
            continue
        origin[path] = key
        expected = rule.transform.inverse(np.empty(shapes[path], value.dtype)).shape
        if value.shape != expected:
            problems.append(f"wrong shape: {key} {list(value.shape)}, expected {list(expected)}")
        elif not np.all(np.isfinite(value)):
            problems.append(f"not finite: {key} holds NaN or infinity")
        else:
            leaves[path] = rule.transform.forward(value)
    for path in shapes.keys() - origin.keys():
        keys = [key for rule in table.rules if (key := rule.to_torch(path)) is not None]
        problems.append(f"missing key: {' or '.join(keys) or '(no rule)'}, for {path}")
    if problems:
        raise PortingError(source, problems)
    return leaves


def flax_to_torch(table: RuleTable, leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Turn the leaves of a Flax model back into a torch state dict, by the same table.

    Raises:
        PortingError: a leaf meets no rule or several, or two leaves give the same key.
    """
    state: dict[str, np.ndarray] = {}
    problems: list[str] = []
    for path, value in leaves.items():
        hits = [(rule, key) for rule in table.rules if (key := rule.to_torch(path)) is not None]
        if len(hits) != 1:
            problems.append(f"leaf meets {len(hits)} rules: {path}")
            continue
        rule, key = hits[0]
        if key in state:
            problems.append(f"written twice: {key}")
        state[key] = rule.transform.inverse(np.asarray(value))
    if problems:
        raise PortingError("the Flax model", problems)
    return state
