"""The command behind scripts/port_timm.py."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from jaxear.backbones.registry import get_spec
from jaxear.command import run_command
from jaxear.errors import UserError
from porting.checkpoints import read_checkpoint
from porting.command import create_parser, write_port
from porting.timm_models import PORTS
from porting.timm_port import port, verify

DESCRIPTION = """\
Port one of timm's encoders to Flax, verify it against timm's own code, and write it to
weights/<name>.safetensors, where jaxear looks for it."""
EXAMPLES = """\
examples:
  python scripts/port_timm.py --list                           what there is, its licence and source
  python scripts/port_timm.py --model resnet50                 download timm's weights and port them
  python scripts/port_timm.py --model convnextv2_tiny.fcmae    other weights, by timm's tag
  python scripts/port_timm.py --model resnet50 --checkpoint resnet50-0676ba61.pth
                                                               port a file that is here already

A checkpoint may have timm's names or, where the architecture is the same, its authors':
torchvision's (ResNet, VGG), Meta's (ConvNeXt), efficientnet_pytorch's (Lite0). Nothing in it is
executed. The output is complete or not there at all; it replaces the port of the same checkpoint,
but that of another one only with --force."""
HUB_FILE = "model.safetensors"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, 2 for an error of the user's, 130 for Ctrl-C."""
    arguments = _parser().parse_args(argv)
    return run_command(_list if arguments.list else lambda: _run(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = create_parser("port_timm.py", DESCRIPTION, EXAMPLES, original="timm's code")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", metavar="NAME[.TAG]", help="the architecture, and timm's tag")
    what.add_argument("--list", action="store_true", help="show what can be ported")
    parser.add_argument(
        "--no-classifier", action="store_true", help="leave the classifier of the checkpoint out"
    )
    return parser


def _list() -> None:
    for name, spec in PORTS.items():
        for tag, licence in spec.tags.items():
            print(f"{name + '.' + tag:38} {licence:14} https://huggingface.co/{_hub_id(name, tag)}")
        print(f"  names known in a --checkpoint: {', '.join(spec.tables)}")
    print("Where --model has no tag, the first weights are downloaded.")


def _hub_id(backbone: str, tag: str) -> str:
    return f"timm/{PORTS[backbone].timm_name}.{tag}"


def _run(arguments: argparse.Namespace) -> None:
    backbone, tag = _parse_model(arguments.model)
    if arguments.verify_size < 1:
        raise UserError(f"--verify-size must be a number of pixels, not {arguments.verify_size}.")
    if arguments.checkpoint and "." in arguments.model:
        raise UserError(f"Give a tag ({tag}) to download or a --checkpoint, not both.")
    path = arguments.checkpoint or _fetched(backbone, tag)
    checkpoint = read_checkpoint(path)
    ported = port(
        backbone,
        checkpoint.state,
        source=str(path),
        classifier=not arguments.no_classifier,
    )
    spec = PORTS[backbone]
    if arguments.checkpoint:
        url, licence = None, f"that of the checkpoint (timm's: {get_spec(backbone).licence})"
    else:
        url, licence = f"https://huggingface.co/{_hub_id(backbone, tag)}", spec.tags[tag]
    write_port(
        ported,
        checkpoint,
        arguments,
        what=backbone,
        original="timm's code",
        verify=lambda size: verify(ported, size),
        facts={
            "timm_model": spec.timm_name,
            "classifier": ported.classifier,
            "source_url": url,
            "licence": licence,
            "notes": list(ported.notes),
        },
    )


def _parse_model(text: str) -> tuple[str, str]:
    """ "resnet50.tv_in1k" -> ("resnet50", "tv_in1k"); the first tag where there is none."""
    name, _, tag = text.partition(".")
    timm_names = {spec.timm_name: backbone for backbone, spec in PORTS.items()}
    backbone = timm_names.get(name, name)
    if backbone not in PORTS:
        raise UserError(
            f"There is no timm model {name!r} among those that can be ported; choose from "
            f"{', '.join(PORTS)}."
        )
    tags = PORTS[backbone].tags
    if tag and tag not in tags:
        raise UserError(
            f"{backbone} can be had with the weights {', '.join(tags)}, not {tag!r}. Those of "
            "another source can be given with --checkpoint."
        )
    return backbone, tag or next(iter(tags))


def _fetched(backbone: str, tag: str) -> Path:
    """timm's weights in the cache of huggingface_hub, downloaded unless they are there already."""
    hub_id = _hub_id(backbone, tag)
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise UserError("Downloading needs huggingface_hub; pip install 'jaxear[port]'.") from None
    Console().print(f"Fetching {HUB_FILE} of {hub_id} from huggingface.co.", highlight=False)
    try:
        return Path(hf_hub_download(hub_id, HUB_FILE))
    except Exception as error:  # of requests or httpx, OSError, its own: whatever the network does
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"Cannot download {hub_id} ({reason}). Fetch https://huggingface.co/{hub_id}/resolve/"
            f"main/{HUB_FILE} by hand and pass it with --checkpoint FILE."
        ) from None
