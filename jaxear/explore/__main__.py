"""Eigenears in the browser: `jaxear explore --run runs/NAME`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jaxear.command import run_command
from jaxear.errors import UserError
from jaxear.options import Parser


def explore_parser() -> Parser:
    """The options of the command."""
    parser = Parser(
        prog="jaxear explore",
        description="Explore a run's eigenears in the browser: a slider per component, photographs "
        "to encode and move, morphs between two ears, and the run's nearest ears. The page needs "
        "no internet, and nothing leaves this computer. Ctrl-C ends it.",
    )
    parser.add_argument("--run", type=str, required=True, help="the run's directory.")
    parser.add_argument(
        "--ears",
        type=int,
        default=1000,
        help="how many of the run's ears to read, evenly spread over its data, for neighbours and "
        "to start from; 0 does without the data.",
    )
    parser.add_argument(
        "--host",
        type=str,
        default="127.0.0.1",
        help="the address to listen on; 0.0.0.0 lets other computers in, without a password.",
    )
    parser.add_argument(
        "--port", type=int, default=7860, help="the port to listen on; 0 takes a free one."
    )
    parser.add_argument(
        "--no_browser", action="store_true", help="print the address, and open no browser."
    )
    return parser


def explore(argv: Sequence[str] | None) -> None:
    """Run the command, until it is interrupted.

    Raises:
        UserError: the options, the run or the address cannot be used, or Gradio is missing.
    """
    options = explore_parser().parse(argv)
    try:
        from jaxear.explore.server import bind, serve
    except ModuleNotFoundError as error:
        if error.name not in ("gradio", "fastapi", "uvicorn"):  # Gradio brings the other two
            raise
        raise UserError("The explorer needs Gradio: pip install 'jaxear[explore]'.") from None
    from jaxear.explore.session import Explorer

    # First the address: who has to give another one need not wait for the model.
    with bind(options.host, options.port) as bound:
        bound.listen()
        explorer = Explorer.open(options.run, n_ears=options.ears)
        explorer.warm_up()
        serve(explorer, bound, open_browser=not options.no_browser)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command(lambda: explore(argv))


if __name__ == "__main__":
    sys.exit(main())
