"""Checkpoint files: fetching them, reading them without running anything in them, writing ports."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import importlib.metadata
import json
import os
import pickle
import platform
import urllib.request
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxear.backbones.weights import FORMAT, read_weights
from jaxear.errors import UserError
from jaxear.version import __version__
from porting.atomic import replacing

# What training scripts call the state dict among the other things that they save.
WRAPPERS = ("model", "state_dict", "model_state_dict")
DATA_PARALLEL = "module."


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a file, floats as float32, and what they were stored as if not that."""

    path: Path
    state: dict[str, np.ndarray]
    converted: tuple[str, ...]

    @cached_property
    def sha256(self) -> str:
        """Of the whole file."""
        return file_sha256(self.path)


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a torch file (.pth, .pt, .bin) or a safetensors file; nothing in it is executed.

    A state dict inside {"model": ..}, {"state_dict": ..} or {"model_state_dict": ..} is taken out,
    and the "module." that data parallelism puts before every name is removed. Tensors are mapped
    into memory where the format allows it.

    Raises:
        UserError: there is no such file, it is neither kind, it is damaged, or it holds more than
            tensors.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise UserError(f"Cannot read {path} ({error.strerror}); give a checkpoint file.") from None
    if head[:2] == b"PK" or head[:1] == b"\x80":
        content = _read_torch(path)
    elif head[8:9] == b"{":
        content = _read_safetensors(path)
    else:
        raise UserError(
            f"{path} is neither a torch checkpoint nor a safetensors file (it starts with "
            f"{head[:8]!r}); a failed download often looks so. Fetch it again."
        )
    tensors = _state_dict(content, path)
    floats = {
        str(t.dtype).removeprefix("torch.") for t in tensors.values() if t.is_floating_point()
    }
    state = {
        name: (tensor.float() if tensor.is_floating_point() else tensor).detach().numpy()
        for name, tensor in tensors.items()
    }
    return Checkpoint(path, state, tuple(sorted(floats - {"float32"})))


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        raise UserError("Porting needs torch; pip install 'jaxear[port]'.") from None
    return torch


def _damaged(path: Path, error: Exception) -> UserError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(f"{path} is damaged or cut short ({reason}); fetch it again.")


def _read_torch(path: Path) -> Any:
    torch = _torch()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice on files that are then refused anyway
            return torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None
            )
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} holds pickled objects other than tensors, which could run code; nothing of it "
            "was executed. Ask for the state dict alone, as torch.save(model.state_dict(), ..) or "
            "safetensors write it."
        ) from None
    except Exception as error:  # torch raises KeyError, EOFError, OSError, .. for broken files
        if "TorchScript" in str(error):
            raise UserError(
                f"{path} is a TorchScript program; nothing of it was executed. Give the state dict."
            ) from None
        raise _damaged(path, error) from None


def _read_safetensors(path: Path) -> dict[str, Any]:
    _torch()
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from None


def _state_dict(content: Any, path: Path) -> dict[str, Any]:
    torch = _torch()
    if isinstance(content, Mapping):
        for wrapper in WRAPPERS:
            if isinstance(content.get(wrapper), Mapping):
                return _state_dict(content[wrapper], path)
        others = [f"{k!r}: {type(v).__name__}" for k, v in content.items() if not _dense(torch, v)]
        if content and not others and all(isinstance(key, str) for key in content):
            if all(key.startswith(DATA_PARALLEL) for key in content):
                return {key.removeprefix(DATA_PARALLEL): value for key, value in content.items()}
            return dict(content)
        what = f"a dictionary with {', '.join(others[:4])}" if others else "an empty dictionary"
    else:
        what = f"a {type(content).__name__}"
    raise UserError(
        f"{path} holds {what}; expected a state dict, names to dense tensors, on its own or under "
        f"one of {', '.join(map(repr, WRAPPERS))}. Save model.state_dict() instead."
    )


def _dense(torch: Any, value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_quantized
    )


def file_sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(url: str, path: str | os.PathLike[str], *, sha256: str, size: int) -> None:
    """Fetch a file of known content, with a progress bar; an interrupted one is resumed.

    What has arrived is kept in `path` + ".part" until it is complete and its checksum is right.

    Args:
        url: where it is.
        path: where it is to be.
        sha256: of the whole file.
        size: of the whole file, in bytes.

    Raises:
        UserError: it cannot be fetched or written, or it is not the file expected; the message says
            how to go on by hand.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    by_hand = f"Or fetch {url} by hand and pass it with --checkpoint FILE."
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if part.exists() and part.stat().st_size > size:
            part.unlink()
        have = part.stat().st_size if part.exists() else 0
        if have < size:
            have = _fetch(url, part, have, size)
        if have == size and file_sha256(part) == sha256:
            os.replace(part, path)
            return
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"Cannot download {url} ({error}). Run the same command again to go on from where it "
            f"stopped. {by_hand}"
        ) from None
    if have < size:
        raise UserError(
            f"The download of {url} broke off after {have} of {size} bytes. Run the same command "
            f"again to go on from there. {by_hand}"
        )
    part.unlink()
    raise UserError(
        f"What {url} sends is not the file expected ({size} bytes, SHA-256 {sha256}), and was "
        f"thrown away. Something between here and there changes it. {by_hand}"
    )


def _fetch(url: str, part: Path, have: int, size: int) -> int:
    """Append to `part`, or start it anew if the server cannot resume; the bytes it then has."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=60) as response:
        content_range = response.headers.get("Content-Range", "")
        if response.status != 206 or not content_range.startswith(f"bytes {have}-"):
            have = 0
        columns = (*Progress.get_default_columns()[:2], DownloadColumn(), TransferSpeedColumn())
        with (
            part.open("ab" if have else "wb") as file,
            Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress,
        ):
            task = progress.add_task(url.rsplit("/", 1)[-1], total=size, completed=have)
            while have <= size and (block := response.read(1 << 20)):
                file.write(block)
                have += len(block)
                progress.update(task, completed=have)
    return have


def versions() -> dict[str, str]:
    """What a port was made with."""
    packages = ("jax", "flax", "numpy", "safetensors", "torch", "timm", "segment-anything")
    found = {"jaxear": __version__, "python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def check_output(out: Path, sha256: str, *, force: bool) -> None:
    """Do not let the port of one checkpoint silently replace that of another.

    Args:
        out: where a port is to be written.
        sha256: of the checkpoint that it is made from.
        force: replace it nevertheless.

    Raises:
        UserError: there is a file at `out` that was not made from that checkpoint.
    """
    if force or not out.exists():
        return
    try:
        before = read_weights(out)[1].get("source_sha256")
    except UserError:
        before = None
    if before != sha256:
        raise UserError(
            f"{out} exists and was not made from this checkpoint; pass --force to replace it, or "
            "--out to write elsewhere."
        )


def write_weights(
    path: str | os.PathLike[str], leaves: Mapping[str, np.ndarray], metadata: Mapping[str, Any]
) -> None:
    """Write a ported file, the whole of it or nothing: what `jaxear.backbones.read_weights` reads.

    Args:
        path: of the file, replaced if there is one.
        leaves: dotted Flax path -> array.
        metadata: names to anything that JSON can hold; "format" is added.

    Raises:
        UserError: the file cannot be written, e.g. because the disk is full.
    """
    encoded = {key: json.dumps(value) for key, value in {"format": FORMAT, **metadata}.items()}
    arrays = {name: np.asarray(leaf, order="C") for name, leaf in leaves.items()}
    with replacing(path) as temporary:
        save_file(arrays, temporary, encoded)
