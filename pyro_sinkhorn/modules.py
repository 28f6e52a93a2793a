"""What a program has for itself: copies of the modules that its model refers to, and a parameter store.

A Pyro model is a function that reaches its networks through closures and globals. Two programs made of one function
would train one set of weights, so a program keeps copies of every module that :mod:`pyro_sinkhorn.reachable` finds,
and lends their tensors to the originals while it runs. Outside, the originals keep the weights they had.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import pyro
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pyro_sinkhorn.errors import ProgramError
from pyro_sinkhorn.reachable import find_modules

__all__ = [
    "Owned",
    "copied_initial_values",
    "find_modules",
    "made_guide",
    "shared_copy",
    "submodule_pairs",
    "training_mode",
]

#: Dictionaries of a module that a run may fill or replace: BatchNorm its buffers, a PyroModule its parameters.
_HELD = ("_parameters", "_buffers", "_pyro_params")


class Owned:
    """What a program has for itself: copies of modules, and a parameter store. In use inside :meth:`active`.

    :raises ProgramError: a module that cannot be copied, naming it
    """

    def __init__(self, originals: dict[str, nn.Module]) -> None:
        for name, module in originals.items():
            if any(is_lazy(tensor) for tensor in (*module.parameters(), *module.buffers())):
                raise ProgramError(
                    f"module {name!r} has lazy parameters, whose shapes are unknown until it runs, so it cannot be "
                    "copied: run it once on an example before making a program of the model"
                )
        self.originals = originals
        self.store: dict[str, Any] = {"params": {}, "constraints": {}}
        self._depth = 0
        # One copy of the whole dictionary, so that modules that share weights go on sharing them.
        try:
            self.copies: dict[str, nn.Module] = copy.deepcopy(originals)
        except RuntimeError as error:
            raise ProgramError(f"one of the modules {sorted(originals)} cannot be copied: {error}") from error

    def pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Every original module, submodules included, with its copy; a module in two places comes once.

        :raises ProgramError: submodules were added or removed since the copies were made
        """
        for name, original in self.originals.items():
            now, then = len(list(original.modules())), len(list(self.copies[name].modules()))
            if now != then:
                raise ProgramError(
                    f"module {name!r} had {then} submodules when the program was made and now has {now}: make the "
                    "program after the model is complete, or call reset()"
                )
        return submodule_pairs([(original, self.copies[name]) for name, original in self.originals.items()])

    @contextmanager
    def active(self) -> Iterator[None]:
        """Originals hold the copies' parameters, buffers and modes inside, and the store is Pyro's; re-entrant."""
        self._depth += 1
        try:
            if self._depth > 1:
                yield
                return
            with (
                self._lent(),
                pyro.get_param_store().scope(cast(Any, self.store)) as store,
                copied_initial_values(),
            ):
                try:
                    yield
                finally:
                    # scope() saves only on a clean exit: a fit that ends in an error keeps what it learned.
                    store.update(pyro.get_param_store().get_state())
        finally:
            self._depth -= 1

    @contextmanager
    def _lent(self) -> Iterator[None]:
        pairs = self.pairs()
        kept = [
            ({key: dict(held) for key, held in _held(original)}, original.training) for original, _ in pairs
        ]
        try:
            for original, mine in pairs:
                for key, held in _held(original):
                    _replace(held, mine.__dict__[key])
                original.training = mine.training
            yield
        finally:
            for (original, mine), (before, training) in zip(pairs, kept, strict=True):
                for key, held in _held(original):
                    _replace(mine.__dict__[key], held)
                    _replace(held, before[key])
                original.training = training


def submodule_pairs(roots: list[tuple[nn.Module, nn.Module]]) -> list[tuple[nn.Module, nn.Module]]:
    """Modules with their copies, submodules included; one that is in two places comes once."""
    found = {
        id(original): (original, mine)
        for root, other in roots
        for original, mine in zip(root.modules(), other.modules(), strict=True)
    }
    return list(found.values())


def _held(module: nn.Module) -> list[tuple[str, dict[str, Any]]]:
    return [(key, module.__dict__[key]) for key in _HELD if key in module.__dict__]


def _replace(held: dict[str, Any], values: dict[str, Any]) -> None:
    """Exactly these values: an entry that a run has added must not stay with the original."""
    values = dict(values)
    held.clear()
    held.update(values)


def shared_copy(value: Any, *kept: Any, replaced: list[tuple[Any, Any]] | None = None) -> Any:
    """Deep copy of a guide or model that goes on referring to what it shares with others.

    :param kept: objects to refer to as they are: the model that a guide runs
    :param replaced: pairs of an object and what the copy is to refer to in its place
    """
    # Automatic guides keep their model in a tuple; bound methods and partials are new objects at every mention.
    models = getattr(value, "_model", None)
    memo: dict[int, Any] = {id(item): item for item in (*kept, *(models or ()))}
    memo |= {id(old): new for old, new in replaced or ()}
    targets = dict(memo)
    new = copy.deepcopy(value, memo)
    if models is not None:
        # Pyro's own drop their model when they are copied, the original's too.
        value._model, new._model = models, tuple(targets[id(item)] for item in models)
    return new


def made_guide(guide: Any, model: Callable[..., Any]) -> Any:
    """A guide of the class or partial given; other guides as they are."""
    cls = guide.func if isinstance(guide, functools.partial) else guide
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        return guide
    try:
        inspect.signature(guide).bind(model)
    except TypeError:
        return guide()  # a class that needs no model
    return guide(model)


@contextmanager
def training_mode(modules: list[nn.Module], training: bool) -> Iterator[None]:
    """Train or eval mode inside, every submodule's own mode restored after."""
    roots = [root.training for root in modules]
    before = {module: module.training for root in modules for module in root.modules()}
    for root in modules:
        root.train(training)
    try:
        yield
    finally:
        for root, mode in zip(modules, roots, strict=True):
            root.train(mode)  # submodules made inside follow their root
        for module, mode in before.items():
            module.training = mode


@contextmanager
def copied_initial_values() -> Iterator[None]:
    """Let ``pyro.param`` make parameters of copies of their initial values inside.

    Pyro takes an unconstrained initial tensor itself as the parameter: training would then move a tensor in the
    user's hands, be it a slice of the data, and a second program would start from where the first one ended. A
    handler cannot do this, since auxiliary runs of the model are hidden from the handlers outside.
    """
    store = pyro.get_param_store()
    outer = vars(store).get("setdefault")
    inherited = store.setdefault

    def setdefault(name: str, value: Any, constraint: Any = constraints.real) -> Tensor:
        if name not in store:
            value = _copied(value() if callable(value) else value)
        return inherited(name, value, constraint)

    vars(store)["setdefault"] = setdefault
    try:
        yield
    finally:
        if outer is None:
            del vars(store)["setdefault"]
        else:
            vars(store)["setdefault"] = outer


def _copied(value: Any) -> Any:
    # A module's parameters are the program's own already, and must stay the module's.
    return (
        value.detach().clone() if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) else value
    )
