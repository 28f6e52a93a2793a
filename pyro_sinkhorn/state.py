"""The one state format: what ``save`` writes, ``clone`` copies and pickling carries.

A state is a dictionary of tensors, numbers, strings and containers of those, so that ``torch.load`` reads it with
``weights_only=True``: a file from a stranger can hold wrong numbers, but it cannot run code.
"""

from __future__ import annotations

import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import torch
from pyro.distributions import constraints
from torch import Tensor

FORMAT = "pyro_sinkhorn program"
VERSION = 1


def write(state: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a state so that the file is either the old one or the new one, whenever the process dies."""
    path = Path(path)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent or ".", prefix=path.name, suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read(path: str | os.PathLike[str], device: torch.device | str | None = None) -> dict[str, Any]:
    """Read a state.

    :raises FileNotFoundError: there is no such file
    :raises ValueError: the file is damaged, foreign, or of a later version; nothing in it is executed
    """
    try:
        state = torch.load(path, map_location=device or "cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, ValueError, KeyError) as error:
        raise ValueError(
            f"{os.fspath(path)!r} cannot be read as a saved program: it is damaged, cut short, or holds more than "
            f"tensors and numbers ({type(error).__name__})"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{os.fspath(path)!r} is not a saved program of pyro_sinkhorn")
    if state["version"] > VERSION:
        raise ValueError(
            f"{os.fspath(path)!r} has state version {state['version']}, this pyro_sinkhorn reads up to {VERSION}: "
            "update pyro_sinkhorn"
        )
    return state


def pack_constraint(constraint: Any) -> dict[str, Any]:
    """Name and arguments of a constraint, in place of the object."""
    cls = type(constraint)
    arguments = {}
    for name, value in vars(constraint).items():
        if isinstance(value, constraints.Constraint):
            arguments[name] = pack_constraint(value)
        elif isinstance(value, (int, float, bool, str, Tensor)):
            arguments[name] = value
    return {"type": cls.__name__, "arguments": arguments}


def unpack_constraint(packed: dict[str, Any]) -> Any:
    """The constraint that :func:`pack_constraint` described.

    :raises ValueError: for a constraint that ``pyro.distributions.constraints`` does not have
    """
    arguments = {
        name: unpack_constraint(value) if isinstance(value, dict) else value
        for name, value in packed["arguments"].items()
    }
    for candidate in vars(constraints).values():
        if isinstance(candidate, constraints.Constraint) and type(candidate).__name__ == packed["type"]:
            if all(name in vars(candidate) and vars(candidate)[name] == v for name, v in arguments.items()):
                return candidate
        if isinstance(candidate, type) and candidate.__name__ == packed["type"]:
            return candidate(**{name.lstrip("_"): value for name, value in arguments.items() if name in _INIT})
    raise ValueError(f"unknown constraint {packed['type']!r} in a saved program")


_INIT = {"lower_bound", "upper_bound", "base_constraint", "reinterpreted_batch_ndims"}


def detached(value: Any) -> Any:
    """Copies of all tensors in nested containers, without graph and without Pyro's weak references."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: detached(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(detached(item) for item in value)
    return value
