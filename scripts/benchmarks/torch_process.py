"""torch in a process of its own, with memory as any Python program has it, or as jaxear keeps it.

So each side runs as its users run it, and neither's memory grows around the other's.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any

from jaxear.process_memory import tunables
from scripts.benchmarks.timing import Plan

# Among the contenders of a forward pass: gives the network's output, to be compared.
OUTPUT = "output"


class TorchProcess:
    """Runs what `in_torch` makes; one call at a time."""

    def __init__(self, *, keeps_memory: bool):
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        settings = {
            "GLIBC_TUNABLES": tunables() if keeps_memory else "",
            "JAX_PLATFORMS": "cpu",  # there it makes shapes, nothing else
        }
        before = {name: os.environ.get(name) for name in settings}
        os.environ.update(settings)
        try:
            process = context.Process(target=_serve, args=(theirs,))
            process.start()
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
        theirs.close()
        atexit.register(self._connection.close)  # with which it ends

    def make(
        self, function: str, *arguments: Any
    ) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
        """Contenders of `in_torch.function`, in place of those before, and notes on what fails.

        Each waits for its end.
        """
        names, notes = self._ask("make", function, arguments)
        return {name: lambda name=name: self._ask("call", name) for name in names}, notes

    def _ask(self, *request: Any) -> Any:
        self._connection.send(request)
        try:
            answer = self._connection.recv()
        except EOFError:
            raise RuntimeError("torch's process has ended, perhaps for want of memory") from None
        if isinstance(answer, Exception):
            raise answer
        return answer


@lru_cache(maxsize=1)
def _process(keeps_memory: bool) -> TorchProcess:
    return TorchProcess(keeps_memory=keeps_memory)


def torch_process(plan: Plan) -> TorchProcess:
    """The process of a benchmark; it starts with the first row that needs it."""
    return _process(plan.torch_keeps_memory)


def _serve(connection: Connection) -> None:
    contenders: dict[str, Callable[[], Any]] = {}
    while True:
        try:
            what, name, *arguments = connection.recv()
        except EOFError:
            return
        try:
            if what == "make":
                contenders = {}  # its memory first
                make = getattr(import_module("scripts.benchmarks.in_torch"), name)
                contenders, notes = make(*arguments[0])
                answer: Any = list(contenders), notes
            else:
                answer = contenders[name]()
        except ImportError as error:
            answer = error
        except Exception as error:
            answer = RuntimeError(f"torch: {type(error).__name__}: {error}")
        connection.send(answer)
