"""The errors that a user can cause; commands print them without a traceback, exit code 2."""

from __future__ import annotations


class UserError(Exception):
    """Something the user gave cannot be used.

    The message says what was given, what was expected and what to do next.
    """


class WeightsNotFoundError(UserError, FileNotFoundError):
    """Ported weights were asked for and there is no such file."""


class WeightsMismatchError(UserError, ValueError):
    """A weights file does not fit the architecture that it was to be loaded into."""
