"""Networks that nobody trains: modules that ran but whose parameters Pyro has never been told of."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyro import poutine
from torch import nn

from pyro_sinkhorn.reachable import find_modules
from pyro_sinkhorn.runs import before_every_module, preserved_buffers
from pyro_sinkhorn.scoring import run_guide, run_scored


@contextmanager
def recorded_modules() -> Iterator[dict[nn.Module, None]]:
    """Every module whose forward runs inside, in order."""
    called: dict[nn.Module, None] = {}

    def record(module: nn.Module, _args: Any) -> None:
        called[module] = None

    with before_every_module(record):
        yield called


def warn_of_untrained(
    model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Run guide and model once, and warn of modules that ran, have parameters to learn, and are in no param site.

    ``SVI`` trains what the param store holds. A network used without ``pyro.module``, or under a name that another
    one took before, keeps its random weights, and nothing else would say so.
    """
    with (
        poutine.block(),
        torch.no_grad(),
        preserved_buffers(),
        torch.random.fork_rng(devices=[]),
        recorded_modules() as called,
    ):
        guide_trace = run_guide(guide, args, kwargs)
        traces = [guide_trace, run_scored(model, guide_trace, args, kwargs)]
    known = {
        id(parameter)
        for trace in traces
        for site in trace.nodes.values()
        if site["type"] == "param"
        for parameter in (site["value"], getattr(site["value"], "unconstrained", lambda: None)())
    }
    orphans = [
        module
        for module in called
        if any(p is not None and p.requires_grad and id(p) not in known for p in module._parameters.values())
    ]
    if not orphans:
        return
    names = {
        id(part): name
        for source in (model, guide)
        for name, root in find_modules(source).items()
        for part in root.modules()
    }
    described = sorted({names.get(id(module), type(module).__name__) for module in orphans})
    warnings.warn(
        f"the networks {described} ran but SVI will never train them: they are not registered with Pyro, or a module of "
        f"an earlier run holds their names in the parameter store. Call pyro.module({described[0]!r}, {described[0]}) "
        "in the model or the guide that uses it; for names already taken, pyro.clear_param_store() before the first "
        "step, or a SinkhornProgram, which has a store of its own",
        UserWarning,
        stacklevel=4,
    )
