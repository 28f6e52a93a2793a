"""Guides with a density for global latents: there is one of each, so no cloud to match."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import biject_to

from pyro_sinkhorn.errors import ProgramError
from pyro_sinkhorn.structure import Site


class NormalGlobal(PyroModule):
    r"""Normal in the unconstrained space of the support: :math:`z = T(\mathrm{loc} + \mathrm{scale}\,\epsilon)`.

    :param draws: prior draws ``(k, ...)``; their median in unconstrained space is the start
    """

    def __init__(self, name: str, site: Site, draws: Tensor, init_scale: float = 0.1) -> None:
        super().__init__()
        self.site_name = name
        self.event_dim = site["fn"].event_dim
        loc = _unconstrained(name, site, draws).median(0).values
        self.base_event_dim = loc.dim() - (draws.dim() - 1 - self.event_dim)
        self.loc = torch.nn.Parameter(loc)
        self.scale = PyroParam(torch.full_like(loc, init_scale), constraint=constraints.softplus_positive)

    def forward(self, fn: Any) -> Tensor:
        """Sample the site; the support is read off the model's current distribution."""
        base = dist.Normal(self.loc, cast(Tensor, self.scale)).to_event(self.base_event_dim)
        return pyro.sample(self.site_name, dist.TransformedDistribution(base, [biject_to(fn.support)]))


class DeltaGlobal(PyroModule):
    """A point, learned in the unconstrained space: maximum a posteriori for the site."""

    def __init__(self, name: str, site: Site, draws: Tensor) -> None:
        super().__init__()
        self.site_name = name
        self.event_dim = site["fn"].event_dim
        self.loc = torch.nn.Parameter(_unconstrained(name, site, draws).median(0).values)

    def forward(self, fn: Any) -> Tensor:
        """Sample the site."""
        return pyro.sample(
            self.site_name, dist.Delta(biject_to(fn.support)(self.loc), event_dim=self.event_dim)
        )


GLOBAL_GUIDES: dict[str, Callable[..., PyroModule]] = {"normal": NormalGlobal, "delta": DeltaGlobal}


def _unconstrained(name: str, site: Site, draws: Tensor) -> Tensor:
    support = site["fn"].support
    if getattr(support, "is_discrete", False):
        raise ProgramError(
            f"global latent {name!r} is a {type(site['fn']).__name__} with the discrete support {support}: AutoImplicit "
            "makes guides for continuous globals. Marginalise it, or write the guide by hand"
        )
    return biject_to(support).inv(draws.detach())
