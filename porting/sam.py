"""Segment Anything's encoder: its rule tables, and what architecture a checkpoint holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from flax import nnx

from jaxear.backbones.sam import PATCH_SIZE, PRESETS, SamConfig, SamEncoder
from jaxear.backbones.weights import named_leaves
from jaxear.errors import UserError
from porting.rules import Exempt, Rule, RuleTable, flax_to_torch, torch_to_flax
from porting.transforms import CONV, LINEAR


def _table(
    *,
    prefix: str,
    patch_embed: str,
    blocks: str,
    norm: str,
    neck: Mapping[str, str],
    exempt: tuple[Exempt, ...] = (),
) -> RuleTable:
    """One rule for each kind of parameter, for a scheme that has its own words for some parts."""
    block = f"{prefix}{blocks}.{{i}}"
    return RuleTable(
        (
            Rule(f"{prefix}pos_embed", "pos_embed"),
            Rule(f"{prefix}{patch_embed}.weight", "patch_embed.kernel", CONV),
            Rule(f"{prefix}{patch_embed}.bias", "patch_embed.bias"),
            Rule(f"{block}.{norm}{{n:1|2}}.weight", "blocks.{i}.norm{n}.scale"),
            Rule(f"{block}.{norm}{{n:1|2}}.bias", "blocks.{i}.norm{n}.bias"),
            Rule(f"{block}.attn.{{n:qkv|proj}}.weight", "blocks.{i}.attn.{n}.kernel", LINEAR),
            Rule(f"{block}.attn.{{n:qkv|proj}}.bias", "blocks.{i}.attn.{n}.bias"),
            Rule(f"{block}.attn.rel_pos_{{axis:h|w}}", "blocks.{i}.attn.rel_pos_{axis}"),
            Rule(f"{block}.mlp.lin{{n:1|2}}.weight", "blocks.{i}.mlp.lin{n}.kernel", LINEAR),
            Rule(f"{block}.mlp.lin{{n:1|2}}.bias", "blocks.{i}.mlp.lin{n}.bias"),
            Rule(f"{prefix}neck.{neck['conv1']}.weight", "neck.conv1.kernel", CONV),
            Rule(f"{prefix}neck.{neck['norm1']}.weight", "neck.norm1.scale"),
            Rule(f"{prefix}neck.{neck['norm1']}.bias", "neck.norm1.bias"),
            Rule(f"{prefix}neck.{neck['conv2']}.weight", "neck.conv2.kernel", CONV),
            Rule(f"{prefix}neck.{neck['norm2']}.weight", "neck.norm2.scale"),
            Rule(f"{prefix}neck.{neck['norm2']}.bias", "neck.norm2.bias"),
        ),
        exempt,
    )


_NOT_THE_ENCODER = "prompts and masks are not ported, only the image encoder is"
_meta_table = partial(
    _table,
    patch_embed="patch_embed.proj",
    blocks="blocks",
    norm="norm",
    neck={"conv1": "0", "norm1": "1", "conv2": "2", "norm2": "3"},
)

ENCODER_TABLE = _meta_table(prefix="")
META_TABLE = _meta_table(
    prefix="image_encoder.",
    exempt=(
        Exempt(
            r"prompt_encoder\.(pe_layer|point_embeddings|not_a_point_embed|no_mask_embed"
            r"|mask_downscaling)\..+",
            _NOT_THE_ENCODER,
        ),
        Exempt(
            r"mask_decoder\.(transformer|iou_token|mask_tokens|output_upscaling"
            r"|output_hypernetworks_mlps|iou_prediction_head)\..+",
            _NOT_THE_ENCODER,
        ),
        Exempt(r"pixel_(mean|std)", "constants, known to the backbone"),
    ),
)
HUGGING_FACE_TABLE = _table(
    prefix="vision_encoder.",
    patch_embed="patch_embed.projection",
    blocks="layers",
    norm="layer_norm",
    neck={
        name: name.replace("norm", "layer_norm") for name in ("conv1", "norm1", "conv2", "norm2")
    },
    exempt=(
        Exempt(r"shared_image_embedding\.positional_embedding", _NOT_THE_ENCODER),
        Exempt(
            r"prompt_encoder\.(shared_embedding|mask_embed|no_mask_embed|point_embed"
            r"|not_a_point_embed)\..+",
            _NOT_THE_ENCODER,
        ),
        Exempt(
            r"mask_decoder\.(iou_token|mask_tokens|transformer|upscale_conv[12]"
            r"|upscale_layer_norm|output_hypernetworks_mlps|iou_prediction_head)\..+",
            _NOT_THE_ENCODER,
        ),
    ),
)
HUGGING_FACE = "Hugging Face's SamModel"
TABLES: Mapping[str, RuleTable] = {
    "segment_anything": META_TABLE,
    "segment_anything's image encoder alone": ENCODER_TABLE,
    HUGGING_FACE: HUGGING_FACE_TABLE,
}


@dataclass(frozen=True)
class SamPort:
    """A SAM encoder taken from a checkpoint.

    Attributes:
        backbone: the name of the preset that it belongs to.
        config: its architecture.
        image_size: (height, width) that its position tables are for.
        naming: which of `TABLES` speaks its checkpoint's names.
        leaves: the Flax leaves, at that image size.
    """

    backbone: str
    config: SamConfig
    image_size: tuple[int, int]
    naming: str
    leaves: dict[str, np.ndarray]

    @property
    def is_preset(self) -> bool:
        """Whether the architecture is one of Meta's, not shortened or otherwise changed."""
        return PRESETS[self.backbone] == self.config

    def to_torch(self) -> dict[str, np.ndarray]:
        """The state dict of Meta's `ImageEncoderViT`, from the leaves."""
        return flax_to_torch(ENCODER_TABLE, self.leaves)


def port(state: Mapping[str, np.ndarray], *, source: str = "the checkpoint") -> SamPort:
    """Turn a checkpoint's tensors into Flax leaves; its architecture shows in their shapes.

    Raises:
        UserError: this is no SAM checkpoint.
        PortingError: it is one, but does not fit; the message lists everything that is wrong.
    """
    naming = max(TABLES, key=lambda naming: len(_ruled(TABLES[naming], state)))
    shapes = _ruled(TABLES[naming], state)
    if not any(".attn.rel_pos_" in path for path in shapes):
        some = ", ".join(list(state)[:3]) or "none"
        raise UserError(
            f"{source} is not a Segment Anything checkpoint (ViT-B, L or H). Expected tensors like "
            "image_encoder.blocks.0.attn.rel_pos_h (Meta's) or "
            "vision_encoder.layers.0.attn.rel_pos_h (Hugging Face's); found "
            f"{len(state)} tensors ({some} ..). Give Meta's .pth, or the weights of a SamModel."
        )
    config, image_size = infer_architecture(shapes, source=source)
    leaves = torch_to_flax(TABLES[naming], state, leaf_shapes(config, image_size), source=source)
    return SamPort(preset_name(config.embed_dim), config, image_size, naming, leaves)


def leaf_shapes(config: SamConfig, image_size: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """The leaves of a `SamEncoder` and their shapes, without making one."""
    encoder = nnx.eval_shape(lambda: SamEncoder(config, image_size, rngs=nnx.Rngs(0)))
    return {name: leaf.shape for name, leaf in named_leaves(encoder).items()}


def preset_name(embed_dim: int) -> str:
    """The backbone that an encoder of this width is a kind of; sam_vit_b, if of none of them."""
    same = (name for name, preset in PRESETS.items() if preset.embed_dim == embed_dim)
    return next(same, "sam_vit_b")


def _ruled(table: RuleTable, state: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    """Flax path -> torch shape, for the keys that the table's rules speak of."""
    hits = ((rule.to_flax(key), value) for key, value in state.items() for rule in table.rules)
    return {path: tuple(value.shape) for path, value in hits if path is not None}


def infer_architecture(
    shapes: Mapping[str, tuple[int, ...]], *, source: str = "the checkpoint"
) -> tuple[SamConfig, tuple[int, int]]:
    """The architecture and (height, width) that tensors of these shapes belong to.

    It takes what most of the tensors say, so that one which is missing or misshapen does not
    mislead it, and the strict check that follows can name that one.

    Args:
        shapes: Flax path -> shape of the torch tensor.
        source: what to call them in an error.

    Raises:
        UserError: too few tensors to tell.
    """

    def most(sizes: Iterable[int], what: str) -> int:
        counted = Counter(sizes).most_common(1)
        if not counted:
            raise UserError(
                f"{source} has some tensors of a Segment Anything encoder, but none that tells its "
                f"{what}; give the whole checkpoint."
            )
        return counted[0][0]

    def lengths(ending: str) -> list[int]:
        return [shape[0] for path, shape in shapes.items() if path.endswith(ending) and shape]

    tables = {path: shape for path, shape in shapes.items() if ".attn.rel_pos_" in path and shape}
    embed_dim = most(lengths(".attn.proj.bias"), "width")
    head_dim = most((shape[-1] for shape in tables.values()), "number of heads")
    depth = 1 + max(_block(path) for path in shapes if path.startswith("blocks."))
    if len(pos_embed := shapes.get("pos_embed", ())) == 4:
        grid = pos_embed[1:3]
    else:
        grid = tuple((max(lengths(f".attn.rel_pos_{axis}")) + 1) // 2 for axis in "hw")
    preset = PRESETS[preset_name(embed_dim)]
    if (preset.embed_dim, preset.depth) == (embed_dim, depth):
        global_attn_indexes, window_size = preset.global_attn_indexes, preset.window_size
    else:
        whole = {axis: 2 * side - 1 for axis, side in zip("hw", grid, strict=True)}
        of_windows = [shape[0] for path, shape in tables.items() if shape[0] != whole[path[-1]]]
        window_size = (most(of_windows, "windows from its whole grid") + 1) // 2
        global_attn_indexes = {
            _block(path) for path, shape in tables.items() if shape[0] == whole[path[-1]]
        }
    config = SamConfig(
        embed_dim=embed_dim,
        depth=depth,
        num_heads=embed_dim // head_dim,
        global_attn_indexes=tuple(sorted(global_attn_indexes)),
        mlp_dim=most(lengths(".mlp.lin1.bias"), "MLP's width"),
        window_size=window_size,
        out_channels=most(lengths("neck.norm1.bias") + lengths("neck.norm2.bias"), "neck's width"),
    )
    return config, (grid[0] * PATCH_SIZE, grid[1] * PATCH_SIZE)


def _block(path: str) -> int:
    return int(path.split(".")[1])
