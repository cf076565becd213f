"""Checkpoints fetched from a real server on this machine; files that are whole or not there."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import http.server
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from jaxear.backbones import read_weights
from jaxear.errors import UserError
from porting import checkpoints, sam_cli
from porting.checkpoints import download, write_weights
from tests.porting.tiny_sam import NATIVE, TINY, meta_tensors
from tests.torch_reference import torch

pytestmark = pytest.mark.torch


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


def test_without_arguments_it_downloads_vit_b_and_ports_it(server, tmp_path, monkeypatch, capsys):
    torch.save(meta_tensors(TINY, NATIVE), tmp_path / "made.pth")
    server.content = (tmp_path / "made.pth").read_bytes()
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
