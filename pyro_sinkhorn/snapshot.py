"""Taking and restoring the state of a program, and how a pickle refers to one."""

from __future__ import annotations

import importlib
import pickle
import types
from collections.abc import Callable
from typing import Any, Protocol

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.nn import PyroModule, PyroParam
from torch import nn

from pyro_sinkhorn import calibration, optimiser, state
from pyro_sinkhorn.losses.base import SinkhornLoss
from pyro_sinkhorn.losses.trace_data_sinkhorn import Trace_DataSinkhorn
from pyro_sinkhorn.losses.trace_energy_score import Trace_EnergyScore
from pyro_sinkhorn.losses.trace_enum_sinkhorn import TraceEnum_Sinkhorn
from pyro_sinkhorn.losses.trace_joint_sinkhorn import Trace_JointSinkhorn
from pyro_sinkhorn.losses.trace_sinkhorn import Trace_Sinkhorn
from pyro_sinkhorn.modules import Owned, shared_copy, submodule_pairs
from pyro_sinkhorn.parts import saved_guide, settled_guide
from pyro_sinkhorn.rng import RandomStream, undisturbed
from pyro_sinkhorn.training import Epoch, History


class Fitted(Protocol):
    """What of a :class:`~pyro_sinkhorn.SinkhornProgram` is learned or advances with training."""

    model: Any
    guide: Any
    _guide_given: Any
    pending_guide: dict[str, Any] | None
    loss: Any
    owned: Owned
    optim: Any
    pending_optim: dict[str, Any]
    stream: RandomStream | None
    history: History
    epoch: Epoch
    num_steps: int
    calibration: Any


def take(program: Fitted) -> dict[str, Any]:
    """Everything a program has learned, as tensors, numbers, strings and constraints."""
    calibrated = None if program.calibration is None else program.calibration.guide
    modules = [
        module
        for module in (*program.owned.copies.values(), program.guide, calibrated)
        if isinstance(module, nn.Module)
    ]
    held = {id(parameter) for module in modules for parameter in module.parameters()}
    with program.owned.active():
        store = pyro.get_param_store()
        # Parameters of modules travel with their modules; the store would bring them back as different tensors.
        free = {name: p for name, p in store.named_parameters() if id(p) not in held}
        params = {name: {"value": p, "constraint": store._constraints[name]} for name, p in free.items()}
        optim = dict(program.pending_optim)
        if program.optim is not None:
            optim = {"class": optimiser.name_of(program.optim), "state": optimiser.state_of(program.optim)}
    saved: dict[str, Any] = {
        "format": state.FORMAT,
        "version": state.VERSION,
        "num_steps": program.num_steps,
        "epoch": vars(program.epoch),
        "modules": {name: dict(module.state_dict()) for name, module in program.owned.copies.items()},
        "guide": _guide_state(program),
        "guide_class": type(program.guide).__name__,
        "params": params,
        "optim": optim,
        "stream": None if program.stream is None else program.stream.state(),
        "history": {
            name: torch.tensor(values, dtype=torch.float64) for name, values in vars(program.history).items()
        },
        "loss": {"class": type(program.loss).__name__},
    }
    if isinstance(program.loss, SinkhornLoss):
        config = program.loss.config()
        own = sorted(name for name, value in config.items() if _is_code(value))  # code is not saved
        config |= dict.fromkeys(own)
        saved["loss"] |= {"config": config, "own": own} | program.loss.state()
    if program.calibration is not None:
        saved["calibration"] = calibration.state_of(program.calibration, program.guide, program.loss)
    return state.detached(saved)


def restore(program: Fitted, saved: dict[str, Any], like: Fitted | None = None) -> None:
    """Put a state into a program that has the same code.

    :param like: the program that the state is of, where it is there to copy a posterior guide of the user's from
    :raises ValueError: the program's modules or their shapes differ from the saved ones
    """
    mine, theirs = set(program.owned.copies), set(saved["modules"])
    if mine != theirs:
        raise ValueError(
            f"the state was saved with the modules {sorted(theirs)}, but this model refers to {sorted(mine)}: load it "
            "with the model it was saved from"
        )
    parts = [
        (f"module {name!r}", program.owned.copies[name], saved["modules"][name]) for name in sorted(theirs)
    ]
    program.pending_guide = None
    program.guide = saved_guide(
        program.guide, program._guide_given, program.loss, program.model, saved.get("guide_class")
    )
    if isinstance(program.guide, AutoGuide) and program.guide.prototype_trace is None:
        program.pending_guide = dict(saved["guide"]) or None
    elif isinstance(program.guide, nn.Module):
        parts.append((f"the guide, a {type(program.guide).__name__},", program.guide, saved["guide"]))
    for name, module, values in parts:
        _make_lazy_parameters(module)
        try:
            module.load_state_dict(values)
        except RuntimeError as error:
            raise ValueError(f"{name} differs from the saved one: {' '.join(str(error).split())}") from error
    store: dict[str, Any] = {"params": {}, "constraints": {}}
    for name, packed in saved["params"].items():
        store["params"][name] = packed["value"].clone().requires_grad_(True)
        store["constraints"][name] = packed["constraint"]
    program.owned.store = store
    program.optim = None
    program.pending_optim = saved["optim"]
    program.stream = None
    if saved["stream"] is not None:
        program.stream = RandomStream(0)
        program.stream.restore(saved["stream"])
    program.history = History(**{name: values.tolist() for name, values in saved["history"].items()})
    program.history.validated_at = [int(step) for step in program.history.validated_at]
    program.calibration = None
    if like is not None and like.calibration is not None and like.calibration.given:
        pairs = [(mine, program.owned.copies[name]) for name, mine in like.owned.copies.items()]
        mine = like.calibration
        guide = shared_copy(mine.guide, program.model, replaced=submodule_pairs(pairs))
        loss = program.loss if mine.loss is like.loss else mine.loss.fresh()
        loss.load_state(state.detached(mine.loss.state()))
        program.calibration = calibration.copied(mine, guide, loss)
    elif "calibration" in saved:
        program.calibration = calibration.restored(
            saved["calibration"], program.model, program.guide, program.loss
        )
    program.num_steps, program.epoch = saved["num_steps"], Epoch(**saved["epoch"])
    if isinstance(program.loss, SinkhornLoss):
        try:
            program.loss.load_state(saved["loss"])
        except RuntimeError as error:
            raise ValueError(
                f"the loss differs from the saved one: {' '.join(str(error).split())}"
            ) from error


def _guide_state(program: Fitted) -> dict[str, Any]:
    if program.pending_guide is not None:
        return program.pending_guide
    return dict(program.guide.state_dict()) if isinstance(program.guide, nn.Module) else {}


def wake_guide(program: Fitted, args: Any, kwargs: Any) -> None:
    """What a guide waits for data with: which class it is, and the saved parameters of one of Pyro's automatic guides.

    :raises ValueError: they differ from the saved ones
    """
    program.guide = settled_guide(
        program.guide, program._guide_given, program.loss, program.model, args, kwargs
    )
    if program.pending_guide is None:
        return
    with undisturbed(), poutine.block(), torch.no_grad():
        program.guide(*args, **kwargs)
    try:
        program.guide.load_state_dict(program.pending_guide)
    except RuntimeError as error:
        raise ValueError(f"the guide differs from the saved one: {' '.join(str(error).split())}") from error
    program.pending_guide = None


def _make_lazy_parameters(module: nn.Module) -> None:
    """A parameter declared by ``@PyroParam`` exists only from its first use on; a saved one was used."""
    with torch.random.fork_rng(devices=[]):
        for part in module.modules():
            for name in dir(type(part)) if isinstance(part, PyroModule) else ():
                if isinstance(vars(type(part)).get(name), PyroParam):
                    getattr(part, name)


#: Losses that a file can describe.
_LOSSES: dict[str, type[SinkhornLoss]] = {
    cls.__name__: cls
    for cls in (
        Trace_Sinkhorn,
        TraceEnum_Sinkhorn,
        Trace_DataSinkhorn,
        Trace_EnergyScore,
        Trace_JointSinkhorn,
    )
}


def make_loss(saved: dict[str, Any]) -> SinkhornLoss | None:
    """The loss that a file describes; None for a class of the user's, or one given functions of the user's."""
    described = saved["loss"]
    if described["class"] not in _LOSSES or described["own"]:
        return None
    return _LOSSES[described["class"]](**described["config"])


def _is_code(value: Any) -> bool:
    """A function, or functions by name."""
    return callable(value) or (isinstance(value, dict) and any(map(callable, value.values())))


def check_loss(program: Fitted, saved: dict[str, Any]) -> None:
    """A loss that the file cannot describe must have been given.

    :raises ValueError: it was not
    """
    described = saved["loss"]
    name = described["class"]
    if type(program.loss).__name__ != name:
        raise ValueError(
            f"the program was saved with the loss {name}, not a {type(program.loss).__name__}: pass one as loss="
            + "".join(f", with the same {argument}" for argument in described.get("own", ()))
        )
    for argument in described.get("own", ()):
        if not _is_code(program.loss.config()[argument]):
            raise ValueError(
                f"the program was saved with a {name} with a {argument} of its own: pass it as loss="
            )


def pickled_parts(program: Any) -> tuple[Any, Any, Any, Any, Any]:
    """A program for pickling: its model by reference or value, its guide, loss and optimiser as given, its state.

    :raises pickle.PicklingError: a function that no other process could find
    """
    model, guide, loss = program.model, program._guide_given, program._loss_given
    kind, reference = _reference(model)
    if kind == "value":
        # Pyro leaves weak references on parameters that it has seen; a copy is free of them.
        reference = shared_copy(model)
    if isinstance(guide, nn.Module):
        held = [model, *(item for item in getattr(guide, "_model", ()) if item == model)]
        guide = shared_copy(
            guide, replaced=[(item, reference if kind == "value" else model) for item in held]
        )
    loss = loss.fresh() if isinstance(loss, SinkhornLoss) else loss
    optim = None if program.optim is None else optimiser.blank(program.optim)
    return (kind, reference), guide, loss, optim, take(program)


def referred(reference: tuple[str, Any]) -> Callable[..., Any]:
    """The model that a pickle refers to: what its name stands for now, undecorated."""
    kind, value = reference
    if kind == "value":
        return value
    found = _resolve(*value)
    return getattr(found, "model", found) if not isinstance(found, types.FunctionType) else found


def _reference(model: Any) -> tuple[str, Any]:
    if not isinstance(model, types.FunctionType):
        return "value", None
    name = (model.__module__, model.__qualname__)
    try:
        found = _resolve(*name)
    except (ImportError, AttributeError, TypeError, ValueError):
        found = None
    # A decorated function's own name stands for the program made of it.
    if found is model or getattr(found, "model", None) is model:
        return "name", name
    raise pickle.PicklingError(
        f"the model {name[1]!r} of module {name[0]!r} is not found under that name, so a pickle could not find it "
        "either: define it at the top level of a module, or use save() and load(path, model)"
    )


def _resolve(module: str, qualname: str) -> Any:
    value: Any = importlib.import_module(module)
    for part in qualname.split("."):
        value = getattr(value, part)
    return value
