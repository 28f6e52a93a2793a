"""Pyro optimisers as a program keeps them: copied, continued, saved, moved.

A Pyro optimiser is a recipe together with one torch optimiser for each parameter it has met. Its state waits under
the parameters' names until they are met again.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from pyro.optim.lr_scheduler import PyroLRScheduler
from pyro.optim.optim import PyroOptim
from torch import Tensor

from pyro_sinkhorn.errors import ProgramError


def choose(current: PyroOptim | None, pending: dict[str, Any], given: Any, lr: float | None) -> PyroOptim:
    """The optimiser of the next steps: a copy of the one given, the current one, or Adam; with a state that waits.

    :param pending: ``{"class": ..., "state": ...}`` of a program that was loaded, or empty
    :param lr: learning rate of the default optimiser
    :raises ProgramError: the given one is not Pyro's; a state waits that is not the default's; ``lr`` is not for it
    """
    if given is not None and not isinstance(given, PyroOptim):
        found = given.__name__ if isinstance(given, type) else type(given).__name__
        raise ProgramError(
            f"optim is a {found}: expected one of pyro.optim, which knows how to meet parameters as they appear, such "
            "as pyro.optim.Adam({'lr': 1e-3})"
        )
    if given is not None and lr is not None:
        raise ProgramError(
            f"lr={lr} is for the default optimiser, but optim is given: set the learning rate there"
        )
    if given is not None:
        optim = blank(given)
    elif current is not None:
        optim = current
    else:
        optim = PyroOptim(torch.optim.Adam, {"lr": 1e-3})
    if pending and pending["class"] == name_of(optim):
        optim.set_state(copy.deepcopy(pending["state"]))
    elif pending and given is None:
        raise ProgramError(
            f"the saved state continues a {pending['class']}, not the default Adam: pass one as optim="
        )
    if lr is not None:
        _set_learning_rate(optim, lr)
    return optim


def blank(optim: PyroOptim) -> PyroOptim:
    """The recipe without any state; what is done to one leaves the other alone."""
    new = copy.copy(optim)
    new.optim_objs, new.grad_clip, new._state_waiting_to_be_consumed = {}, {}, {}
    return copy.deepcopy(new)


def name_of(optim: PyroOptim) -> str:
    """``Adam``, ``CosineAnnealingLR(Adam)``: states of one name fit each other."""
    name = _name(optim.pt_optim_constructor)
    if isinstance(optim, PyroLRScheduler):
        return f"{_name(optim.pt_scheduler_constructor)}({name})"
    return name


def state_of(optim: PyroOptim) -> dict[str, Any]:
    """State by parameter name, that of parameters still to be met included; the parameter store must be active."""
    return optim._state_waiting_to_be_consumed | optim.get_state()


def move(optim: PyroOptim, device: torch.device) -> None:
    """Bring momenta to the device of the parameters."""
    for torch_optimiser in _torch_optimisers(optim):
        for state in torch_optimiser.state.values():
            for key, value in state.items():
                if isinstance(value, Tensor) and key != "step":  # torch keeps Adam's step count on the CPU
                    state[key] = value.to(device)


def _set_learning_rate(optim: PyroOptim, lr: float) -> None:
    """Go on with another learning rate."""
    if isinstance(optim, PyroLRScheduler) or not isinstance(optim.pt_optim_args, dict):
        raise ProgramError(
            f"lr={lr} is for the default optimiser; here {name_of(optim)} sets the learning rate itself"
        )
    optim.pt_optim_args = optim.pt_optim_args | {"lr": lr}
    groups = [group for one in _torch_optimisers(optim) for group in one.param_groups]
    groups += [
        group for state in optim._state_waiting_to_be_consumed.values() for group in state["param_groups"]
    ]
    for group in groups:
        group["lr"] = lr


def advance_schedule(optim: PyroOptim, loss: float) -> None:
    """Step the schedule, if there is one."""
    if isinstance(optim, PyroLRScheduler):
        plateau = optim.pt_scheduler_constructor is torch.optim.lr_scheduler.ReduceLROnPlateau
        optim.step(*([loss] if plateau else []))


def _torch_optimisers(optim: PyroOptim) -> Iterator[Any]:
    for one in optim.optim_objs.values():
        yield one.optimizer if isinstance(optim, PyroLRScheduler) else one


def _name(constructor: Any) -> str:
    return getattr(constructor, "__name__", type(constructor).__name__)
