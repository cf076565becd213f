"""A checkpoint of one of timm's architectures as leaves of jaxear's, and the proof of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxear.backbones.registry import get_spec
from jaxear.backbones.weights import CLASSIFIER, fill, named_leaves
from jaxear.errors import UserError
from porting.rules import RuleTable, flax_to_torch, torch_to_flax
from porting.timm_import import import_timm
from porting.timm_models import PORTS
from porting.verify import ParityReport, compare

COUNTER = "num_batches_tracked"
# timm's ConvNeXt keeps the norm before the classifier where there is none (`num_classes=0`).
HEAD_NORM = CLASSIFIER + "norm."


@dataclass(frozen=True)
class TimmPort:
    """A ported checkpoint.

    Attributes:
        backbone: jaxear's name of the architecture.
        naming: the scheme of the checkpoint's names, a key of the `PortSpec`'s tables.
        leaves: dotted Flax path -> array.
        state: the checkpoint under timm's names.
        classifier: whether the classifier is among them.
        notes: what was done beyond the rules, for the user.
    """

    backbone: str
    naming: str
    leaves: dict[str, np.ndarray]
    state: dict[str, np.ndarray]
    classifier: bool
    notes: tuple[str, ...]


def port(
    backbone: str, state: Mapping[str, np.ndarray], *, source: str, classifier: bool = True
) -> TimmPort:
    """Turn a state dict into leaves, whichever of the known naming schemes it has.

    Two things may be missing as a whole, and are noted: the classifier (of self-supervised weights)
    and the batch counters (of files older than torch 0.4.1, where torch itself sets them to 0).

    Args:
        backbone: a key of `PORTS`.
        state: torch key -> array.
        source: what to call it in an error.
        classifier: False leaves the classifier out even where there is one.

    Raises:
        UserError: the names are of a scheme that is known not to fit.
        PortingError: the state dict does not fit; all problems are listed.
    """
    spec = PORTS[backbone]
    for key, reason in spec.refused.items():
        if key in state:
            raise UserError(f"{source} cannot be ported as {backbone}: {reason}.")
    naming = max(spec.tables, key=lambda name: _matches(spec.tables[name], state))
    table = spec.tables[naming]
    state, notes = dict(state), []
    norms = [key.removesuffix("running_var") for key in state if key.endswith(".running_var")]
    if norms and not any(key.endswith(COUNTER) for key in state):
        state |= {norm + COUNTER: np.zeros((), np.int64) for norm in norms}
        notes.append("It has no batch counters, as very old files; they are set to 0.")
    head = {key: leaf for key in state if (leaf := _leaf(table, key)).startswith(CLASSIFIER)}
    complete = any(not leaf.startswith(HEAD_NORM) for leaf in head.values())
    has_classifier = complete and classifier
    if not has_classifier:
        state = {key: value for key, value in state.items() if key not in head}
        notes.append(
            "Its classifier is left out (--no-classifier)."
            if complete
            else "It has no classifier; logits cannot be computed from it."
        )
    shapes = {
        name: leaf.shape
        for name, leaf in named_leaves(_abstract(backbone, classifier=has_classifier)).items()
    }
    leaves = torch_to_flax(table, state, shapes, source=source)
    as_timm = state
    if naming != "timm":
        as_timm = flax_to_torch(spec.tables["timm"], leaves)
    return TimmPort(backbone, naming, leaves, as_timm, has_classifier, tuple(notes))


def _leaf(table: RuleTable, key: str) -> str:
    return next((path for rule in table.rules if (path := rule.to_flax(key))), "")


def _matches(table: RuleTable, state: Mapping[str, np.ndarray]) -> int:
    return sum(bool(_leaf(table, key)) or table.is_exempt(key) for key in state)


def _abstract(backbone: str, *, classifier: bool) -> nnx.Module:
    """The encoder without values."""
    build: Any = get_spec(backbone).build
    return nnx.eval_shape(
        lambda: build(
            image_size=(128, 128),  # none of these architectures depends on it
            dtype=np.float32,
            param_dtype=np.float32,
            rngs=nnx.Rngs(0),
            classifier=classifier,
        )
    )


def verify(ported: TimmPort, image_size: tuple[int, int]) -> ParityReport:
    """Run timm's model and the port on random images of a size; compare all stages and the logits.

    timm's model is loaded from the checkpoint's own tensors where they have timm's names, so that a
    wrong rule shows.

    Raises:
        UserError: timm cannot be imported.
    """
    import torch

    timm = import_timm()
    spec, port_spec = get_spec(ported.backbone), PORTS[ported.backbone]
    images = np.random.default_rng(0).uniform(size=(2, *image_size, 3))
    x = ((images - spec.mean) / spec.std).astype(np.float32)

    model = timm.create_model(port_spec.timm_name).eval()
    given = {key: torch.from_numpy(np.array(value)) for key, value in ported.state.items()}
    # Without a classifier timm keeps its own, random and unused.
    own = {} if ported.classifier else model.state_dict()
    model.load_state_dict({**own, **given}, strict=True)
    with torch.no_grad():
        torch_x = torch.from_numpy(x).permute(0, 3, 1, 2)
        maps = port_spec.stages(model, torch_x)
        reference = {name: value.permute(0, 2, 3, 1).numpy() for name, value in maps.items()}
        if ported.classifier:
            reference["logits"] = model(torch_x).numpy()

    encoder: Any = _abstract(ported.backbone, classifier=ported.classifier)
    fill(encoder, ported.leaves, source="the port")
    graph, weights = nnx.split(encoder)

    def forward(weights: nnx.State, x: jax.Array) -> dict[str, jax.Array]:
        encoder = nnx.merge(graph, weights)
        outputs = dict(zip(maps, encoder.features(x, tuple(maps)), strict=True))
        return outputs | ({"logits": encoder.logits(x)} if ported.classifier else {})

    with jax.default_matmul_precision("highest"):  # accelerators round float32 more coarsely
        return compare(reference, reference, jax.jit(forward)(weights, x))
