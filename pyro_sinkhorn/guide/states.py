"""Networks for discrete latents: a probability for every state, or a relaxation."""

from __future__ import annotations

import warnings
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_sinkhorn.distributions.finite import Finite, laid_out
from pyro_sinkhorn.errors import ProgramError
from pyro_sinkhorn.geometry.discrete import LOST_MASS, Boolean, Counts, Discrete, OneHot, lost_mass
from pyro_sinkhorn.geometry.registry import geometry_of
from pyro_sinkhorn.guide.encoder import perceptron

#: What AutoImplicit may do about discrete latents.
DISCRETE = ("enumerate", "straight_through")


#: A state that is impossible in this batch may be possible in the next: its log probability to start from.
_IMPOSSIBLE = -10.0


def key_of(name: str) -> str:
    """Key of a site among modules, which may be called neither ``a.b`` nor like a method of the dictionary (``type``)."""
    return "site_" + name.replace(".", "/")


class StateHead(nn.Module):
    r"""Code to a distribution over the states of one site, :math:`\mathrm{softmax}(\log p + h_\phi(x))`.

    It starts near the prior's own probabilities: those of the current call, datum by datum, for a site whose prior
    depends on no other local latent (so that it follows covariates), else those of the first call, averaged.

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
        self.mixed = perceptron(width, hidden, len(values)).to(**factory)
        self.register_buffer("values", values)
        self.register_buffer("log_prior", log_prior)

    def forward(self, code: Tensor, fn: Any, follow: bool = False) -> Finite:
        """``(..., width)`` to a distribution of batch shape ``(...)``; what a support that varies leaves out is impossible.

        :param fn: the prior of this call
        :param follow: whether to start from its probabilities
        """
        found = _log_prob(fn, self.values) if follow else None
        log_prior = self.log_prior if found is None else found.movedim(0, -1).clamp_min(_IMPOSSIBLE)
        raw, support = self.mixed(code), fn.support
        logits = log_prior.to(raw) + raw
        possible = support.check(laid_out(self.values, logits.dim() - 1))
        if not bool(possible.all()):
            logits = torch.where(possible.movedim(0, -1), logits, -torch.inf)
        return Finite(self.values, logits, support, validate_args=False)


def log_prior_of(fn: Any, values: Tensor) -> Tensor:
    """Log probabilities of the states, averaged over the batch of a prior; equal ones where it has no density."""
    log_prob = _log_prob(fn, values)
    if log_prob is None:
        return torch.zeros(len(values), device=values.device)
    log_prob = log_prob.reshape(len(values), -1)
    mean = log_prob.logsumexp(-1) - torch.tensor(float(log_prob.shape[-1])).log()
    return mean.clamp_min(_IMPOSSIBLE)


@torch.no_grad()
def _log_prob(fn: Any, values: Tensor) -> Tensor | None:
    """Log probabilities of the states under a prior, ``(S, *batch)``, detached; None where it has no density."""
    states = laid_out(values, len(fn.batch_shape))
    inside = fn.support.check(states)
    try:
        # Outside a support that varies along the batch, a feasible value is scored in place of the state.
        chosen = inside.reshape(*inside.shape, *[1] * len(fn.event_shape))
        log_prob = fn.log_prob(torch.where(chosen, states, states[:1]))
    except NotImplementedError:
        return None
    return log_prob.masked_fill(~inside, -torch.inf)


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
