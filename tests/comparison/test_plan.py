"""Which rows a study has, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jaxear.comparison.plan import (
    FROZEN,
    PRETRAINED,
    SCRATCH,
    Row,
    load_study,
    make_study,
    missing_weights,
    save_study,
)
from jaxear.errors import UserError
from tests.comparison.conftest import SHA256, write_pretrained


def test_rows_are_backbones_times_starts_and_frozen_ones_are_pretrained():
    rows = make_study(backbones=("resnet50", "sam", "resnet50")).rows()
    assert [row.label for row in rows] == [
        "ResNet-50, pretrained",
        "ResNet-50, pretrained, frozen",
        "ResNet-50, from scratch",
        "SAM ViT-B, pretrained",
        "SAM ViT-B, pretrained, frozen",
        "SAM ViT-B, from scratch",
    ]
    assert len({row.key for row in rows}) == 6
    config = make_study(backbones=("sam",)).config(Row("sam_vit_b", PRETRAINED, FROZEN), 1, Path())
    assert (config.weights, config.freeze, config.seed) == ("auto", "all", 1)


def test_a_pretrained_row_needs_a_file_that_says_where_it_comes_from(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXEAR_WEIGHTS", str(tmp_path))
    leaves = {"kernel": np.zeros(1, np.float32)}
    row = Row("sam_vit_b", PRETRAINED)
    command = "run `python scripts/port_sam.py --model vit_b`"
    assert missing_weights(row) == f"weights missing, {command}"
    assert not missing_weights(Row("sam_vit_b", SCRATCH))
    write_pretrained(tmp_path, leaves, source_sha256="")
    assert "does not say which checkpoint" in missing_weights(row)
    write_pretrained(tmp_path, leaves, backbone="sam_vit_l")
    assert "no port of sam_vit_b" in missing_weights(row)
    write_pretrained(tmp_path, leaves, source_sha256=SHA256)
    assert missing_weights(row) == ""
    assert missing_weights(Row("hybrid", PRETRAINED)) == (
        "weights missing, run `python scripts/port_timm.py --model resnet50`"
    )


def test_a_folder_holds_one_protocol_but_may_grow(tmp_path):
    save_study(make_study(backbones=("sam",), seeds=1), tmp_path)
    grown = make_study(backbones=("sam", "resnet50"), seeds=3)
    save_study(grown, tmp_path)
    assert load_study(tmp_path) == grown
    with pytest.raises(UserError, match="latent_dim was 128, now 64"):
        save_study(make_study(settings={"latent_dim": 64}), tmp_path)
    with pytest.raises(UserError, match="budget_steps was 90, now None; budget_seconds was None"):
        save_study(make_study(budget_seconds=60.0), tmp_path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"settings": {"seed": 3}}, "The study itself sets seed"),
        ({"settings": {"latent": 3}}, "Unknown settings: latent"),
        ({"weights": ("imagenet",)}, "--weights must be some of"),
        ({"weights": (SCRATCH,), "modes": (FROZEN,)}, "add pretrained to --weights"),
        ({"backbones": ("dino",)}, "There is no backbone 'dino'"),
        ({"seeds": 0}, "--seeds must be 1"),
        ({"budget_steps": 0}, "--budget-steps must be above 0"),
    ],
)
def test_what_cannot_work_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        make_study(**given)
