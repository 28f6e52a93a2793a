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


class Together:
    """Steps of a Pyro optimiser, those of Adam for all parameters at once.

    Pyro has one torch optimiser for each parameter, whose overhead outweighs the arithmetic of small networks. Here one
    Adam for all of them shares their states, so that what is saved, moved or continued is Pyro's as before. It is made anew
    whenever parameters, states or settings are no longer those it was made of; optimisers of other kinds, gradient clipping
    and schedules are left to Pyro.

    >>> import pyro
    >>> pyro.get_param_store()["p"] = torch.ones(1)
    >>> p = pyro.get_param_store()["p"].unconstrained()
    >>> update = Together(pyro.optim.Adam({"lr": 0.5}))
    >>> for _ in range(2):
    ...     p.grad = torch.ones(1)
    ...     update([p])
    >>> round(p.item(), 4)
    0.0
    """

    def __init__(self, optim: PyroOptim) -> None:
        self.optim = optim
        self.joint: torch.optim.Optimizer | None = None

    def __call__(self, parameters: list[Tensor]) -> None:
        """One step of these parameters, by their gradients."""
        if self.joint is not None and self._is_current(self.joint, parameters):
            self.joint.step()
            return
        self.optim(parameters)
        self.joint = self._joined(parameters)

    def _joined(self, parameters: list[Tensor]) -> torch.optim.Optimizer | None:
        """One optimiser for all, of the states of theirs; None where these are not all alike."""
        optim = self.optim
        if type(optim) is not PyroOptim or optim.pt_optim_constructor is not torch.optim.Adam:
            return None
        own = [optim.optim_objs[p] for p in parameters]
        if not own or any(one.state.get(p) is None for one, p in zip(own, parameters, strict=True)):
            return None
        if any(optim.grad_clip[p] is not None for p in parameters):
            return None
        settings = _settings(own[0])
        if any(type(one) is not torch.optim.Adam or _settings(one) != settings for one in own):
            return None
        joint = torch.optim.Adam(parameters, **settings)
        for one, p in zip(own, parameters, strict=True):
            joint.state[p] = one.state[p]  # the same dictionary
        return joint

    def _is_current(self, joint: torch.optim.Optimizer, parameters: list[Tensor]) -> bool:
        held, settings = joint.param_groups[0]["params"], _settings(joint)
        if len(held) != len(parameters):
            return False
        for p, q in zip(held, parameters, strict=True):
            one = self.optim.optim_objs.get(p)
            if (
                p is not q
                or one is None
                or one.state.get(p) is not joint.state[p]
                or _settings(one) != settings
            ):
                return False
        return True


def _settings(torch_optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    group = torch_optimiser.param_groups[0]
    return {name: value for name, value in group.items() if name not in ("params", "decoupled_weight_decay")}


def _torch_optimisers(optim: PyroOptim) -> Iterator[Any]:
    for one in optim.optim_objs.values():
        yield one.optimizer if isinstance(optim, PyroLRScheduler) else one


def _name(constructor: Any) -> str:
    return getattr(constructor, "__name__", type(constructor).__name__)
