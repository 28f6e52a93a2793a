r"""An epidemic that is run, person by person in law, and has no likelihood: stochastic SIR with incomplete reporting."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_sinkhorn.distributions import Implicit

Model = Callable[[Tensor], None]


def epidemic(
    population: int = 10_000, infected: int = 20, num_weeks: int = 12, days_a_week: int = 7
) -> Model:
    r"""Reported cases of an outbreak, week by week, in a closed population:

    .. math::

        R_0 \sim \mathrm{LogNormal}(\log 2, 0.4), \quad D \sim \mathrm{LogNormal}(\log 6, 0.3), \quad
        \rho \sim \mathrm{Beta}(2, 3),

    the number that one case infects in a susceptible population, the mean number of days it is infectious, and the share
    of infections that is reported. :func:`simulate_epidemic` runs the outbreak; its path sums out to no likelihood that could
    be computed, so the observation is ``Implicit``.

    A datum is one outbreak. The columns of ``x`` are :math:`\log(1 + \text{reported cases})` of every week: the noise of
    counts grows with them, and their logarithm is what an encoder reads well.

    :param population: people, N
    :param infected: of these, infected at the start
    :param num_weeks: weeks observed
    :param days_a_week: steps in each
    :returns: a model of outbreaks ``x``, ``(n, num_weeks)``, with latents ``r0``, ``days`` and ``reported`` in the plate
        ``outbreaks``, ``(n,)``

    Kermack and McKendrick 1927, *A contribution to the mathematical theory of epidemics*; Bailey 1975, *The mathematical
    theory of infectious diseases*.

    >>> epidemic()(torch.zeros(3, 12))
    """

    def model(x: Tensor) -> None:
        with pyro.plate("outbreaks", len(x)):
            r0 = pyro.sample("r0", dist.LogNormal(x.new_tensor(2.0).log(), 0.4))
            days = pyro.sample("days", dist.LogNormal(x.new_tensor(6.0).log(), 0.3))
            reported = pyro.sample("reported", dist.Beta(x.new_tensor(2.0), 3.0))
            with torch.no_grad():
                cases = simulate_epidemic(r0, days, reported, population, infected, num_weeks * days_a_week)
            weeks = cases.unflatten(-1, (num_weeks, days_a_week)).sum(-1)
            pyro.sample("x", Implicit(weeks.log1p(), event_dim=1), obs=x)

    return model


def simulate_epidemic(
    r0: Tensor,
    days: Tensor,
    reported: Tensor,
    population: int = 10_000,
    infected: int = 20,
    num_days: int = 84,
) -> Tensor:
    r"""Reported cases day by day, ``(..., num_days)``, of outbreaks with these parameters, ``(...)`` each.

    The chain-binomial SIR epidemic with a step of a day. From S susceptible and I infectious people,

    .. math::

        \text{infections} &\sim \mathrm{Binomial}\bigl(S,\ 1-e^{-R_0 I/(D N)}\bigr) \\
        \text{recoveries} &\sim \mathrm{Binomial}\bigl(I,\ 1-e^{-1/D}\bigr) \\
        \text{reports} &\sim \mathrm{Binomial}(\text{infections},\ \rho).

    All outbreaks run side by side, each with random numbers of its own.

    >>> torch.manual_seed(0)
    <torch._C.Generator object at ...>
    >>> simulate_epidemic(torch.tensor([1.5, 3.0]), torch.tensor(6.0), torch.tensor(0.5)).shape
    torch.Size([2, 84])
    """
    r0, days, reported = torch.broadcast_tensors(r0, days, reported)
    susceptible = torch.full_like(r0, float(population - infected))
    infectious = torch.full_like(r0, float(infected))
    recovery = -torch.expm1(-1 / days)
    reports = []
    for _ in range(num_days):
        infection = -torch.expm1(-r0 / days * infectious / population)
        infections = torch.binomial(susceptible, infection)
        recoveries = torch.binomial(infectious, recovery)
        susceptible = susceptible - infections
        infectious = infectious + infections - recoveries
        reports.append(torch.binomial(infections, reported.contiguous()))
    return torch.stack(reports, -1)
