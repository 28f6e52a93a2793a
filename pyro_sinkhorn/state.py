"""The one state format: what ``save`` writes, ``clone`` copies and pickling carries.

A state is a dictionary of tensors, numbers, strings, constraints and containers of those. In a file constraints are
replaced by their names, so that ``torch.load`` reads it with ``weights_only=True``: a file from a stranger can hold
wrong numbers, but it cannot run code.
"""

from __future__ import annotations

import os
import secrets
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from pyro.distributions import constraints
from torch import Tensor

FORMAT = "pyro_sinkhorn program"
VERSION = 1
#: What every state of this version holds; :mod:`pyro_sinkhorn.snapshot` says what each is.
KEYS = frozenset(
    {"format", "version", "num_steps", "epoch", "modules", "guide", "params", "optim", "stream", "history"}
    | {"loss"}
)


def write(state: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a state so that the file is either the old one or the new one, whenever the process dies.

    :raises ValueError: it holds something that could not be read back, before anything is written
    """
    path = Path(path)
    packed = _packed(state, "the state")
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(temporary, "xb") as file:
            torch.save(packed, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _settle(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _settle(folder: Path) -> None:
    """Make a new name in a folder outlast a loss of power, where folders can be opened."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read(path: str | os.PathLike[str], device: torch.device | str | None = None) -> dict[str, Any]:
    """Read a state.

    :raises OSError: there is no such file, or it may not be read
    :raises ValueError: the file is damaged, foreign, or of a later version; nothing in it is executed
    """
    with open(path, "rb") as file:
        try:
            _check_sums(file)
            state = torch.load(file, map_location=device or "cpu", weights_only=True)
        except Exception as error:
            # torch and pickle raise whatever broken bytes happen to lead to.
            raise ValueError(
                f"{os.fspath(path)!r} cannot be read as a saved program: it is damaged, cut short, or holds more than "
                f"tensors and numbers ({type(error).__name__})"
            ) from error
    if (
        not isinstance(state, dict)
        or state.get("format") != FORMAT
        or not isinstance(state.get("version"), int)
    ):
        raise ValueError(f"{os.fspath(path)!r} is not a saved program of pyro_sinkhorn")
    if state["version"] > VERSION:
        raise ValueError(
            f"{os.fspath(path)!r} has state version {state['version']}, this pyro_sinkhorn reads up to {VERSION}: "
            "update pyro_sinkhorn"
        )
    if not set(state) >= KEYS:
        raise ValueError(f"{os.fspath(path)!r} lacks {sorted(KEYS - set(state))}: it is damaged")
    return _unpacked(state)


def _check_sums(file: BinaryIO) -> None:
    """torch does not look at the checksums that it writes: a flipped bit would be a wrong weight."""
    with zipfile.ZipFile(file) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
    file.seek(0)


def detached(value: Any) -> Any:
    """Copies of all tensors in nested containers, without graph and without Pyro's weak references."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: detached(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(detached(item) for item in value)
    return value


# What a file holds in place of objects: constraints by name and attributes, plain numbers for NumPy's.

_CONSTRAINT = "__constraint__"


def _packed(value: Any, where: str) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (Tensor, str, bytes, bool, int, float, type(None))):
        return value
    if isinstance(value, constraints.Constraint):
        packed = {_CONSTRAINT: type(value).__name__, "attributes": _packed(dict(vars(value)), where)}
        try:
            _unpacked(packed)
        except ValueError as error:
            raise ValueError(f"{where} cannot be saved: {error}") from error
        return packed
    if isinstance(value, dict):
        plain = {key: _packed(item, f"{where}[{key!r}]") for key, item in value.items()}
        return Counter(plain) if isinstance(value, Counter) else plain  # MultiStepLR has one
    if isinstance(value, (list, tuple)):
        items = [_packed(item, f"{where}[{i}]") for i, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    raise ValueError(
        f"{where} cannot be saved: it is a {type(value).__name__}, and a file holds tensors, numbers and text only"
    )


def _unpacked(value: Any) -> Any:
    if isinstance(value, dict):
        plain = {key: _unpacked(item) for key, item in value.items()}
        if set(plain) == {_CONSTRAINT, "attributes"}:
            return _make_constraint(plain[_CONSTRAINT], plain["attributes"])
        return Counter(plain) if isinstance(value, Counter) else plain
    if isinstance(value, (list, tuple)):
        items = [_unpacked(item) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    return value


def _make_constraint(name: str, attributes: dict[str, Any]) -> Any:
    """The constraint of this class with these attributes.

    :raises ValueError: ``pyro.distributions.constraints`` has none
    """
    found: type | None = None
    for known in vars(constraints).values():
        cls = known if isinstance(known, type) else type(known)
        if issubclass(cls, constraints.Constraint) and cls.__name__ == name:
            found = cls
            plain = not any(isinstance(value, Tensor) for value in attributes.values())
            if known is not cls and plain and vars(known) == attributes:
                return known
    if found is not None:
        # Attribute by attribute, since constructors call their arguments otherwise than they keep them.
        constraint: Any = object.__new__(found)
        vars(constraint).update(attributes)
        return constraint
    raise ValueError(f"{name!r} is not a constraint of pyro.distributions.constraints")
