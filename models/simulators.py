r"""Two simulators without a likelihood, as programs: stochastic predators and prey, and the g-and-k law.

Each function returns a plain Pyro program of data ``x``, in which the simulator's output stands as ``Implicit``: it can
be run but not scored. Its parameters are ``pyro.param``, and the arguments of the function are where they start::

    data = SinkhornProgram(g_and_k(3.0, 1.0, 2.0, 0.5)).generate(1, torch.empty(10_000, 1))["x"][0]
    SinkhornProgram(g_and_k(), loss=Trace_DataSinkhorn()).fit(data)     # from a guess that is wrong

The random numbers that drive a simulator are a sample site in the data plate, standard normal whatever the parameters:
data are independent of each other, and gradients flow through the path that a fixed noise takes.
"""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.nn.functional import softplus

from pyro_sinkhorn.distributions import Implicit

Model = Callable[[Tensor], None]

#: Population below which the path of a species is bent away from zero, in individuals.
FLOOR = 0.25


def lotka_volterra(
    birth: float = 0.5,
    predation: float = 0.01,
    death: float = 0.3,
    *,
    start: tuple[float, float] = (50.0, 100.0),
    num_times: int = 8,
    interval: float = 1.0,
    substeps: int = 10,
) -> Model:
    r"""Predators and prey observed at ``num_times`` times, by :func:`simulate_lotka_volterra`.

    A datum is a trajectory: the columns of ``x`` are :math:`\log(1+\text{prey})` at every time, then
    :math:`\log(1+\text{predators})`. The logarithm, because populations vary over two orders of magnitude and their
    noise with them: on the scale of counts the few largest peaks would make most of the distance between trajectories.
    The one added keeps it finite where a species has all but died out.

    The three rates, per unit of time, are parameters ``birth``, ``predation`` and ``death``, kept positive. Rates of
    (1, .005, .6) from 50 prey and 100 predators are the usual test (Wilkinson 2018); the default start is twice off.

    :param birth, predation, death: where the rates start
    :param start: prey and predators at time 0, known
    :param num_times: observations of each species
    :param interval: time between them
    :param substeps: steps of the solver in an interval

    >>> from pyro_sinkhorn import SinkhornProgram
    >>> truth = SinkhornProgram(lotka_volterra(1.0, 0.005, 0.6))
    >>> truth.generate(1, torch.empty(100, 16), seed=0)["x"].shape
    torch.Size([1, 100, 16])
    """

    def model(x: Tensor) -> None:
        rates = (
            pyro.param("birth", x.new_tensor(birth), constraint=constraints.positive),
            pyro.param("predation", x.new_tensor(predation), constraint=constraints.positive),
            pyro.param("death", x.new_tensor(death), constraint=constraints.positive),
        )
        with pyro.plate("data", len(x)):
            standard = dist.Normal(x.new_zeros(num_times * substeps, 3), 1.0).to_event(2)
            noise = pyro.sample("noise", standard)
            paths = simulate_lotka_volterra(*rates, noise, start, interval / substeps)
            seen = paths[..., substeps - 1 :: substeps, :].log1p()
            pyro.sample("x", Implicit(seen.mT.flatten(-2), event_dim=1), obs=x)

    return model


def simulate_lotka_volterra(
    birth: Tensor,
    predation: Tensor,
    death: Tensor,
    noise: Tensor,
    start: tuple[float, float] = (50.0, 100.0),
    step: float = 0.1,
) -> Tensor:
    r"""Paths of prey and predators, ``(..., steps, 2)``, from standard normal ``noise``, ``(..., steps, 3)``.

    The chemical Langevin equation (Gillespie 2000; Wilkinson 2018, *Stochastic modelling for systems biology*,
    section 8.3) of three reactions, prey is born, prey is eaten and a predator born of it, predator dies:

    .. math::

        dX &= \alpha X\,dt - \beta XY\,dt + \sqrt{\alpha X}\,dW_1 - \sqrt{\beta XY}\,dW_2 \\
        dY &= \beta XY\,dt - \delta Y\,dt + \sqrt{\beta XY}\,dW_2 - \sqrt{\delta Y}\,dW_3

    It is solved by Euler–Maruyama with two changes, of the order of the step's own error, that keep populations
    positive. Losses are taken implicitly, as a division: :math:`X'=(X+\alpha X h+\dots)/(1+\beta Y h)`, which no rate
    can overshoot (Patankar 1980; Burchard et al. 2003). What noise alone would push below zero is bent back by a
    softplus of width a quarter of an individual: unlike a clamp it passes a gradient on everywhere, and from a few
    individuals up it is the identity.

    :param start: prey and predators at time 0
    :param step: length of a step, the sum of which is the time simulated

    >>> rates = torch.tensor([1.0, 0.005, 0.6])
    >>> simulate_lotka_volterra(*rates, torch.randn(7, 20, 3)).shape
    torch.Size([7, 20, 2])
    """
    prey, predators = noise.new_tensor(start).expand(*noise.shape[:-2], 2).unbind(-1)
    path = []
    for kicks in (noise * step**0.5).unbind(-2):
        w_birth, w_eaten, w_death = kicks.unbind(-1)
        born, eaten, dead = birth * prey, predation * prey * predators, death * predators
        exchange = eaten.sqrt() * w_eaten
        more_prey = born * step + born.sqrt() * w_birth - exchange
        more_predators = eaten * step + exchange - dead.sqrt() * w_death
        # Both right-hand sides are of the state before the step.
        loss = predation * predators
        prey = _positive((prey + more_prey) / (1 + loss * step))
        predators = _positive((predators + more_predators) / (1 + death * step))
        path.append(torch.stack([prey, predators], -1))
    return torch.stack(path, -2)


def _positive(population: Tensor) -> Tensor:
    return FLOOR * softplus(population / FLOOR)


def g_and_k(a: float = 1.5, b: float = 2.0, g: float = 1.0, k: float = 1.0) -> Model:
    r"""Draws of the g-and-k law, defined by its quantiles alone; ``x`` has shape ``(n, 1)``.

    Its parameters are ``a`` (location), ``b`` (scale, positive), ``g`` (skewness) and ``k`` (weight of the tails, above
    -1/2); (3, 1, 2, .5) is the usual test. :func:`g_and_k_quantile` has the formula.

    :param a, b, g, k: where the parameters start; the default is off by half to twice the usual truth

    >>> from pyro_sinkhorn import SinkhornProgram
    >>> x = SinkhornProgram(g_and_k(3.0, 1.0, 2.0, 0.5)).generate(1, torch.empty(10_001, 1), seed=0)["x"][0]
    >>> round(x.median().item(), 1)  # the median of the law is a
    3.0
    """

    def model(x: Tensor) -> None:
        location = pyro.param("a", x.new_tensor(a))
        scale = pyro.param("b", x.new_tensor(b), constraint=constraints.positive)
        skewness = pyro.param("g", x.new_tensor(g))
        tails = pyro.param("k", x.new_tensor(k), constraint=constraints.greater_than(-0.5))
        with pyro.plate("data", len(x)):
            noise = pyro.sample("noise", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            draw = g_and_k_quantile(location, scale, skewness, tails, noise)
            pyro.sample("x", Implicit(draw, event_dim=1), obs=x)

    return model


def g_and_k_quantile(a: Tensor, b: Tensor, g: Tensor, k: Tensor, z: Tensor, c: float = 0.8) -> Tensor:
    r"""Quantile of the g-and-k law at the level of which ``z`` is the standard normal quantile.

    .. math:: Q(z) = a + b\,\Bigl(1 + c\,\frac{1-e^{-gz}}{1+e^{-gz}}\Bigr)\,(1+z^2)^k\,z

    Put a normal draw in for ``z`` and it is a draw of the law (Rayner and MacGillivray 2002, *Numerical maximum
    likelihood estimation for the g-and-k and generalized g-and-h distributions*). The density needs the inverse,
    which has no closed form.

    >>> a, b, g, k = torch.tensor([3.0, 1.0, 2.0, 0.5])
    >>> g_and_k_quantile(a, b, g, k, torch.tensor([-1.0, 0.0, 1.0]))
    tensor([2.4474, 3.0000, 5.2759])
    """
    # The fraction is a hyperbolic tangent, which does not overflow.
    return a + b * (1 + c * torch.tanh(g * z / 2)) * (1 + z.square()) ** k * z
