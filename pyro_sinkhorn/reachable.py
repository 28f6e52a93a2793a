"""Which modules a model can reach.

The search follows what the interpreter would: closures, defaults, the globals that the code names, attributes of
objects and the methods of their classes, what containers hold, what partials, methods and handlers wrap. It errs on
the side of finding too many.
"""

from __future__ import annotations

import functools
import sys
import types
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

_MAX_DEPTH = 12
#: Their code refers to no module of the user's.
_LIBRARIES = sys.stdlib_module_names | {
    "pyro",
    "torch",
    "numpy",
    "scipy",
    "sklearn",
    "pandas",
    "matplotlib",
    "tqdm",
}
_INTERNALS = frozenset(vars(nn.Module()))


def find_modules(fn: Any) -> dict[str, nn.Module]:
    """Modules that a callable can reach, by the names under which it does; its own name for itself.

    >>> def outer():
    ...     decoder = nn.Linear(2, 2)
    ...     return lambda x: decoder(x)
    >>> list(find_modules(outer()))
    ['decoder']
    """
    found: dict[str, nn.Module] = {}
    seen: dict[int, Any] = {}  # the objects too, lest one dies and another gets its id
    # Breadth first, so that the limit of depth cuts off what is far, however it is reached.
    queue = deque([(getattr(fn, "__name__", "model"), fn, 0)])
    while queue:
        name, value, depth = queue.popleft()
        if id(value) in seen or isinstance(value, (str, bytes, int, float, type(None))):
            continue
        seen[id(value)] = value
        if isinstance(value, nn.Module):
            while name in found:
                name += "_"
            found[name] = value
        if depth < _MAX_DEPTH:
            queue.extend((key, item, depth + 1) for key, item in _references(name, value))
    return found


def _references(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """What a value refers to, each with the name to know it by."""
    if isinstance(value, (list, tuple)):
        yield from ((f"{name}.{i}", item) for i, item in enumerate(value))
    elif isinstance(value, dict):
        yield from ((f"{name}.{key}", item) for key, item in value.items())
    elif isinstance(value, functools.partial):
        yield name, value.func
        yield from ((f"{name}.{i}", item) for i, item in enumerate(value.args))
        yield from ((f"{name}.{key}", item) for key, item in value.keywords.items())
    elif isinstance(value, types.MethodType):
        yield name, value.__self__
        yield name, value.__func__
    elif isinstance(value, (staticmethod, classmethod)):
        yield name, value.__func__
    elif isinstance(value, property):
        yield name, value.fget
    elif isinstance(value, types.FunctionType):
        yield from _references_of_function(value)
    elif isinstance(value, type):
        if not _is_library(value.__module__):
            yield from vars(value).items()
            yield from ((base.__name__, base) for base in value.__bases__)
    elif isinstance(value, nn.Module):
        for path, module in value.named_modules():
            prefix = f"{name}.{path}" if path else name
            yield from ((f"{prefix}.{k}", v) for k, v in vars(module).items() if k not in _INTERNALS)
            yield prefix, type(module)
    elif not isinstance(value, types.ModuleType) and not _is_library(type(value).__module__):
        yield from ((f"{name}.{key}", item) for key, item in getattr(value, "__dict__", {}).items())
        yield from ((f"{name}.{key}", getattr(value, key, None)) for key in _slots(type(value)))
        yield name, type(value)
    else:
        yield name, getattr(value, "__dict__", {}).get("__wrapped__")  # functools.cache and the like


def _references_of_function(fn: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """What the code of a function and of the functions inside it refers to."""
    for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # a variable not assigned yet
            continue
    if _is_library(fn.__module__):  # a decorator may be a library's and what it wraps the user's
        return
    yield from ((f"default{i}", value) for i, value in enumerate(fn.__defaults__ or ()))
    yield from (fn.__kwdefaults__ or {}).items()
    yield from vars(fn).items()
    codes = [fn.__code__]
    while codes:
        code = codes.pop()
        codes += [const for const in code.co_consts if isinstance(const, types.CodeType)]
        for name in code.co_names:
            value = fn.__globals__.get(name, sys.modules.get(name))  # a Python module may be imported inside
            if isinstance(value, types.ModuleType):
                yield from _attributes(value, code.co_names, set())
            else:
                yield name, value


def _attributes(module: types.ModuleType, names: Iterable[str], seen: set[str]) -> Iterator[tuple[str, Any]]:
    """What code may mean by ``networks.decoder``: attributes of a Python module that it also names."""
    if module.__name__ in seen or _is_library(module.__name__):
        return
    seen.add(module.__name__)
    for name in names:
        value = vars(module).get(name)
        if isinstance(value, types.ModuleType):
            yield from _attributes(value, names, seen)
        else:
            yield name, value


def _slots(cls: type) -> Iterator[str]:
    for base in cls.__mro__:
        slots = vars(base).get("__slots__", ())
        yield from (slots,) if isinstance(slots, str) else slots


def _is_library(module: str | None) -> bool:
    """Whether code of this Python module is not the user's; what it refers to is then not the model's."""
    top, _, rest = (module or "").partition(".")
    if top == "pyro_sinkhorn":
        return not rest.startswith("models")
    return top in _LIBRARIES and top != "__main__"
