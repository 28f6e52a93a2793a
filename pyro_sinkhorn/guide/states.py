"""Networks for discrete latents: a probability for every state, or a relaxation."""

from __future__ import annotations

import warnings
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_sinkhorn.distributions.finite import Finite
from pyro_sinkhorn.errors import ProgramError
from pyro_sinkhorn.geometry.discrete import LOST_MASS, Boolean, Counts, Discrete, OneHot, lost_mass
from pyro_sinkhorn.geometry.registry import geometry_of

#: What AutoImplicit may do about discrete latents.
DISCRETE = ("enumerate", "straight_through")


class StateHead(nn.Module):
    r"""Code to a distribution over the states of one site, :math:`\mathrm{softmax}(\log p + h_\phi(x))`.

    It starts near the prior's own probabilities.

    :param values: the states, ``(S, *event_shape)``
    :param log_prior: log probabilities to start from, ``(S,)``
    :param factory: device and dtype of the network; those of the states are the site's
    """

    values: Tensor
    log_prior: Tensor

    def __init__(
        self, width: int, values: Tensor, log_prior: Tensor, hidden: int, factory: dict[str, Any]
    ) -> None:
        super().__init__()
        self.mixed = nn.Sequential(
            nn.Linear(width, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, len(values)),
        )
        self.mixed.to(**factory)
        self.register_buffer("values", values)
        self.register_buffer("log_prior", log_prior)

    def forward(self, code: Tensor, support: Any) -> Finite:
        """``(..., width)`` to a distribution of batch shape ``(...)``."""
        return Finite(self.values, self.log_prior + self.mixed(code), support, validate_args=False)


@torch.no_grad()
def log_prior_of(fn: Any, values: Tensor) -> Tensor:
    """Log probabilities of the states, averaged over the batch of a prior; equal ones where it has no density."""
    states = values.reshape(len(values), *(1,) * len(fn.batch_shape), *values.shape[1:])
    try:
        log_prob = fn.log_prob(states).reshape(len(values), -1)
    except NotImplementedError:
        return torch.zeros(len(values), device=values.device)
    mean = log_prob.logsumexp(-1) - torch.tensor(float(log_prob.shape[-1])).log()
    # A state that is impossible in this batch may be possible in the next.
    return mean.clamp_min(-10.0)


def relaxed(name: str, geometry: Discrete, logits: Tensor, temperature: float) -> Any:
    """Hard values with the gradient of a softmax or sigmoid (Bengio et al. 2013; Jang et al. 2017).

    :raises ProgramError: the values of the site are labels or counts, through which no gradient passes
    """
    heat = torch.as_tensor(temperature, dtype=logits.dtype, device=logits.device)
    if isinstance(geometry, Boolean):
        switches = dist.RelaxedBernoulliStraightThrough(heat, logits=geometry.unflatten(logits))
        return switches.to_event(len(geometry.event_shape))
    if isinstance(geometry, OneHot):
        vectors = dist.RelaxedOneHotCategoricalStraightThrough(heat, logits=geometry.unflatten(logits))
        return vectors.to_event(len(geometry.event_shape) - 1)
    raise ProgramError(
        f"discrete latent {name!r} has integer values, through which no gradient passes: discrete='straight_through' serves "
        "Bernoulli and OneHotCategorical. Write a Categorical as OneHotCategorical, or leave discrete='enumerate' and use "
        "TraceEnum_Sinkhorn"
    )


def mass_beyond(name: str, fn: Any, values: Tensor, warned: set[str]) -> dict[str, float]:
    """Prior mass beyond the states of a count, by site; nothing for sites whose states are all there are.

    :param warned: names of sites that were warned of
    """
    if not isinstance(geometry_of(fn, name), Counts):
        return {}
    lost = lost_mass(fn, values)
    if lost > 100 * LOST_MASS and name not in warned:
        warned.add(name)
        warnings.warn(
            f"discrete latent {name!r}: the guide's states end at {int(values.max())}, beyond which the prior has {lost:.2g} "
            "of its mass. Start from a prior as wide as it will get, at most some 60. This is said once",
            UserWarning,
            stacklevel=2,
        )
    return {name: lost}
