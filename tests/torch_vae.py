"""The autoencoder and its training, stated a second time, in torch: on ResNet-50, or SAM.

Written from the model's description with torch's own layers, losses and optimiser. Nothing of
jaxear is used but the settings; module names follow the Flax ones, so that leaves find their place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from jaxear.config import TrainConfig
from porting.resnet import TIMM
from porting.rules import flax_to_torch
from porting.timm_import import import_timm
from tests.torch_reference import torch

nn, functional = torch.nn, torch.nn.functional

BACKBONE = "encoder.backbone.encoder."


def create_backbone(**options: Any) -> Any:
    """timm's ResNet-50 without its classifier."""
    return import_timm().create_model("resnet50", num_classes=0, **options)


class SamTokens(nn.Module):
    """What timm's models offer, for the tokens of Meta's image encoder."""

    def __init__(self, encoder: Any):
        super().__init__()
        self.encoder = encoder
        self.num_features = encoder.pos_embed.shape[-1]

    def forward_features(self, images: Any) -> Any:
        x = self.encoder.patch_embed(images) + self.encoder.pos_embed
        for block in self.encoder.blocks:
            x = block(x)
        return x.permute(0, 3, 1, 2)


class Head(nn.Module):
    """Features [b, c, h, w] of a square grid -> mu, logvar [b, d]."""

    def __init__(self, channels: int, grid: int, width: int, latent_dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.squeeze = nn.Linear(channels, width // grid**2)
        self.mu = nn.Linear(width, latent_dim)
        self.logvar = nn.Linear(width, latent_dim)

    def forward(self, features: Any) -> tuple[Any, Any]:
        x = functional.silu(self.squeeze(self.norm(features.permute(0, 2, 3, 1)))).flatten(1)
        return self.mu(x), self.logvar(x).clamp(-14, 8)


class Block(nn.Module):
    """The pre-activation residual block of the decoder."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1 = group_norm(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = group_norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Any) -> Any:
        y = self.conv1(functional.silu(self.norm1(x)))
        return x + self.conv2(functional.silu(self.norm2(y)))


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by two, then a 3x3 convolution, in the plain form."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels, 3, padding=1)

    def forward(self, x: Any) -> Any:
        return self.conv(functional.interpolate(x, scale_factor=2, mode="nearest"))


def group_norm(channels: int) -> Any:
    return nn.GroupNorm(8, channels, eps=1e-6)


class Decoder(nn.Module):
    """Codes [b, d] -> images [b, 3, h, w] in [0, 1]."""

    def __init__(self, latent_dim: int, image_size: int, channels: Sequence[int]):
        super().__init__()
        self.grid = image_size // 2 ** (len(channels) - 1)
        self.stem = nn.Linear(latent_dim, self.grid**2 * channels[0])
        self.blocks = nn.ModuleList(Block(c) for c in channels)
        self.upsamples = nn.ModuleList(Upsample(a, b) for a, b in pairwise(channels))
        self.norm = group_norm(channels[-1])
        self.out = nn.Conv2d(channels[-1], 3, 3, padding=1)

    def forward(self, z: Any) -> Any:
        x = self.stem(z).unflatten(1, (self.grid, self.grid, -1)).permute(0, 3, 1, 2)
        x = self.blocks[0](x)
        for upsample, block in zip(self.upsamples, self.blocks[1:], strict=True):
            x = block(upsample(x))
        return torch.sigmoid(self.out(functional.silu(self.norm(x))))


class TorchVAE(nn.Module):
    """Images [b, 3, h, w] in [0, 1] and noise [b, d] -> reconstruction, mu, logvar."""

    def __init__(self, config: TrainConfig, backbone: Any = None, *, stride: int = 32):
        super().__init__()
        self.backbone = create_backbone() if backbone is None else backbone
        grid = config.image_size // stride
        channels = self.backbone.num_features
        self.head = Head(channels, grid, config.head_width, config.latent_dim)
        self.decoder = Decoder(config.latent_dim, config.image_size, config.decoder_channels)
        self.eval()  # BatchNorm normalises by its running statistics and leaves them alone

    def load_flax(self, leaves: Mapping[str, np.ndarray]) -> None:
        """Take all numbers from the leaves of the Flax model, which must be all this one has."""
        backbone = {
            name.removeprefix(BACKBONE): value
            for name, value in leaves.items()
            if name.startswith(BACKBONE)
        }
        state = {f"backbone.{key}": v for key, v in flax_to_torch(TIMM, backbone).items()}
        axes = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}
        for name, value in leaves.items():
            if not name.startswith(BACKBONE):
                path, leaf = name.removeprefix("encoder.").rsplit(".", 1)
                key = f"{path}.{'bias' if leaf == 'bias' else 'weight'}"
                state[key] = value.transpose(axes[value.ndim])
        self.load_state_dict({key: torch.tensor(value) for key, value in state.items()})

    def forward(self, images: Any, noise: Any) -> tuple[Any, Any, Any]:
        mean = torch.tensor((0.485, 0.456, 0.406)).to(images)[:, None, None]
        std = torch.tensor((0.229, 0.224, 0.225)).to(images)[:, None, None]
        mu, logvar = self.head(self.backbone.forward_features((images - mean) / std))
        return self.decoder(mu + (logvar / 2).exp() * noise), mu, logvar


def ssim(x: Any, y: Any) -> Any:
    """Mean structural similarity (Wang et al. 2004) of images [b, 3, h, w] in [0, 1]."""
    offsets = torch.arange(-5, 6, dtype=torch.float64)
    line = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window = torch.outer(line, line) / line.sum() ** 2
    kernel = window.to(x).expand(3, 1, 11, 11)

    def average(image: Any) -> Any:
        return functional.conv2d(image, kernel, groups=3)

    mean_x, mean_y = average(x), average(y)
    var_x, var_y = average(x * x) - mean_x**2, average(y * y) - mean_y**2
    covariance = average(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (similarity / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean()


def loss_of(
    config: TrainConfig, output: tuple[Any, Any, Any], target: Any, kl_weight: float
) -> Any:
    """The objective of MSE, SSIM and KL divergence."""
    reconstruction, mu, logvar = output
    posterior = torch.distributions.Normal(mu, (logvar / 2).exp())
    prior = torch.distributions.Normal(torch.zeros_like(mu), torch.ones_like(mu))
    kl = torch.distributions.kl_divergence(posterior, prior).sum(1).mean()
    return (
        config.mse_weight * functional.mse_loss(reconstruction, target)
        + config.ssim_weight * (1 - ssim(reconstruction, target)) / 2
        + kl_weight * kl / target[0].numel()
    )


def create_optimizer(config: TrainConfig, model: TorchVAE) -> Any:
    """AdamW that decays matrices and kernels only; each group knows its share of the rate."""
    groups = []
    for part in (model.backbone, model.head, model.decoder):
        scale = config.backbone_lr_scale if part is model.backbone else 1.0
        kernels = [p for p in part.parameters() if p.ndim > 1]
        others = [p for p in part.parameters() if p.ndim == 1]
        groups += [
            {"params": kernels, "weight_decay": config.weight_decay, "scale": scale},
            {"params": others, "weight_decay": 0.0, "scale": scale},
        ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.99), eps=1e-8)


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """A linear warm-up from 0, then half a cosine down to 0."""
    warmup = config.warmup_epochs * steps_per_epoch
    if step < warmup:
        return config.learning_rate * step / warmup
    progress = (step - warmup) / (config.epochs * steps_per_epoch - warmup)
    return config.learning_rate * (1 + math.cos(math.pi * progress)) / 2


def train(
    config: TrainConfig,
    model: TorchVAE,
    optimizer: Any,
    batches: Sequence[np.ndarray],
    noises: Sequence[np.ndarray],
    steps_per_epoch: int,
) -> Iterator[float]:
    """Train on uint8 images [b, h, w, 3] and noise [b, d], and yield the loss before each step."""
    parameter = next(model.parameters())
    for step, (images, noise) in enumerate(zip(batches, noises, strict=True)):
        target = torch.tensor(images).to(parameter).permute(0, 3, 1, 2) / 255
        output = model(target, torch.tensor(noise).to(parameter))
        progress = min(1.0, (step + 1) / (config.kl_warmup_epochs * steps_per_epoch))
        loss = loss_of(config, output, target, config.kl_weight * progress)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = group["scale"] * learning_rate(config, step, steps_per_epoch)
        optimizer.step()
        yield loss.item()
