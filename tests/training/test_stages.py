import json
import logging

import numpy as np
import pytest

import jaxear
from jaxear.errors import UserError
from jaxear.train import main, train, train_stages
from jaxear.training.checkpoints import Checkpoints
from jaxear.training.inherit import inherit
from tests.training.tiny import TINY_SAM, tiny, without_eigenears

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_eigenears")]


@pytest.fixture(scope="module")
def staged(tmp_path_factory, photographs):
    """A finished run of two stages, the second with a block more."""
    out = tmp_path_factory.mktemp("staged") / "run"
    stages = [{"epochs": 1}, {"epochs": 1, "backbone_options": {**TINY_SAM, "depth": 3}}]
    with without_eigenears():
        train_stages(tiny(photographs, out, stages=stages), progress=False)
    return out


def leaves(run_dir, which="latest"):
    with Checkpoints(run_dir / "checkpoints", read_only=True) as checkpoints:
        return checkpoints.load_leaves(checkpoints.find(which))


def test_the_last_stage_is_the_model_of_a_staged_run(staged):
    model = jaxear.load_model(staged)
    assert model.run_dir == str(staged / "stage2")
    assert len(model.backbone.encoder.blocks) == 3


def test_a_finished_staged_run_is_neither_overwritten_nor_trained_again(staged, capsys):
    config = staged / "config.yaml"
    assert main(["--config", str(config)]) == 2
    assert "--resume" in capsys.readouterr().err
    before = leaves(staged / "stage1")
    assert main(["--out", str(staged), "--resume"]) == 0
    for name, leaf in leaves(staged / "stage1").items():
        np.testing.assert_array_equal(leaf, before[name])


def test_a_stage_starts_from_the_one_before(staged, caplog):
    """What stage 2 begins with: stage 1's leaves, and the new block."""
    shapes = {name: leaf.shape for name, leaf in leaves(staged / "stage2").items()}
    with caplog.at_level(logging.INFO):
        taken, account = inherit(shapes, staged / "stage1", same_backbone=True)
    assert all(".blocks.2." in name for name in account.new)
    assert account.new
    assert not account.left_behind
    before = leaves(staged / "stage1")
    np.testing.assert_array_equal(taken["decoder.stem.kernel"], before["decoder.stem.kernel"])
    assert "inherited: decoder.blocks" in caplog.text
    assert "new: encoder.backbone.encoder" in caplog.text


def test_nothing_of_another_backbone_is_taken(staged):
    shapes = {name: leaf.shape for name, leaf in leaves(staged / "stage1").items()}
    taken, account = inherit(shapes, staged / "stage1", same_backbone=False)
    assert not any(name.startswith("encoder.backbone.") for name in taken)
    assert {"decoder.stem.kernel", "encoder.head.mu.kernel"} <= taken.keys()
    assert all(name.startswith("encoder.backbone.") for name in account.left_behind)


def test_a_run_that_fits_nowhere_is_refused(staged):
    with pytest.raises(UserError, match="fits this model"):
        inherit({"decoder.stem.kernel": (1, 2)}, staged / "stage1", same_backbone=True)


def test_training_begins_where_the_other_run_ended(staged, photographs, tmp_path):
    """With a rate of almost nothing, a run that starts from another stays where that one was."""
    config = tiny(
        photographs, tmp_path / "run", init_from=str(staged / "stage1"), epochs=1,
        learning_rate=1e-12, weight_decay=0.0,
    )  # fmt: skip
    train(config, progress=False)
    before, after = leaves(staged / "stage1"), leaves(tmp_path / "run")
    for name, leaf in before.items():
        np.testing.assert_allclose(after[name], leaf, atol=1e-6, err_msg=name)


def test_hybrid_trains_and_freezes_each_of_its_backbones(photographs, tmp_path):
    options = {"backbones": ["sam", "sam_large"], "sam": TINY_SAM, "sam_large": TINY_SAM}
    config = tiny(
        photographs, tmp_path / "run", backbone="hybrid", backbone_options=options, freeze=1,
        epochs=2,
    )  # fmt: skip
    train(config, progress=False)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["backbone"] == "hybrid"
    with Checkpoints(tmp_path / "run" / "checkpoints", read_only=True) as checkpoints:
        first, last = checkpoints.steps()
        before, after = checkpoints.load_leaves(first), checkpoints.load_leaves(last)
    moved = {name for name in after if not np.array_equal(before[name], after[name])}
    for i in (0, 1):
        mine = {name for name in moved if f".backbones.{i}." in name}
        assert mine
        assert all(".blocks.1." in name for name in mine)
    model = jaxear.load_model(tmp_path / "run")
    assert [b.name for b in model.backbones.values()] == ["sam_vit_b", "sam_vit_l"]


def test_hybrid_says_what_its_options_are(photographs, tmp_path):
    config = tiny(photographs, tmp_path / "run", backbone="hybrid")
    with pytest.raises(UserError, match="hybrid has no option depth"):
        train(config, progress=False)
    with pytest.raises(UserError, match="weights must be auto or none"):
        jaxear.create_backbone("hybrid", weights="some.safetensors")
