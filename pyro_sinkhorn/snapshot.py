"""Taking and restoring the state of a program, and rebuilding one from a pickle."""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pyro
import torch
from torch import nn

from pyro_sinkhorn import state
from pyro_sinkhorn.losses.trace_sinkhorn import Trace_Sinkhorn
from pyro_sinkhorn.modules import shared_copy
from pyro_sinkhorn.rng import RandomStream
from pyro_sinkhorn.training import History

if TYPE_CHECKING:
    from pyro_sinkhorn.program import SinkhornProgram


def take(program: SinkhornProgram) -> dict[str, Any]:
    """Everything a program has learned, as tensors, numbers and strings."""
    guide = program.guide.state_dict() if isinstance(program.guide, nn.Module) else {}
    held = {id(p) for module in [*program.modules.values(), program.guide] if isinstance(module, nn.Module) for p in module.parameters()}
    with program.active():
        store = pyro.get_param_store()
        # Parameters of modules travel with their modules; the store would bring them back as different tensors.
        free = {name: p for name, p in store.named_parameters() if id(p) not in held}
        params = {
            name: {"value": p, "constraint": state.pack_constraint(store._constraints[name])} for name, p in free.items()
        }
        optim = dict(program.pending_optim)
        if program.optim is not None:
            optim = {"class": optim_class(program.optim), "state": program.optim.get_state()}
            optim["state"] |= program.optim._state_waiting_to_be_consumed
    saved: dict[str, Any] = {
        "format": state.FORMAT,
        "version": state.VERSION,
        "num_steps": program.num_steps,
        "order": program.order,
        "modules": {name: dict(module.state_dict()) for name, module in program.modules.items()},
        "guide": dict(guide),
        "params": params,
        "optim": optim,
        "stream": None if program.stream is None else program.stream.state(),
        "history": {
            name: torch.tensor(getattr(program.history, name), dtype=torch.float64)
            for name in ("loss", "reconstruction", "match")
        },
        "loss": {"class": type(program.loss).__name__},
    }
    if isinstance(program.loss, Trace_Sinkhorn):
        match_state = program.loss.latent_match.state
        config = program.loss.config()
        if callable(config["cost"]):
            config["cost"] = None
        saved["loss"] |= {"config": config, "units": match_state.units, "mean_costs": match_state.mean_costs}
    return state.detached(saved)


def restore(program: SinkhornProgram, saved: dict[str, Any]) -> None:
    """Put a state into a program that has the same code.

    :raises ValueError: the program's modules or their shapes differ from the saved ones
    """
    mine, theirs = set(program.modules), set(saved["modules"])
    if mine != theirs:
        raise ValueError(
            f"the state was saved with the modules {sorted(theirs)}, but this model refers to {sorted(mine)}: load it "
            "with the model it was saved from"
        )
    parts = [(f"module {name!r}", program.modules[name], saved["modules"][name]) for name in sorted(theirs)]
    if isinstance(program.guide, nn.Module):
        parts.append(("the guide", program.guide, saved["guide"]))
    for name, module, values in parts:
        try:
            module.load_state_dict(values)
        except RuntimeError as error:
            raise ValueError(f"{name} differs from the saved one: {error}") from error
    store: dict[str, Any] = {"params": {}, "constraints": {}}
    for name, packed in saved["params"].items():
        store["params"][name] = packed["value"].clone().requires_grad_(True)
        store["constraints"][name] = state.unpack_constraint(packed["constraint"])
    program.store = store
    program.optim = None
    program.pending_optim = saved["optim"]
    program.stream = None
    if saved["stream"] is not None:
        program.stream = RandomStream(0)
        program.stream.restore(saved["stream"])
    program.history = History(**{name: values.tolist() for name, values in saved["history"].items()})
    program.num_steps, program.order = saved["num_steps"], saved["order"]
    if isinstance(program.loss, Trace_Sinkhorn) and "units" in saved["loss"]:
        match_state = program.loss.latent_match.state
        match_state.units = dict(saved["loss"]["units"])
        match_state.mean_costs = dict(saved["loss"]["mean_costs"])


def make_loss(saved: dict[str, Any]) -> Trace_Sinkhorn:
    """The loss that a file describes.

    :raises ValueError: it was a class of the user's, or had a cost of the user's
    """
    described = saved["loss"]
    if described["class"] != "Trace_Sinkhorn" or described["config"]["cost"] is None:
        raise ValueError(
            f"the program was saved with the loss {described['class']} and a cost or class of its own: pass loss= to load"
        )
    return Trace_Sinkhorn(**described["config"])


def optim_class(optim: Any) -> str:
    """Name of the torch optimiser that a Pyro optimiser makes."""
    return getattr(optim.pt_optim_constructor, "__name__", type(optim).__name__)


def reduce(program: SinkhornProgram) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """How to pickle a program: its model by reference, its state as tensors."""
    guide = program._guide_given
    if isinstance(guide, nn.Module):
        guide = shared_copy(guide, program.model)
    loss = program._loss_given
    loss = loss.fresh() if isinstance(loss, Trace_Sinkhorn) else loss
    return rebuild, (_reference(program.model), guide, loss, take(program))


def rebuild(reference: tuple[str, Any], guide: Any, loss: Any, saved: dict[str, Any]) -> SinkhornProgram:
    """The inverse of :func:`reduce`; always a new program, never the one that the name stands for."""
    from pyro_sinkhorn.program import SinkhornProgram

    kind, value = reference
    model = value if kind == "object" else _resolve(*value)
    program = SinkhornProgram(model.model if isinstance(model, SinkhornProgram) else model, guide, loss)
    restore(program, saved)
    return program


def _reference(model: Any) -> tuple[str, Any]:
    if isinstance(model, nn.Module):
        # Pyro leaves weak references on parameters that it has seen; a copy is free of them.
        return "object", shared_copy(model)
    name = (getattr(model, "__module__", None), getattr(model, "__qualname__", None))
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
