"""Modules that a model refers to, and how a program owns copies of them.

A Pyro model is a function that reaches its networks through closures and globals. Two programs made of one function
would train one set of weights, so a program keeps copies of every module it finds, and lends their tensors to the
originals while it runs. Outside, the originals keep the weights they had.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def find_modules(fn: Any) -> dict[str, nn.Module]:
    """Modules that a callable can reach: itself, its closure, globals it names, its instance, nested functions.

    >>> net = nn.Linear(2, 2)
    >>> def outer():
    ...     decoder = nn.Linear(2, 2)
    ...     return lambda x: decoder(x)
    >>> list(find_modules(outer()))
    ['decoder']
    """
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()

    def add(name: str, value: Any, depth: int) -> None:
        if id(value) in seen or depth > 8:
            return
        if isinstance(value, nn.Module):
            seen.add(id(value))
            while name in found:
                name += "_"
            found[name] = value
        elif isinstance(value, (list, tuple)):
            for i, item in enumerate(value):
                add(f"{name}.{i}", item, depth + 1)
        elif isinstance(value, dict):
            for key, item in value.items():
                add(f"{name}.{key}", item, depth + 1)
        elif isinstance(value, functools.partial):
            seen.add(id(value))
            add(name, value.func, depth + 1)
            add(name, list(value.args), depth + 1)
            add(name, value.keywords, depth + 1)
        elif isinstance(value, types.MethodType):
            add(name, value.__self__, depth + 1)
            add(name, value.__func__, depth + 1)
        elif isinstance(value, types.FunctionType):
            seen.add(id(value))
            if not _is_library(value):
                for key, item in _references(value):
                    add(key, item, depth + 1)
        elif hasattr(value, "__dict__") and not isinstance(value, (type, types.ModuleType)) and not _is_library(value):
            seen.add(id(value))
            for key, item in vars(value).items():
                add(f"{name}.{key}", item, depth + 1)

    add(getattr(fn, "__name__", "model"), fn, 0)
    return found


def _references(fn: types.FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # a variable not assigned yet
            continue
    yield from ((f"default{i}", value) for i, value in enumerate(fn.__defaults__ or ()))
    yield from (fn.__kwdefaults__ or {}).items()
    codes = [fn.__code__]
    while codes:
        code = codes.pop()
        codes += [const for const in code.co_consts if isinstance(const, types.CodeType)]
        for name in code.co_names:
            if name not in fn.__globals__:
                continue
            value = fn.__globals__[name]
            if isinstance(value, types.ModuleType):
                # networks.decoder: only modules directly in a Python module that the code names.
                attributes = ((n, value.__dict__.get(n)) for n in code.co_names)
                yield from ((n, v) for n, v in attributes if isinstance(v, nn.Module))
            else:
                yield name, value


def _is_library(value: Any) -> bool:
    module = getattr(value, "__module__", None) or getattr(type(value), "__module__", "") or ""
    return module.split(".")[0] in {"pyro", "torch", "numpy", "builtins", "functools", "pyro_sinkhorn", "typing"} and (
        not module.startswith("pyro_sinkhorn.models")
    )


class OwnedModules:
    """Private copies of modules, lent to the originals inside :meth:`lent`."""

    def __init__(self, originals: dict[str, nn.Module]) -> None:
        self.originals = originals
        # One copy of the whole dictionary, so that modules that share weights go on sharing them.
        self.copies: dict[str, nn.Module] = copy.deepcopy(originals)

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Originals hold the copies' parameters, buffers and modes inside."""
        pairs = [
            (original, mine)
            for name in self.originals
            for original, mine in zip(self.originals[name].modules(), self.copies[name].modules(), strict=True)
        ]
        kept = [(dict(o._parameters), dict(o._buffers), o.training) for o, _ in pairs]
        try:
            for original, mine in pairs:
                original._parameters.update(mine._parameters)
                original._buffers.update(mine._buffers)
                original.training = mine.training
            yield
        finally:
            for (original, mine), (parameters, buffers, training) in zip(pairs, kept, strict=True):
                # A run may replace tensors: BatchNorm its buffers, a PyroModule its parameters.
                mine._parameters.update(original._parameters)
                mine._buffers.update(original._buffers)
                original._parameters.update(parameters)
                original._buffers.update(buffers)
                original.training = training


def shared_copy(module: Any, *kept: Callable[..., Any]) -> Any:
    """Deep copy of a guide that refers to the very models in ``kept``."""
    return copy.deepcopy(module, {id(item): item for item in kept})
