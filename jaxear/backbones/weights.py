"""Ported weights: one safetensors file per backbone, leaves by dotted path, facts as metadata."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

from jaxear.errors import UserError, WeightsMismatchError, WeightsNotFoundError

FORMAT = "jaxear-backbone-1"
CLASSIFIER = "classifier."


def weights_path(name: str) -> Path:
    """Where the ported file of backbone `name` is looked for: $JAXEAR_WEIGHTS, else `weights/`."""
    return Path(os.environ.get("JAXEAR_WEIGHTS", "weights")) / f"{name}.safetensors"


def named_leaves(module: nnx.Module) -> dict[str, nnx.Variable]:
    """All variables of a module, buffers included, by dotted path ("blocks.0.attn.qkv.kernel")."""
    return {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(module))}


def read_weights(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read a ported file: its leaves and its metadata (JSON values decoded).

    Raises:
        WeightsNotFoundError: there is no such file.
        WeightsMismatchError: it is not a file that the porting scripts wrote, or it is damaged.
    """
    with _ported_file(path) as (file, metadata):
        return {key: file.get_tensor(key) for key in file.keys()}, metadata  # noqa: SIM118


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a ported file says of itself; its arrays are not read. Errors as `read_weights`'s."""
    with _ported_file(path) as (_, metadata):
        return metadata


@contextmanager
def _ported_file(path: str | os.PathLike[str]) -> Iterator[tuple[Any, dict[str, Any]]]:
    path = Path(path)
    if not path.is_file():
        raise WeightsNotFoundError(f"No ported weights at {path}.")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
            if metadata.get("format") != FORMAT:
                raise WeightsMismatchError(
                    f"{path} was not written by jaxear's porting scripts (no format {FORMAT!r} in "
                    "its metadata). Port the original checkpoint with scripts/port_sam.py or "
                    "scripts/port_timm.py first."
                )
            yield file, metadata
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise WeightsMismatchError(
            f"{path} cannot be read ({error}); port the original checkpoint again."
        ) from error


def fill(module: nnx.Module, leaves: Mapping[str, np.ndarray], *, source: str) -> None:
    """Write `leaves` into the module's variables, strictly: each one once, shapes equal, none left.

    Leaves of a classifier are passed over where the module was created without one.

    Raises:
        WeightsMismatchError: lists every missing, unexpected and misshapen leaf.
    """
    targets = named_leaves(module)
    if not any(name.startswith(CLASSIFIER) for name in targets):
        leaves = {k: v for k, v in leaves.items() if not k.startswith(CLASSIFIER)}
    problems = [f"missing: {name}" for name in targets.keys() - leaves.keys()]
    problems += [f"unexpected: {name}" for name in leaves.keys() - targets.keys()]
    problems += [
        f"shape of {name}: {leaves[name].shape}, expected {targets[name].shape}"
        for name in targets.keys() & leaves.keys()
        if leaves[name].shape != targets[name].shape
    ]
    problems += [
        f"type of {name}: {leaves[name].dtype}, expected {targets[name].dtype}"
        for name in targets.keys() & leaves.keys()
        if not _same_kind(leaves[name].dtype, targets[name].dtype)
    ]
    if problems:
        raise WeightsMismatchError(
            f"{source} does not fit the architecture ({len(problems)} problems):\n  "
            + "\n  ".join(sorted(problems))
        )
    state = nnx.state(module)
    for path, variable in nnx.to_flat_state(state):
        variable.set_value(jnp.asarray(leaves[".".join(map(str, path))], variable.dtype))
    nnx.update(module, state)


def _same_kind(given: Any, expected: Any) -> bool:
    """Floats may change their precision, counters may not."""
    return given == expected or all(jnp.issubdtype(d, jnp.floating) for d in (given, expected))


def check_backbone(metadata: Mapping[str, Any], name: str, path: str | os.PathLike[str]) -> None:
    """Refuse the weights of another architecture.

    Raises:
        UserError: the file at `path` is a port of something other than `name`.
    """
    if metadata.get("backbone") != name:
        raise UserError(
            f"{path} holds weights of {metadata.get('backbone')}, but {name} was asked for."
        )
