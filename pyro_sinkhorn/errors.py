"""Errors that name their site. All derive from built-in classes, so existing handlers keep working."""

from __future__ import annotations

import math
import numbers
from typing import Any


class ProgramError(ValueError):
    """A model, a guide or their data do not fit together; the message names the site and what to do."""


class NonFiniteError(ArithmeticError):
    """NaN or infinity appeared; the message names where it came from."""


class NoDensityError(ProgramError, NotImplementedError):
    """A density was asked of something that has none. As a ``ValueError``, Pyro adds the name of the site to it."""


def is_number(value: Any) -> bool:
    """Whether an argument is a finite real number, NumPy's included."""
    return isinstance(value, numbers.Real) and math.isfinite(value)


class LostRankError(RuntimeError):
    """Another process of a run that several share has ended, hangs or does something else."""


def checked_integer(name: str, value: Any, least: int | None = None) -> int:
    """An argument as an int, NumPy's included.

    :raises ProgramError: it is no integer, or below ``least``
    """
    if isinstance(value, numbers.Integral) and (least is None or int(value) >= least):
        return int(value)
    given = f"of type {type(value).__name__}" if hasattr(value, "shape") else repr(value)
    bound = "" if least is None else f" of at least {least}"
    raise ProgramError(f"{name} is {given}: expected an integer{bound}")
