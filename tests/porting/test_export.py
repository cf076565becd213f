"""The way back: what is exported loads strictly, by the very code that the command prints."""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from jaxear.backbones import create_backbone, get_spec
from jaxear.backbones.base import Backbone
from jaxear.backbones.sam import SamConfig, SamEncoder
from jaxear.backbones.weights import fill, named_leaves
from jaxear.errors import UserError
from jaxear.model import load_model
from jaxear.train import train
from porting import export
from porting.export import export_encoder, load_call, save_state
from porting.timm_models import PORTS
from tests.torch_reference import import_timm, numpy_state, relative_error, torch
from tests.training.tiny import TINY_SAM, quick_compilation, tiny, without_eigenears

pytestmark = pytest.mark.torch

SAM = SamConfig(32, 3, 4, (1,), 48, window_size=3, out_channels=16)


def randomized(backbone: Backbone) -> Backbone:
    """The same backbone with a random number in every leaf, whole ones in counters."""
    rng = np.random.default_rng(0)
    leaves = {
        name: rng.normal(size=leaf.shape).astype(np.float32)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
        else np.full(leaf.shape, 7, leaf.dtype)
        for name, leaf in named_leaves(backbone.encoder).items()
    }
    fill(backbone.encoder, leaves, source="the test")
    return backbone


def timm_backbone(name: str, **options: Any) -> Backbone:
    return randomized(nnx.eval_shape(lambda: create_backbone(name, weights="none", **options)))


def encode(backbone: Backbone, x: np.ndarray) -> jax.Array:
    graph, state = nnx.split(backbone.encoder)
    return jax.jit(lambda state, x: nnx.merge(graph, state)(x))(state, x)


def sam_backbone(image_size=(64, 64)) -> Backbone:
    encoder = nnx.eval_shape(lambda: SamEncoder(SAM, image_size, rngs=nnx.Rngs(0)))
    backbone = randomized(Backbone(encoder, get_spec("sam_vit_b"), features="last"))
    # Random numbers of size one would saturate the attention.
    leaves = {k: np.asarray(v[...]) * 0.2 for k, v in named_leaves(backbone.encoder).items()}
    fill(backbone.encoder, leaves, source="the test")
    return backbone


def load(code: str) -> Any:
    """Run what the command tells the user to run."""
    import_timm()  # lets torchvision be imported, which timm and segment_anything both do
    names: dict[str, Any] = {}
    exec(code, names)
    return names["model"].eval()


@pytest.mark.parametrize("classifier", [False, True])
@pytest.mark.parametrize("name", [name for name in PORTS if name != "vgg16"])
def test_timms_model_loads_it_strictly(name, classifier, tmp_path):
    backbone = timm_backbone(name, classifier=classifier)
    path = tmp_path / "encoder.safetensors"
    state = export_encoder(backbone)
    save_state(path, state)
    model = load(load_call(backbone, path))
    loaded = numpy_state(model)
    assert loaded.keys() == state.keys()
    for key, value in loaded.items():
        np.testing.assert_array_equal(value, state[key], err_msg=key)
        assert value.dtype == state[key].dtype, key


def test_timms_vgg_loads_it_strictly(tmp_path):
    backbone = timm_backbone("vgg16")
    save_state(tmp_path / "vgg.pth", export_encoder(backbone))
    model = load(load_call(backbone, tmp_path / "vgg.pth"))
    x = np.random.default_rng(1).normal(size=(1, 32, 32, 3)).astype(np.float32)
    with torch.no_grad():
        reference = model.forward_features(torch.tensor(x).permute(0, 3, 1, 2))
    reference = reference.permute(0, 2, 3, 1).numpy()
    assert relative_error(encode(backbone, x), reference) < 1e-5


@pytest.mark.parametrize("prefix", ["", "image_encoder."])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_metas_encoder_loads_it_strictly_and_computes_the_same(prefix, suffix, tmp_path):
    backbone = sam_backbone()
    path = tmp_path / f"sam{suffix}"
    state = export_encoder(backbone, prefix=prefix)
    assert all(key.startswith(prefix) for key in state)
    save_state(path, state)
    model = load(load_call(backbone, path, prefix=prefix))
    x = np.random.default_rng(1).normal(size=(2, 64, 64, 3)).astype(np.float32)
    with torch.no_grad():
        reference = model(torch.tensor(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
    assert relative_error(encode(backbone, x), reference) < 1e-5


def test_a_pth_is_of_plain_tensors_and_keeps_counters_as_torch_has_them(tmp_path):
    state = {"a": np.ones((2, 3), np.float32)[:, ::2], "n": np.array(7)}
    save_state(tmp_path / "x.pth", state)
    loaded = torch.load(tmp_path / "x.pth", weights_only=True)
    assert loaded["n"].dtype == torch.int64
    assert loaded["n"].shape == ()
    np.testing.assert_array_equal(loaded["a"].numpy(), state["a"])
    save_state(tmp_path / "x.safetensors", state)
    np.testing.assert_array_equal(load_file(tmp_path / "x.safetensors")["a"], state["a"])


def test_what_cannot_be_written_leaves_nothing_behind(tmp_path, monkeypatch):
    path = tmp_path / "x.pth"
    path.write_bytes(b"before")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(UserError, match=r"Cannot write .*No space left"):
        save_state(path, {"a": np.ones(3)})
    assert [p.name for p in tmp_path.iterdir()] == ["x.pth"]
    assert path.read_bytes() == b"before"


def test_errors_of_the_user_are_named():
    with pytest.raises(UserError, match=r"encoder\.onnx must end in \.pth or \.safetensors"):
        save_state("encoder.onnx", {})
    with pytest.raises(UserError, match=r"square images only, and this encoder is for 64x96"):
        load_call(sam_backbone((64, 96)), "x.pth")
    backbone = sam_backbone()
    backbone.encoder, backbone.name = nnx.Linear(2, 2, rngs=nnx.Rngs(0)), "hybrid"
    with pytest.raises(UserError, match=r"hybrid backbone has no single torch model"):
        export_encoder(backbone)


def test_a_leaf_that_no_rule_knows_is_an_error():
    backbone = sam_backbone()
    backbone.encoder.extra = nnx.Param(jnp.zeros(3))
    with pytest.raises(UserError, match="leaf meets 0 rules: extra"):
        export_encoder(backbone)


def test_the_command_writes_an_encoder_of_a_run_and_says_how_to_load_it(
    tmp_path, photographs, capsys
):
    run, out = tmp_path / "run", tmp_path / "encoder.pth"
    options = {"backbones": ["sam", "sam_large"], "sam": TINY_SAM, "sam_large": TINY_SAM}
    config = tiny(photographs, run, backbone="hybrid", backbone_options=options, epochs=1)
    with quick_compilation(), without_eigenears():
        train(config, progress=False)

    assert export.main(["--run", str(run), "--out", str(out)]) == 2
    assert "Say which backbone by --part: sam_vit_b, sam_vit_l." in capsys.readouterr().err
    assert not out.exists()

    assert export.main(["--run", str(run), "--out", str(out), "--part", "sam_large"]) == 0
    said = capsys.readouterr().out
    assert f"sam_vit_l of {run}, step " in said
    loaded = numpy_state(load(said.split("It loads with\n\n")[1]))
    _, trained = load_model(run).backbones.values()
    expected = export_encoder(trained)
    assert loaded.keys() == expected.keys()
    assert all(np.array_equal(loaded[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("out", "message"),
    [("encoder.pth", "is not a run: it has no config.yaml"), ("encoder.txt", "must end in .pth")],
)
def test_the_commands_errors_are_one_line_and_exit_code_2(out, message, tmp_path, capsys):
    code = export.main(["--run", str(tmp_path / "nowhere"), "--out", str(tmp_path / out)])
    said = capsys.readouterr()
    assert code == 2
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert message in said.err
    assert said.err.count("\n") == 1
    assert not (tmp_path / out).exists()


def test_no_torch_no_pth(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"Writing a \.pth needs torch"):
        save_state(tmp_path / "x.pth", {"a": np.ones(3)})
