"""What a loss does differently where several processes evaluate it together; alone, nothing.

What a process adds to the loss of all is the likelihood of its own data, and its share of what there is one of: the match of
the clouds of all, the densities of globals, factors outside the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.module import register_module_forward_pre_hook

from pyro_sinkhorn.distributed import SharedStep, active, running, shared_step
from pyro_sinkhorn.distributed.gradients import add_up, check_layout, layout, take_first
from pyro_sinkhorn.errors import NonFiniteError, ProgramError
from pyro_sinkhorn.losses.registration import recorded_modules
from pyro_sinkhorn.runs import preserved_buffers
from pyro_sinkhorn.scoring import run_guide, run_scored
from pyro_sinkhorn.structure import Group, Structure, plates_of

Parameters = dict[str, Tensor]


@contextmanager
def shared(loss: Any, model: Any, guide: Any, args: Any, kwargs: Any) -> Iterator[SharedStep | None]:
    """Evaluate a loss together with the other ranks inside; the first time, from the parameters of rank 0.

    :raises ProgramError: the loss cannot be shared, or the ranks have different programs
    """
    if not running():
        yield None
        return
    refuse_unshared(loss)
    with shared_step() as ranks:
        if not loss.in_step_with_others:
            loss.in_step_with_others = _bring_together(ranks, loss, model, guide, args, kwargs)
        yield ranks


def refuse_unshared(loss: Any) -> None:
    """Say which losses processes cannot share.

    :raises ProgramError: this is one
    """
    reason = getattr(loss, "not_shared", f"{type(loss).__name__} is not one of pyro_sinkhorn")
    if reason:
        raise ProgramError(
            f"{reason}: it cannot be shared between processes, each of which would learn something else. Trace_Sinkhorn, "
            "TraceEnum_Sinkhorn and Trace_DataSinkhorn with a fixed cost can; for others run one process, or put the work "
            "of one rank into `with distributed.alone():`"
        )


@contextmanager
def summed_gradients(ranks: SharedStep | None, loss: Any) -> Iterator[None]:
    """Add the gradients that arise inside up over ranks; those that were there before stay beside them.

    Parameters that were not there in the first step are rank 0's from now on.

    :raises ProgramError: the ranks met different parameters
    """
    if ranks is None:
        yield
        return
    before = {}
    for name, p in pyro.get_param_store().named_parameters():
        if p.grad is not None:
            before[name], p.grad = p.grad, None
    try:
        with poutine.trace(param_only=True) as capture, _watched_buffers() as changed:
            yield
        parameters, buffers = _parameters(capture.trace), changed()
        known = loss.in_step_with_others
        new = {f"new {name}": p for name, p in parameters.items() if (name, id(p)) not in known}
        check_layout(ranks, layout(parameters) + layout(buffers) + layout(new))
        add_up(ranks, parameters)
        take_first(ranks, buffers | new)
        loss.in_step_with_others = known | _identities(parameters)
    finally:
        for name, p in pyro.get_param_store().named_parameters():
            if name in before:
                p.grad = before[name] if p.grad is None else before[name] + p.grad


def own_share(value: Tensor, whole_gradient: bool = False) -> Tensor:
    """This rank's share of a number that all ranks have; the shares add up to it.

    :param whole_gradient: where the gradient of a rank is already its own part only, as behind :func:`gather`
    """
    ranks = active()
    if ranks is None:
        return value
    share = value / ranks.size
    return value + (share - value).detach() if whole_gradient else share


def added_up(
    trace: Trace, structure: Structure, names: set[str], density: Callable[[set[str]], Tensor]
) -> Tensor:
    """The density of some sites, of which those that all ranks have count for one.

    :param density: of a set of sites
    :raises ProgramError: latents that lie across the ranks' data
    """
    if active() is None:
        return density(names)
    plate = check_plates(structure, structure.groups)
    inside = {name for name in names if plate in {found.name for found in plates_of(trace.nodes[name])}}
    return density(inside) + own_share(density(names - inside))


def pooled(loss: Tensor, terms: Any, n_data: float, common: Tensor) -> tuple[Tensor, Any]:
    """The loss of all ranks, with this rank's gradient, and its terms.

    :param common: must be equal on all: the densities of the globals
    :raises NonFiniteError: on all ranks but the one whose loss it is, which knows more
    :raises ProgramError: the globals differ between ranks
    """
    ranks = active()
    if ranks is None:
        return loss, terms
    names = ("loss", "reconstruction", "globals", "total_match", "energy")
    own = [
        float(loss.detach()),
        n_data,
        float(common.detach()),
        *(getattr(terms, name) * n_data for name in names),
    ]
    found = torch.stack(ranks.gathered(torch.tensor(own, dtype=torch.float64), "adding up the loss"))
    losses, data, commons = found[:, 0], found[:, 1].sum(), found[:, 2]
    bad = [i for i, value in enumerate(losses.tolist()) if not math.isfinite(value)]
    if bad and ranks.rank not in bad:
        raise NonFiniteError(f"the loss of rank {bad[0]} is {float(losses[bad[0]])}: its own error says why")
    if bool(((commons - commons[0]).abs() > 1e-4 * (1 + commons[0].abs())).any()):
        raise ProgramError(
            f"the global latents have the log density {commons.tolist()} on the ranks, but there is one of each for all data. "
            "Their guide must not read the data, which differ from rank to rank: give it parameters of its own"
        )
    for name, value in zip(names, (found[:, 3:].sum(0) / data).tolist(), strict=True):
        setattr(terms, name, value)
    return loss + (losses.sum().to(loss) - loss).detach(), terms


def check_plates(structure: Structure, groups: Sequence[Group]) -> str:
    """Name of the plate whose slices the ranks share out: the outermost one of the data.

    :param groups: what is compared
    :raises ProgramError: a group does not lie in it
    """
    plate = structure.data_plates[0].name
    for group in groups:
        if active() is not None and group.plates[0].name != plate:
            raise ProgramError(
                f"({group.name}) are in the plates {[p.name for p in group.plates]}, outermost first, but ranks share "
                f"out the slices of {plate!r}, the outermost plate of the first observed site. What all ranks have in "
                "common can only be global: write that plate as an event (to_event), or run one process"
            )
    return plate


def _bring_together(
    ranks: SharedStep, loss: Any, model: Any, guide: Any, args: Any, kwargs: Any
) -> frozenset[tuple[str, int]]:
    """Run guide and model, so that all parameters are there, take over rank 0's, and say which they are."""
    with (
        poutine.block(),
        torch.no_grad(),
        preserved_buffers(),
        poutine.trace(param_only=True) as capture,
        torch.random.fork_rng(devices=[]),
    ):
        # An automatic guide makes its networks, unless it has been called before.
        run_guide(guide, args, kwargs)
        with recorded_modules() as modules:
            run_scored(model, run_guide(guide, args, kwargs), args, kwargs)
    parameters = _parameters(capture.trace)
    held = _buffers_of(modules)
    check_layout(ranks, [*_spoken(loss), *layout(parameters), *layout(held)])
    take_first(ranks, parameters | held)
    loss.load_state(ranks.agreed(_on_cpu(loss.state()), "taking over what rank 0 has estimated"))
    return _identities(parameters)


def _identities(parameters: Parameters) -> frozenset[tuple[str, int]]:
    return frozenset((name, id(p)) for name, p in parameters.items())


def _on_cpu(state: Any) -> Any:
    if isinstance(state, dict):
        return {name: _on_cpu(value) for name, value in state.items()}
    return state.cpu() if isinstance(state, Tensor) else state


def _spoken(loss: Any) -> list[str]:
    """A loss and those of its arguments that read alike in all processes."""
    plain = {
        name: value
        for name, value in loss.config().items()
        if isinstance(value, (str, int, float, tuple, type(None)))
    }
    return [type(loss).__name__, *(f"{name}={value!r}" for name, value in plain.items())]


def _parameters(trace: Trace) -> Parameters:
    """Parameters that a run met, by name."""
    found = {
        name: site["value"].unconstrained() for name, site in trace.nodes.items() if site["type"] == "param"
    }
    return {name: found[name] for name in sorted(found) if found[name] is not None}


def _buffers_of(modules: Iterable[nn.Module]) -> Parameters:
    """Floating buffers of modules, each with a name that is the same on all ranks."""
    return {
        f"buffer {key} of module {i}, a {type(module).__name__}": buffer
        for i, module in enumerate(modules)
        for key, buffer in module._buffers.items()
        if buffer is not None and buffer.is_floating_point()
    }


@contextmanager
def _watched_buffers() -> Iterator[Callable[[], Parameters]]:
    """Gives a function that tells which buffers of modules that ran inside have changed: the statistics of BatchNorm."""
    modules: dict[nn.Module, None] = {}
    seen: dict[int, tuple[Tensor, int]] = {}  # the tensors too, lest one dies and another gets its id

    def watch(module: nn.Module, _args: Any) -> None:
        if module not in modules:
            modules[module] = None
            seen.update({id(b): (b, b._version) for b in module._buffers.values() if b is not None})

    def changed() -> Parameters:
        # torch does not count the updates of these.
        normalising = [m for m in modules if isinstance(m, _NormBase) and m.training]
        statistics = {id(b) for module in normalising for b in module._buffers.values() if b is not None}
        return {
            name: buffer
            for name, buffer in _buffers_of(modules).items()
            if id(buffer) in statistics or id(buffer) not in seen or seen[id(buffer)][1] != buffer._version
        }

    hook = register_module_forward_pre_hook(watch)
    try:
        yield changed
    finally:
        hook.remove()
