"""The same work in torch: eager, compiled, in bfloat16; on a CPU or a GPU; and its DataLoader."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from scripts.benchmarks.timing import Plan


def place(plan: Plan) -> torch.device:
    """The device, set to compute as XLA does."""
    if plan.device == "cpu":
        torch.set_num_threads(plan.threads)
        torch.set_flush_denormal(True)
        return torch.device("cpu")
    torch.set_float32_matmul_precision("high")  # TF32, also in torch's convolutions
    return torch.device("cuda")


def nchw(images: np.ndarray, plan: Plan) -> torch.Tensor:
    """Images [b, h, w, 3] as torch wants them, on the device."""
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).to(place(plan))


def wait(plan: Plan) -> None:
    """Until the device has done what it was given."""
    if plan.device == "gpu":
        torch.cuda.synchronize()


def forward(model: Any, images: torch.Tensor, plan: Plan) -> Callable[[], Any]:
    """A call that computes the output, and waits."""

    def call() -> Any:
        with torch.inference_mode():
            out = model(images)
        wait(plan)
        return out

    return call


def gradient(model: Any, images: torch.Tensor, plan: Plan) -> Callable[[], Any]:
    """A call that computes the mean of the output's squares and all its gradients, and waits."""

    def call() -> None:
        model.zero_grad(set_to_none=True)
        model(images).float().square().mean().backward()
        wait(plan)

    return call


def variants(
    make: Callable[[Any, torch.Tensor, Plan], Callable[[], Any]],
    model: Any,
    images: torch.Tensor,
    plan: Plan,
    *,
    half: bool,
    compiled: bool,
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """Contenders: eager and, if asked for, bfloat16 and torch.compile; notes on those that fail."""
    contenders = {"torch": make(model, images, plan)}
    notes = {}
    others: dict[str, Callable[[], Any]] = {}
    if half:
        others["torch bf16"] = make(copy.deepcopy(model).bfloat16(), images.bfloat16(), plan)
    if compiled:
        others["torch.compile"] = make(torch.compile(copy.deepcopy(model)), images, plan)
    for name, call in others.items():
        try:
            call()
        except Exception as error:  # what torch.compile raises depends on the compilers there are
            notes[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
        else:
            contenders[name] = call
    return contenders, notes


class Photographs(torch.utils.data.Dataset):
    """Pictures as Pillow decodes and resizes them, uint8 [128, 128, 3]."""

    def __init__(self, paths: list[Path]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> torch.Tensor:
        with Image.open(self.paths[i]) as image:
            picture = image.convert("RGB").resize((128, 128), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.asarray(picture).copy())


def photograph_loader(paths: list[Path], batch: int, workers: int) -> torch.utils.data.DataLoader:
    """Batches in a new order every time, by processes that stay and are no forks of this one."""
    return torch.utils.data.DataLoader(
        Photographs(paths),
        batch,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=True,
        multiprocessing_context="forkserver",
    )
