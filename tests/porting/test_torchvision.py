"""torchvision's own models, ported from their state dicts by the command, against their logits."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from jaxear.backbones import create_backbone, read_weights
from porting import timm_cli
from tests.torch_reference import (
    calibrate,
    import_timm,
    natural_images,
    randomize,
    relative_error,
    torch,
)

pytestmark = pytest.mark.torch


def torchvision_model(name: str):
    import_timm()  # lets torchvision be imported
    models = pytest.importorskip("torchvision.models")
    with torch.random.fork_rng():
        return getattr(models, name)().eval()


@pytest.mark.parametrize("name", ["resnet50", "vgg16"])
def test_a_port_computes_torchvisions_logits(name, tmp_path):
    x = natural_images(2, 64, 64, seed=1)
    model = torchvision_model(name)
    if name == "resnet50":
        model = calibrate(randomize(model), natural_images(4, 64, 64))
    checkpoint, out = tmp_path / f"{name}.pth", tmp_path / "port.safetensors"
    torch.save(model.state_dict(), checkpoint)
    arguments = ["--model", name, "--checkpoint", checkpoint, "--out", out, "--no-verify"]
    assert timm_cli.main([str(argument) for argument in arguments]) == 0
    naming = {"resnet50": "timm", "vgg16": "torchvision"}[name]  # ResNet's names are the same
    assert read_weights(out)[1]["source_naming"] == naming

    backbone = create_backbone(name, weights=str(out), image_size=64, classifier=True)
    graph, state = nnx.split(backbone.encoder)
    run = jax.jit(lambda state, x: nnx.merge(graph, state).logits(x))
    with torch.no_grad():
        expected = model(x)
    found = run(state, np.moveaxis(x.numpy(), 1, -1))
    assert relative_error(found, expected) <= 1e-5
    assert relative_error(found[:1], found[1:]) > 0.01  # they depend on the image


def test_the_refused_mobilenet_is_another_function_as_the_message_says(tmp_path, capsys):
    model = torchvision_model("mobilenet_v3_large")
    epsilons = {m.eps for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)}
    assert epsilons == {1e-3}
    checkpoint = Path(tmp_path / "mobilenet.pth")
    torch.save(model.state_dict(), checkpoint)
    name = "mobilenetv3_large_100"
    assert timm_cli.main(["--model", name, "--checkpoint", str(checkpoint)]) == 2
    assert "its BatchNorm adds 1e-3 to the variance" in capsys.readouterr().err
    own = import_timm().create_model(name)
    assert {m.eps for m in own.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {1e-5}
