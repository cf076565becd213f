"""scripts/port_sam.py: what it writes, what it fetches, and every way that it can go wrong."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import http.server
import os
import pickle
import re
import resource
import subprocess
import sys
import threading
from pathlib import Path
from typing import cast

import jax
import numpy as np
import pytest
from flax import nnx

from jaxear.backbones import create_backbone, read_weights
from jaxear.backbones.sam import VIT_B, SamConfig, SamEncoder
from jaxear.errors import UserError
from porting import checkpoints, sam_cli
from porting.checkpoints import download, read_checkpoint, write_weights
from porting.sam_torch import torch_encoder
from tests.sam_parity import gradient_errors, meta_state, parity
from tests.torch_reference import torch

pytestmark = pytest.mark.torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "port_sam.py"
TINY = SamConfig(32, 2, 2, (1,), 128, out_channels=16)
NATIVE = (256, 256)


def meta_tensors(config: SamConfig, native: tuple[int, int]) -> dict[str, torch.Tensor]:
    """The checkpoint of a SAM with a random encoder, by Meta's names."""
    state = meta_state(config, native)
    tensors = {f"image_encoder.{name}": torch.from_numpy(x) for name, x in state.items()}
    return tensors | {"prompt_encoder.no_mask_embed.weight": torch.ones(1, 256)}


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
    assert error.startswith("port_sam: error: ")
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


def test_a_port_that_computes_something_else_is_not_written(checkpoint, out, capsys, monkeypatch):
    gelu = jax.nn.gelu
    monkeypatch.setattr(jax.nn, "gelu", lambda x, approximate: gelu(x, approximate=True))
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
    assert result.stderr.startswith(f"port_sam: error: Cannot write {out} (")
    assert "File too large" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("stage", ["save_file", "fsync"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_what_was_there(stage, error, tmp_path, monkeypatch):
    def fail(*arguments):
        if stage == "save_file":
            Path(arguments[1]).write_bytes(b"half of it")
        raise error

    path = tmp_path / "weights.safetensors"
    write_weights(path, {"a": np.ones(3)}, {})
    before = path.read_bytes()
    monkeypatch.setattr(
        *{"save_file": (checkpoints, stage, fail), "fsync": (os, stage, fail)}[stage]
    )
    with pytest.raises((UserError, KeyboardInterrupt)):
        write_weights(path, {"a": np.zeros(3)}, {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_scalars_and_transposed_views_are_written_as_they_are(tmp_path):
    leaves = {"scalar": np.array(3, np.int32), "view": np.arange(6.0).reshape(2, 3).T}
    write_weights(tmp_path / "x.safetensors", leaves, {"note": ["a", 1]})
    back, metadata = read_weights(tmp_path / "x.safetensors")
    for name, leaf in leaves.items():
        assert back[name].shape == leaf.shape
        np.testing.assert_array_equal(back[name], leaf)
    assert metadata["note"] == ["a", 1]


def test_interrupted_by_the_user(checkpoint, out, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sam_cli, "port", lambda *_, **__: interrupt())
    assert run(checkpoint, out) == 130
    assert "interrupted; nothing was written" in capsys.readouterr().err


def test_an_impossible_size_is_refused_before_any_work(out, tmp_path, capsys):
    error = refused(capsys, tmp_path / "not-read.pth", out, "--verify-size", "100")
    assert "--verify-size must be a multiple of 16, not 100" in error


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` on 127.0.0.1; `breaks_after` bytes of an answer it hangs up."""

    def __init__(self, content: bytes):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = content
        self.breaks_after: int | None = None
        self.knows_ranges = True
        self.ranges: list[str | None] = []
        self.url = f"http://127.0.0.1:{self.server_port}/sam.pth"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        asked = self.headers["Range"]
        self.server.ranges.append(asked)
        content, start = self.server.content, 0
        if asked and self.server.knows_ranges:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        end = None if self.server.breaks_after is None else start + self.server.breaks_after
        self.wfile.write(content[start:end])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = Server(np.random.default_rng(0).bytes(3_000_000))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def facts(content: bytes) -> dict:
    return {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}


def test_download(server, tmp_path, capsys):
    path = tmp_path / "new" / "sam.pth"
    download(server.url, path, **facts(server.content))
    assert path.read_bytes() == server.content
    assert [p.name for p in path.parent.iterdir()] == ["sam.pth"]
    assert "sam.pth" in capsys.readouterr().err  # the progress bar


def test_a_broken_download_goes_on_where_it_stopped(server, tmp_path):
    path = tmp_path / "sam.pth"
    server.breaks_after = 1_200_000
    with pytest.raises(UserError, match=r"Run the same command again .* --checkpoint FILE"):
        download(server.url, path, **facts(server.content))
    assert not path.exists()
    assert path.with_name("sam.pth.part").stat().st_size == 1_200_000
    server.breaks_after = None
    download(server.url, path, **facts(server.content))
    assert server.ranges == [None, "bytes=1200000-"]
    assert path.read_bytes() == server.content


def test_a_server_without_ranges_starts_anew(server, tmp_path):
    path = tmp_path / "sam.pth"
    path.with_name("sam.pth.part").write_bytes(b"x" * 1000)
    server.knows_ranges = False
    download(server.url, path, **facts(server.content))
    assert path.read_bytes() == server.content


def test_a_complete_part_is_not_fetched_again(server, tmp_path):
    path = tmp_path / "sam.pth"
    path.with_name("sam.pth.part").write_bytes(server.content)
    download(server.url, path, **facts(server.content))
    assert server.ranges == []
    assert path.exists()


@pytest.mark.parametrize("change", [b"", b"more"])
def test_another_content_is_thrown_away(server, tmp_path, change):
    expected = facts(server.content)
    server.content = server.content[:-1] + b"?" + change
    with pytest.raises(UserError, match="is not the file expected"):
        download(server.url, tmp_path / "sam.pth", **expected)
    assert list(tmp_path.iterdir()) == []


def test_without_arguments_it_downloads_vit_b_and_ports_it(
    server, tmp_path, checkpoint, monkeypatch, capsys
):
    server.content = checkpoint.read_bytes()
    known = facts(server.content)
    spec = dataclasses.replace(sam_cli.get_spec("sam_vit_b"), source=server.url)
    monkeypatch.setattr(sam_cli, "get_spec", lambda name: spec)
    monkeypatch.setattr(
        sam_cli, "PUBLISHED", {"sam_vit_b": sam_cli.Published(known["size"], known["sha256"])}
    )
    monkeypatch.setenv("JAXEAR_WEIGHTS", str(tmp_path / "weights"))
    for _ in range(2):  # the second time from the file that is there
        assert sam_cli.main(["--allow-custom", "--verify-size", "32"]) == 0
    assert server.ranges == [None]
    _, metadata = read_weights(tmp_path / "weights" / "sam_vit_b.safetensors")
    assert metadata["source_url"] == server.url
    (tmp_path / "weights" / "sam.pth").write_bytes(b"something else")
    capsys.readouterr()
    assert sam_cli.main([]) == 2
    assert "it is not Meta's file" in capsys.readouterr().err


def test_without_a_network_it_says_how_to_fetch_by_hand(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAXEAR_WEIGHTS", str(tmp_path / "weights"))
    closed = Server(b"")
    closed.server_close()
    spec = dataclasses.replace(sam_cli.get_spec("sam_vit_b"), source=closed.url)
    monkeypatch.setattr(sam_cli, "get_spec", lambda name: spec)
    assert sam_cli.main([]) == 2
    error = capsys.readouterr().err
    assert f"fetch {closed.url} by hand and pass it with --checkpoint FILE" in error
    assert "refused" in error


@pytest.mark.slow
def test_vit_b_through_the_real_script_and_file(tmp_path):
    """Full size, all sizes of images, float32 and float64, from the file that was written."""
    checkpoint, out = tmp_path / "sam_vit_b.pth", tmp_path / "sam_vit_b.safetensors"
    saved = meta_tensors(VIT_B, (1024, 1024))
    torch.save(saved, checkpoint)
    command = [sys.executable, SCRIPT, "--checkpoint", checkpoint, "--out", out]
    subprocess.run(command, check=True)
    state = {
        k.removeprefix("image_encoder."): v.numpy() for k, v in saved.items() if "image_enc" in k
    }
    for dtype, tolerance, sizes in [
        (np.float32, 1e-5, [(128, 128), (112, 176), (224, 224), (1024, 1024)]),
        (np.float64, 1e-12, [(128, 128), (112, 176), (224, 224)]),
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
