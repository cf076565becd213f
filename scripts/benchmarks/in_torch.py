"""The same work in torch: eager, compiled, in bfloat16; on a CPU or a GPU; and its DataLoader.

What is public here runs in a process of its own (`torch_process`): it returns contenders, functions
without arguments that wait for their end, and notes on those that fail.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from jaxear.config import TrainConfig
from scripts.benchmarks.networks import random_leaves, sam_config, sam_shapes
from scripts.benchmarks.timing import Plan, random_images
from scripts.benchmarks.torch_process import OUTPUT

Contenders = dict[str, Callable[[], Any]]
Made = tuple[Contenders, dict[str, str]]

# bfloat16 that takes so many times as long as float32 forward takes minutes with the gradient.
TOO_SLOW = 3.0


def sam(plan: Plan, size: int, batch: int, backward: bool) -> Made:
    """Meta's encoder, forward or with the gradient; in batches of 8 all ways of running it."""
    # On a CPU torch.compile takes a minute and bfloat16 as long as float32: in one batch size.
    make = _gradient if backward else _forward
    model, images = _sam(plan, size), _nchw(random_images(batch, size), plan)
    contenders: Contenders = {"torch": make(model, images, plan)}
    if not backward:
        contenders[OUTPUT] = _output(model, images)
    notes = {}
    others: Contenders = {}
    if batch == 8 or plan.device == "gpu":
        half = copy.deepcopy(model).bfloat16()
        others["torch bf16"] = make(half, images.bfloat16(), plan)
    if batch == 8 and not plan.smoke:
        others["torch.compile"] = make(torch.compile(copy.deepcopy(model)), images, plan)
    for name, call in others.items():
        try:
            if name == "torch bf16" and plan.device == "cpu":
                _check_speed_of_bfloat16(plan, size, batch)
            call()
        except Exception as error:  # what torch.compile raises depends on the compilers there are
            notes[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
        else:
            contenders[name] = call
    return contenders, notes


def sam_in_float64(plan: Plan, size: int, batch: int) -> Made:
    """The output of Meta's encoder on the CPU."""
    model = copy.deepcopy(_sam(plan, size)).cpu().double()
    images = torch.from_numpy(random_images(batch, size).transpose(0, 3, 1, 2).copy()).double()
    return {OUTPUT: _output(model, images)}, {}


def imagenet(plan: Plan, name: str, size: int, batch: int, backward: bool) -> Made:
    """timm's network without its classifier, statistics of BatchNorm fixed."""
    make = _gradient if backward else _forward
    images = _nchw(random_images(batch, size), plan)
    return {"torch": make(_timm(plan, name), images, plan)}, {}


def training_step(plan: Plan, config: TrainConfig) -> Made:
    """A step of jaxear's model on SAM, stated in torch, on one batch again and again."""
    from tests import torch_vae

    encoder = torch_vae.SamTokens(copy.deepcopy(_sam(plan, config.image_size)))
    model = torch_vae.TorchVAE(config, encoder, stride=16)
    model.to(_place(plan))
    optimizer = torch_vae.create_optimizer(config, model)
    shape = (config.batch_size, config.image_size, config.image_size, 3)
    rng = np.random.default_rng(0)
    batch = rng.integers(0, 256, shape, np.uint8)
    noise = rng.normal(size=(config.batch_size, config.latent_dim)).astype(np.float32)

    def step() -> None:
        next(torch_vae.train(config, model, optimizer, [batch], [noise], 100))
        _wait(plan)

    assert torch.is_grad_enabled()
    return {"torch": step}, {}


def loader(plan: Plan, paths: list[Path], batch: int) -> Made:
    """An epoch of a DataLoader: a new order every time, by processes that stay and are no forks."""
    batches = torch.utils.data.DataLoader(
        _Photographs(paths),
        batch,
        shuffle=True,
        drop_last=True,
        num_workers=plan.threads,
        persistent_workers=True,
        multiprocessing_context="forkserver",
    )

    def epoch() -> None:
        for _ in batches:
            pass

    return {"torch DataLoader": epoch}, {}


class _Photographs(torch.utils.data.Dataset):
    """Pictures as Pillow decodes and resizes them, uint8 [128, 128, 3]."""

    def __init__(self, paths: list[Path]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> torch.Tensor:
        with Image.open(self.paths[i]) as image:
            picture = image.convert("RGB").resize((128, 128), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.asarray(picture).copy())


def _place(plan: Plan) -> torch.device:
    """The device, set to compute as XLA does."""
    if plan.device == "cpu":
        torch.set_num_threads(plan.threads)
        torch.set_flush_denormal(True)
        return torch.device("cpu")
    torch.set_float32_matmul_precision("high")  # TF32, also in torch's convolutions
    return torch.device("cuda")


@lru_cache(maxsize=1)
def _sam(plan: Plan, size: int) -> Any:
    """Meta's encoder with the numbers of `random_leaves`."""
    from porting.rules import flax_to_torch
    from porting.sam import ENCODER_TABLE
    from porting.sam_torch import torch_encoder

    state = flax_to_torch(ENCODER_TABLE, random_leaves(sam_shapes(plan, size)))
    sizes = {"native_size": (size, size), "image_size": (size, size)}
    return torch_encoder(sam_config(plan), state, **sizes).to(_place(plan))


@lru_cache(maxsize=1)
def _timm(plan: Plan, name: str) -> Any:
    from porting.timm_import import import_timm

    model = import_timm().create_model(name, num_classes=0).eval().to(_place(plan))
    model.forward = model.forward_features
    return model


def _nchw(images: np.ndarray, plan: Plan) -> torch.Tensor:
    """Images [b, h, w, 3] as torch wants them, on the device."""
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).to(_place(plan))


def _wait(plan: Plan) -> None:
    """Until the device has done what it was given."""
    if plan.device == "gpu":
        torch.cuda.synchronize()


def _forward(model: Any, images: torch.Tensor, plan: Plan) -> Callable[[], None]:
    """A call that computes the output, and waits."""

    def call() -> None:
        with torch.inference_mode():
            model(images)
        _wait(plan)

    return call


class TooSlowError(Exception):
    """It would take the time of all else."""


def _check_speed_of_bfloat16(plan: Plan, size: int, batch: int) -> None:
    """Raises `TooSlowError` where a processor has no instructions for it, by one look."""
    slowdown = _slowdown_of_bfloat16(plan, size, batch)
    if slowdown >= TOO_SLOW:
        raise TooSlowError(f"forward it takes {slowdown:.0f} times as long as float32; not timed")


@lru_cache(maxsize=1)
def _slowdown_of_bfloat16(plan: Plan, size: int, batch: int) -> float:
    """How many times as long SAM takes forward in bfloat16 as in float32; one look."""
    model, images = _sam(plan, size), _nchw(random_images(batch, size), plan)
    half = copy.deepcopy(model).bfloat16()
    seconds = []
    for call in (_forward(half, images.bfloat16(), plan), _forward(model, images, plan)):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds[0] / seconds[1]


def _output(model: Any, images: torch.Tensor) -> Callable[[], np.ndarray]:
    """A call that returns the output as Flax has it: [b, h, w, c]."""

    def call() -> np.ndarray:
        with torch.inference_mode():
            return model(images).permute(0, 2, 3, 1).cpu().numpy()

    return call


def _gradient(model: Any, images: torch.Tensor, plan: Plan) -> Callable[[], None]:
    """A call that computes the mean of the output's squares and all its gradients, and waits."""

    def call() -> None:
        model.zero_grad(set_to_none=True)
        model(images).float().square().mean().backward()
        _wait(plan)

    return call
