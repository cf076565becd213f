"""scripts/port_sam.py: what it writes, what it refuses, and what it leaves behind."""

from __future__ import annotations

import hashlib
import pickle
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import cast

import jax
import numpy as np
import pytest
from flax import nnx

from jaxear.backbones import create_backbone, read_weights, registry
from jaxear.backbones.sam import VIT_B, SamConfig, SamEncoder
from jaxear.backbones.weights import named_leaves
from porting import sam_cli
from porting.checkpoints import read_checkpoint
from porting.sam_torch import torch_encoder
from tests.porting.tiny_sam import NATIVE, TINY, meta_tensors
from tests.sam_parity import gradient_errors, parity
from tests.torch_reference import torch

pytestmark = pytest.mark.torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "port_sam.py"


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return meta_tensors(TINY, NATIVE)


@pytest.fixture
def checkpoint(tensors, tmp_path) -> Path:
    path = tmp_path / "sam.pth"
    torch.save(tensors, path)
    return path


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out" / "sam_vit_b.safetensors"


def run(checkpoint: Path, out: Path, *more: str) -> int:
    arguments = ["--checkpoint", str(checkpoint), "--out", str(out), "--allow-custom"]
    return sam_cli.main([*arguments, "--verify-size", "64", *more])


def refused(capsys, checkpoint: Path, out: Path, *more: str) -> str:
    """The one error that the script prints, having left nothing behind."""
    assert run(checkpoint, out, *more) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("error:") == 1
    assert "Traceback" not in error
    assert not out.parent.exists() or list(out.parent.iterdir()) == []
    return error


def test_a_port_is_verified_written_and_loaded(checkpoint, out, tensors, capsys):
    assert run(checkpoint, out) == 0
    printed = capsys.readouterr().out
    assert "blocks.1" in printed
    assert "neck" in printed
    assert "DIFFERS" not in printed
    leaves, metadata = read_weights(out)
    kernel = tensors["image_encoder.blocks.1.attn.qkv.weight"].numpy().T
    np.testing.assert_array_equal(leaves["blocks.1.attn.qkv.kernel"], kernel)
    assert metadata["backbone"] == "sam_vit_b"
    assert metadata["source_file"] == "sam.pth"
    assert metadata["source_sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert metadata["image_size"] == [256, 256]
    assert SamConfig(**metadata["architecture"]) == TINY
    assert {"jaxear", "jax", "flax", "torch", "numpy"} <= metadata["versions"].keys()
    errors = metadata["parity"]["errors"]
    assert set(errors) == {"embed", "blocks.0", "blocks.1", "neck"}
    assert 0 < max(errors.values()) <= metadata["parity"]["tolerance"] == 1e-5


def test_the_backbone_takes_its_architecture_from_the_file(checkpoint, out, tensors):
    assert run(checkpoint, out, "--no-verify") == 0
    backbone = create_backbone("sam", weights=str(out), image_size=(48, 64), features="neck")
    image = np.random.default_rng(0).uniform(size=(1, 48, 64, 3)).astype(np.float32)
    graph, state = nnx.split(backbone)
    neck = jax.jit(lambda state, x: nnx.merge(graph, state)(x))(state, image)
    encoder = {k.removeprefix("image_encoder."): v for k, v in tensors.items() if "image" in k}
    model = torch_encoder(
        TINY, {k: v.numpy() for k, v in encoder.items()}, native_size=NATIVE, image_size=(48, 64)
    )
    x = (image - np.array(backbone.mean)) / np.array(backbone.std)
    with torch.no_grad():
        expected = model(torch.from_numpy(x.astype(np.float32).transpose(0, 3, 1, 2).copy()))
    np.testing.assert_allclose(neck, expected.permute(0, 2, 3, 1), atol=3e-5)


def test_shapes_alone_come_from_the_file_too_and_no_array_is_read(checkpoint, out, monkeypatch):
    assert run(checkpoint, out, "--no-verify") == 0
    whole = create_backbone("sam", image_size=64, weights=str(out))
    monkeypatch.setattr(registry, "read_weights", None)
    shapes = create_backbone("sam", image_size=64, weights=str(out), abstract=True)
    leaves, expected = named_leaves(shapes), named_leaves(whole)
    assert all(isinstance(leaf.get_value(), jax.ShapeDtypeStruct) for leaf in leaves.values())
    assert {n: (x.shape, x.dtype) for n, x in leaves.items()} == {
        n: (x.shape, x.dtype) for n, x in expected.items()
    }


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "model_state_dict"])
def test_a_state_dict_inside_a_training_checkpoint_is_found(wrapper, tensors, tmp_path):
    parallel = {f"module.{name}": tensor for name, tensor in tensors.items()}
    path = tmp_path / "trained.pth"
    torch.save({"epoch": 3, wrapper: parallel, "optimizer": {"step": 1}}, path)
    state = read_checkpoint(path).state
    assert state.keys() == tensors.keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["safetensors", "legacy"])
def test_half_precision_becomes_float32_and_is_said(dtype, kind, tensors, tmp_path, out, capsys):
    half = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    path = tmp_path / "half"
    if kind == "safetensors":
        from safetensors.torch import save_file

        save_file(half, path)
    else:
        torch.save(half, path, _use_new_zipfile_serialization=False)
    assert run(path, out, "--no-verify") == 0
    assert f"Stored as {str(dtype).removeprefix('torch.')}" in capsys.readouterr().out
    leaves, _ = read_weights(out)
    assert {leaf.dtype for leaf in leaves.values()} == {np.dtype(np.float32)}
    expected = half["image_encoder.pos_embed"].float().numpy()
    np.testing.assert_array_equal(leaves["pos_embed"], expected)


def test_an_existing_port_gives_way_only_to_the_same_checkpoint(checkpoint, out, tensors, capsys):
    assert run(checkpoint, out, "--no-verify") == 0
    assert run(checkpoint, out, "--no-verify") == 0
    before = out.read_bytes()
    torch.save({k: v + 1 for k, v in tensors.items()}, checkpoint)
    assert run(checkpoint, out, "--no-verify") == 2
    assert "pass --force to replace it" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert run(checkpoint, out, "--no-verify", "--force") == 0
    assert out.read_bytes() != before


def test_an_unusual_architecture_must_be_asked_for(checkpoint, out, capsys):
    arguments = ["--checkpoint", str(checkpoint), "--out", str(out)]
    assert sam_cli.main(arguments) == 2
    assert re.search(r"none of ViT-B, L and H \(.*depth=2.*--allow-custom", capsys.readouterr().err)
    assert not out.parent.exists()


@pytest.mark.parametrize("share", [0.0001, 0.5, 0.999])
@pytest.mark.parametrize("kind", ["torch", "legacy", "safetensors"])
def test_a_truncated_file(kind, share, tensors, tmp_path, out, capsys):
    path = tmp_path / "cut"
    if kind == "safetensors":
        from safetensors.torch import save_file

        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "torch")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert "etch it again" in refused(capsys, path, out)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "neither a torch checkpoint nor a safetensors file"),
        (b"<html>404 Not Found</html>", "neither a torch checkpoint nor a safetensors file"),
        (None, "No such file"),
    ],
)
def test_no_checkpoint_at_all(content, message, tmp_path, out, capsys):
    path = tmp_path / "file.pth"
    if content is not None:
        path.write_bytes(content)
    assert message in refused(capsys, path, out)


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"conv1.weight": torch.zeros(64, 3, 7, 7)}, "not a Segment Anything checkpoint"),
        ({"blocks.0.norm1.weight": torch.zeros(768)}, "not a Segment Anything checkpoint"),
        ([torch.zeros(1)], "holds a list; expected a state dict"),
        ({"pos_embed": torch.zeros(1), "epoch": 7}, "'epoch': int"),
        ({}, "an empty dictionary"),
        ({"a": torch.eye(2).to_sparse()}, "'a': Tensor"),
    ],
)
def test_another_model_s_file(saved, message, tmp_path, out, capsys):
    torch.save(saved, tmp_path / "other.pth")
    assert message in refused(capsys, tmp_path / "other.pth", out)


def test_a_missing_an_extra_and_a_misshapen_tensor(tensors, tmp_path, out, capsys):
    path = tmp_path / "wrong.pth"
    name = "image_encoder.blocks.0.mlp.lin1.weight"
    without = {k: v for k, v in tensors.items() if k != name}
    for wrong, message in [
        (without, f"missing key: {name}"),
        (tensors | {f"{name}.scale": torch.ones(1)}, f"unexpected key: {name}.scale"),
        (tensors | {name: torch.zeros(128, 31)}, f"wrong shape: {name} [128, 31]"),
        (tensors | {name: torch.full((128, 32), torch.nan)}, f"not finite: {name}"),
    ]:
        torch.save(wrong, path)
        error = refused(capsys, path, out)
        assert message in error
        assert "(1 problems)" in error


class Malicious:
    """Unpickled without care, it leaves a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", ["torch", "legacy", "pickle"])
def test_a_pickle_that_would_run_code_does_not(kind, tensors, tmp_path, out, capsys):
    trace = tmp_path / "it-ran"
    content = tensors | {"image_encoder.evil": Malicious(trace)}
    path = tmp_path / "evil.pth"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content["image_encoder.evil"]))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "torch")
    pickle.loads(pickle.dumps(content["image_encoder.evil"]))
    assert trace.exists()  # it would
    trace.unlink()
    assert "could run code; nothing of it was executed" in refused(capsys, path, out)
    assert not trace.exists()


def test_a_port_that_computes_something_else_is_not_written(
    checkpoint, out, capsys, monkeypatch, trace_anew
):
    gelu = jax.nn.gelu
    monkeypatch.setattr(jax.nn, "gelu", lambda x, approximate: gelu(x, approximate=True))
    trace_anew()
    assert "from blocks.0 on it differs by" in refused(capsys, checkpoint, out)


def test_a_full_disk(checkpoint, out):
    """Through the real script, with no file allowed to grow beyond 64 KiB."""
    command = [sys.executable, SCRIPT, "--checkpoint", checkpoint, "--out", out, "--no-verify"]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        result = subprocess.run(
            [*command, "--allow-custom"], capture_output=True, text=True, check=False
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: Cannot write {out} (")
    assert "File too large" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(out.parent.iterdir()) == []


def test_interrupted_by_the_user(checkpoint, out, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sam_cli, "port", lambda *_, **__: interrupt())
    assert run(checkpoint, out) == 130
    assert "Interrupted." in capsys.readouterr().err
    assert not out.parent.exists()


def test_an_impossible_size_is_refused_before_any_work(out, tmp_path, capsys):
    error = refused(capsys, tmp_path / "not-read.pth", out, "--verify-size", "100")
    assert "--verify-size must be a multiple of 16, not 100" in error


@pytest.mark.slow
def test_vit_b_through_the_real_script_and_file(tmp_path):
    """Full size, up to the native size of images, float32 and float64, from the written file."""
    checkpoint, out = tmp_path / "sam_vit_b.pth", tmp_path / "sam_vit_b.safetensors"
    saved = meta_tensors(VIT_B, (1024, 1024))
    torch.save(saved, checkpoint)
    command = [sys.executable, SCRIPT, "--checkpoint", checkpoint, "--out", out]
    subprocess.run(command, check=True)
    state = {
        k.removeprefix("image_encoder."): v.numpy() for k, v in saved.items() if "image_enc" in k
    }
    for dtype, tolerance, sizes in [
        (np.float32, 1e-5, [(112, 176), (1024, 1024)]),
        (np.float64, 1e-12, [(128, 128)]),
    ]:
        for image_size in sizes:
            with jax.enable_x64(dtype is np.float64):
                backbone = create_backbone(
                    "sam", weights=str(out), image_size=image_size, dtype=dtype
                )
                report = parity(
                    VIT_B,
                    state,
                    image_size,
                    native=(1024, 1024),
                    dtype=dtype,
                    tolerance=tolerance,
                    encoder=cast(SamEncoder, backbone.encoder),
                    batch=1,
                )
            print(image_size, np.dtype(dtype), max(report.errors.values()), report.rows[-1])
            assert report.passed, (image_size, dtype, report.errors)
    with jax.enable_x64(True):
        backbone = create_backbone("sam", weights=str(out), image_size=128, dtype=np.float64)
        errors = gradient_errors(cast(SamEncoder, backbone.encoder))
    print("gradients", max(errors.values()))
    assert max(errors.values()) <= 1e-10, errors
