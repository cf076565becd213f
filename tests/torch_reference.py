"""torch originals to compare with, every number in them random."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from porting.timm_import import import_timm as import_timm

torch = pytest.importorskip("torch", reason="needs the `port` extra")


def randomize(model: Any, seed: int = 0, *, gain: float = 1) -> Any:
    """Give every parameter and buffer of a torch model a random value, in place; returns the model.

    Untrained models hide faults: zero-initialised branches, scales of 1e-6, zero position tables.
    Weights multiply the deviation of a layer's input by `gain`; scales are near one, running
    variances positive.
    Running statistics of BatchNorm should afterwards be set by `calibrate`. Batch counters differ.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(shape, scale):
        return torch.randn(shape, generator=generator, dtype=torch.float64) * scale

    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            leaf = name.rsplit(".", 1)[-1]
            if not tensor.is_floating_point():
                tensor.copy_(torch.randint(1, 10**6, tensor.shape, generator=generator))
            elif leaf == "running_var":
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            elif tensor.ndim <= 1 and leaf in ("weight", "gamma"):
                tensor.copy_(1 + normal(tensor.shape, 0.2))
            elif tensor.ndim <= 1:
                tensor.copy_(normal(tensor.shape, 0.2))
            elif leaf in ("pos_embed", "rel_pos_h", "rel_pos_w"):
                tensor.copy_(normal(tensor.shape, 0.3))
            else:
                tensor.copy_(normal(tensor.shape, gain * tensor[0].numel() ** -0.5))
    return model


def calibrate(model: Any, x: Any, seed: int = 0) -> Any:
    """Set the BatchNorm statistics of a torch model from one batch, then shift them a little.

    With freely random statistics a deep network's output no longer depends on its input, and any
    port would pass. Returns the model, in eval mode.

    Before that it moves biases up by one and shrinks the norm that ends a residual branch (`bn3`)
    to a third. In a freely random network every block lets rounding errors grow by a fifth, and
    torch's own float32 output is 4e-5 of scale (ResNet-50; EfficientNet-B3: 1e-4) away from its
    float64 one; then it is 3e-6, so that 1e-5 can be asked of a port.
    """
    named = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
    }
    norms = list(named.values())
    with torch.no_grad():
        for name, norm in named.items():
            if name.endswith("bn3"):
                norm.weight.mul_(0.3)
            else:
                norm.bias.add_(1)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    model.train()
    with torch.no_grad():
        model(x)
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            std = norm.running_var.sqrt()
            norm.running_mean.add_(std * 0.1 * torch.randn(std.shape, generator=generator))
            norm.running_var.mul_(0.8 + 0.4 * torch.rand(std.shape, generator=generator))
    return model


def natural_images(count: int, height: int, width: int, seed: int = 0) -> Any:
    """Normalised torch images [b, 3, h, w] that differ at all scales, as photographs do.

    Of white noise, deep features are nearly the same for every image, and rounding errors then look
    large beside what a normalisation leaves.
    """
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(count, 3, height, width)
    for cells in (1, 4, 16, 32, 64, 128):
        noise = torch.randn((count, 3, cells, cells), generator=generator)
        total += torch.nn.functional.interpolate(noise, (height, width), mode="bilinear")
    return total / 6**0.5


def numpy_state(model: Any) -> dict[str, np.ndarray]:
    """A torch model's state dict as numpy arrays."""
    return {key: value.detach().numpy().copy() for key, value in model.state_dict().items()}


def relative_error(value: Any, reference: Any) -> float:
    """max |value - reference| / max |reference|, the measure of every parity claim."""
    value, reference = np.asarray(value, np.float64), np.asarray(reference, np.float64)
    assert value.shape == reference.shape, (value.shape, reference.shape)
    return float(np.max(np.abs(value - reference)) / np.max(np.abs(reference)))
