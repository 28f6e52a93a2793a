r"""A nonlinear state space: a Van der Pol oscillator with random kicks, whose position is seen through noise.

The state is :math:`z=(\text{position}, \text{velocity})`, and without noise it obeys

.. math:: \dot z^{(1)} = z^{(2)}, \qquad \dot z^{(2)} = \mu\,(1 - (z^{(1)})^2)\,z^{(2)} - z^{(1)},

an oscillator that is driven where its position is small and damped where it is large, so that all paths wind onto one
cycle of amplitude about 2 and, at :math:`\mu=1`, of period about 6.7.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from torch import Tensor

Model = Callable[[Tensor], None]

#: Squared position from which the damping grows no further, beyond the cycle's 4: a guide that is still far off would
#: otherwise be met by a transition too stiff for its solver.
CAP = 9.0


def state_space(
    num_steps: int = 50,
    damping: float = 1.0,
    *,
    interval: float = 0.2,
    state_noise: float = 0.1,
    obs_noise: float = 0.3,
    learn: bool = False,
) -> Model:
    r"""Paths of a kicked Van der Pol oscillator, a datum a path:

    .. math::

        z_0 \sim N(0, I), \quad z_t \sim N(\Phi(z_{t-1}), \sigma_z^2 I), \quad x_t \sim N(z_t^{(1)}, \sigma_x^2),
        \qquad t = 0, \dots, T-1,

    with :math:`\Phi` the deterministic motion over one ``interval``, :func:`van_der_pol_step`. Sites are ``z_0``,
    ``x_0``, ``z_1``, ... in the plate ``data``; each depends on its predecessor alone (``pyro.markov``).

    :param num_steps: length :math:`T` of a path
    :param damping: :math:`\mu`
    :param interval: time between two steps
    :param state_noise: :math:`\sigma_z`, of every step
    :param obs_noise: :math:`\sigma_x`
    :param learn: make ``damping``, ``state_noise`` and ``obs_noise`` positive parameters, which start at these values;
        otherwise they are known
    :returns: a model of observed paths ``x``, ``(n, num_steps, 1)``
    :raises ValueError: by the model, for data of another shape

    Van der Pol 1926, *On relaxation-oscillations*; such paths are a usual test of nonlinear smoothers, Särkkä 2013,
    *Bayesian filtering and smoothing*. :func:`simulate_state_space` draws paths together with their states.

    >>> z, x = simulate_state_space(5, num_steps=8)
    >>> state_space(num_steps=8)(x)
    """

    def model(x: Tensor) -> None:
        if tuple(x.shape[1:]) != (num_steps, 1):
            raise ValueError(
                f"x has shape {tuple(x.shape)}: expected (n, {num_steps}, 1), paths of num_steps={num_steps} positions"
            )
        start = {"damping": damping, "state_noise": state_noise, "obs_noise": obs_noise}
        if learn:
            mu, kick, blur = (
                pyro.param(name, x.new_tensor(value), constraint=constraints.positive)
                for name, value in start.items()
            )
        else:
            mu, kick, blur = (x.new_tensor(value) for value in start.values())
        mean, scale = x.new_zeros(2), x.new_ones(())
        with pyro.plate("data", len(x)):
            for t in pyro.markov(range(num_steps)):
                z = pyro.sample(f"z_{t}", dist.Normal(mean, scale).to_event(1))
                pyro.sample(f"x_{t}", dist.Normal(z[..., :1], blur).to_event(1), obs=x[:, t])
                mean, scale = van_der_pol_step(z, mu, interval), kick

    return model


def van_der_pol_step(z: Tensor, damping: Tensor | float = 1.0, interval: float = 0.2) -> Tensor:
    """States one ``interval`` later, without noise: a step of the classical Runge-Kutta method of order 4.

    :param z: position and velocity, ``(..., 2)``
    :returns: the same shape

    >>> van_der_pol_step(torch.tensor([2.0, 0.0])).numpy().round(3).tolist()
    [1.967, -0.3]
    """

    def velocity(z: Tensor) -> Tensor:
        position, speed = z.unbind(-1)
        friction = damping * (1 - position.square().clamp_max(CAP))
        return torch.stack([speed, friction * speed - position], -1)

    k1 = velocity(z)
    k2 = velocity(z + interval / 2 * k1)
    k3 = velocity(z + interval / 2 * k2)
    k4 = velocity(z + interval * k3)
    return z + interval / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


@torch.no_grad()
def simulate_state_space(
    num_paths: int, num_steps: int = 50, seed: int = 0, **options: Any
) -> tuple[Tensor, Tensor]:
    """Paths of :func:`state_space`: states ``z``, ``(num_paths, num_steps, 2)``, and what is seen of them, ``x``,
    ``(num_paths, num_steps, 1)``.

    The global random state is left as it was.

    :param seed: same seed, same paths
    :param options: further arguments of :func:`state_space`

    >>> z, x = simulate_state_space(3, num_steps=4, obs_noise=0.01)
    >>> z.shape, bool((z[..., :1] - x).abs().max() < 0.1)
    (torch.Size([3, 4, 2]), True)
    """
    program = poutine.uncondition(state_space(num_steps, **options))
    with torch.random.fork_rng(devices=[]), poutine.block():
        torch.manual_seed(seed)
        sites = poutine.trace(program).get_trace(torch.empty(num_paths, num_steps, 1)).nodes
    z, x = ([sites[f"{name}_{t}"]["value"] for t in range(num_steps)] for name in "zx")
    return torch.stack(z, 1), torch.stack(x, 1)
