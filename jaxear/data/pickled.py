"""Reads the data in a pickled `.npy` without running the program that a pickle is.

Unpickling calls whatever a file names. Here the opcodes that build dicts, lists, strings and
numbers are carried out by the few lines below, and the places where a pickle would call something
are only recognised: NumPy's arrays, data types and scalars, and paths. Nothing that the file names
is ever imported or called; anything else is refused by name.
"""

from __future__ import annotations

import math
import pickletools
import re
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import TypeVar

import numpy as np

from jaxear.errors import UserError

T = TypeVar("T")

_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")  # NumPy 1 and NumPy 2
_RECONSTRUCT = {f"{module}._reconstruct" for module in _MULTIARRAY}
_SCALAR = {f"{module}.scalar" for module in _MULTIARRAY}
_PATHS = {
    f"{module}.{name}"
    for module in ("pathlib", "pathlib._local")  # before Python 3.13, and 3.13
    for name in ("PosixPath", "PurePosixPath", "Path", "PurePath")
}
_ENCODE = {"_codecs.encode"}  # how protocol 2 spells bytes
_ALLOWED = _RECONSTRUCT | _SCALAR | _PATHS | _ENCODE | {"numpy.ndarray", "numpy.dtype"}

# Booleans, numbers, strings of a fixed width, and objects: no records, dates or user types.
_DTYPE = re.compile(r"b1|[iu][1248]|f[248]|U\d{1,6}|O8?")

_PUSH = frozenset(
    {
        "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "SHORT_BINBYTES", "BINBYTES",
        "BINBYTES8", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
    }
)  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple}
_FIXED_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK = object()


class _MalformedError(Exception):
    """The opcodes do not add up to data."""


class _RefusedError(Exception):
    """The pickle names something that is not data."""


@dataclass(frozen=True)
class _Global:
    name: str


@dataclass
class _Dtype:
    code: str
    order: str = "="


class _Array(list):
    """An array as nested lists, empty until its state arrives; a scalar array is a list of one."""


def read_pickled_npy(path: Path) -> object:
    """The object in a `.npy` file that holds one pickled Python object, arrays as nested lists.

    Raises `UserError` where the file is no such `.npy`, is damaged, or names anything but plain
    data, in which case the message says what it named.
    """
    stream = BytesIO(path.read_bytes())
    try:
        # Version 1 is what NumPy writes unless the header is longer than 64 KiB, which that of an
        # object never is.
        np.lib.format.read_magic(stream)
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path} is not a .npy file that NumPy wrote ({_first_line(error)})"
        ) from None
    if not dtype.hasobject:
        raise UserError(f"{path} holds an array of {dtype} of shape {shape}, not a pickled object")
    try:
        values = _build(stream)
    except _RefusedError as refused:
        raise UserError(
            f"{path} is refused: its pickle asks for {refused}, which paths and boxes do not need. "
            "Nothing in it was run. Write the boxes to a CSV (path,subject,side,x,y,w,h) instead"
        ) from None
    except (_MalformedError, ValueError, TypeError, KeyError, IndexError) as error:
        raise UserError(f"{path} is damaged: {_first_line(error)}") from None
    return values[0] if isinstance(values, _Array) and len(values) == 1 else values


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _build(stream: BytesIO) -> object:
    """Carries out the opcodes of `stream` on a stack, as `pickle` does, except that nothing is
    called.
    """
    stack: list = []
    memo: dict[int, object] = {}
    for opcode, argument, _ in pickletools.genops(stream):
        name = opcode.name
        if name in _PUSH:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[_expect(argument, int)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[_expect(argument, int)])
        elif name in _FIXED_TUPLES:
            stack.append(tuple(_pop(stack, _FIXED_TUPLES[name])))
        elif name == "TUPLE":
            stack.append(tuple(_pop_to_mark(stack)))
        elif name in ("APPEND", "APPENDS"):
            items = _pop(stack, 1) if name == "APPEND" else _pop_to_mark(stack)
            _expect(stack[-1], list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = _pop(stack, 2) if name == "SETITEM" else _pop_to_mark(stack)
            keys = [_expect(key, str) for key in items[::2]]
            _expect(stack[-1], dict).update(zip(keys, items[1::2], strict=True))
        elif name == "GLOBAL":
            stack.append(_global(*str(argument).split(" ", 1)))
        elif name == "STACK_GLOBAL":
            stack.append(_global(*_pop(stack, 2)))
        elif name == "REDUCE":
            function, arguments = _pop(stack, 2)
            stack.append(_recognise(_expect(function, _Global).name, _expect(arguments, tuple)))
        elif name == "BUILD":
            (state,) = _pop(stack, 1)
            _set_state(stack[-1], _expect(state, tuple))
        elif name == "STOP":
            return stack[-1]
        elif name not in ("PROTO", "FRAME"):
            raise _RefusedError(f"the pickle opcode {name}")
    raise _MalformedError("its pickled data has no end")


def _pop(stack: list, count: int) -> list:
    if len(stack) < count:
        raise _MalformedError("its pickled data takes more than it puts")
    items = stack[-count:]
    del stack[-count:]
    return items


def _pop_to_mark(stack: list) -> list:
    for index in range(len(stack) - 1, -1, -1):
        if stack[index] is _MARK:
            items = stack[index + 1 :]
            del stack[index:]
            return items
    raise _MalformedError("its pickled data closes what it did not open")


def _expect(value: object, kind: type[T]) -> T:
    if not isinstance(value, kind):
        raise _MalformedError(f"{type(value).__name__} in place of {kind.__name__}")
    return value


def _global(module: object, name: object) -> _Global:
    full_name = f"{_expect(module, str)}.{_expect(name, str)}"
    if full_name not in _ALLOWED:
        raise _RefusedError(full_name)
    return _Global(full_name)


def _recognise(name: str, arguments: tuple) -> object:
    """What the call `name(*arguments)` stands for, without making it."""
    if name in _RECONSTRUCT:
        return _Array()
    if name == "numpy.dtype":
        code = _expect(arguments[0], str)
        if not _DTYPE.fullmatch(code):
            raise _RefusedError(f"the data type {code!r}")
        return _Dtype(code)
    if name in _SCALAR:
        dtype, raw = arguments
        return _decode(_expect(dtype, _Dtype), raw, 1)[0].item()
    if name in _PATHS:
        return str(PurePosixPath(*(_expect(part, str) for part in arguments)))
    if name in _ENCODE:
        return _expect(arguments[0], str).encode("latin1")
    raise _RefusedError(f"a call of {name}")


def _set_state(target: object, state: tuple) -> None:
    """What `target.__setstate__(state)` would do, for the two kinds of object that have a state
    here.
    """
    if isinstance(target, _Dtype):
        target.order = _expect(state[1], str)
        return
    _, shape, dtype, fortran, raw = state
    lengths = [_expect(length, int) for length in _expect(shape, tuple)]
    values = _decode(_expect(dtype, _Dtype), raw, math.prod(lengths))
    if values.size:  # a shape such as (10**9, 0) would be a thousand million empty lists
        # Numbers come in the array's own order, objects always in C's.
        order = "F" if fortran and not dtype.code.startswith("O") else "C"
        nested = values.reshape(lengths, order=order).tolist()
        _expect(target, _Array)[:] = nested if lengths else [nested]


def _decode(dtype: _Dtype, raw: object, count: int) -> np.ndarray:
    """The `count` values of `raw`, flat: a list where they are objects, otherwise bytes."""
    if dtype.code.startswith("O"):
        items = _expect(raw, list)
        values = np.empty(len(items), object)
        for index, item in enumerate(items):  # item by item, or NumPy would look into them
            values[index] = item
    else:
        order = dtype.order if dtype.order in "<>" else "="
        values = np.frombuffer(_expect(raw, bytes), np.dtype(order + dtype.code))
    if values.size != count:
        raise _MalformedError(f"{values.size} values in an array of {count}")
    return values
