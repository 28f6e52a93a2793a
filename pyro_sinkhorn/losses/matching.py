r"""Matching: how far the cloud a guide makes is from the cloud its prior makes.

Three steps: *clouds* (rows of latents), *gather* (those of all processes, :mod:`pyro_sinkhorn.losses.gathering`), *match*
(transport). The match of a group is normalised by the mean cost between two prior draws,

.. math:: S / \mathbb{E}\,c(Y, Y'),

so that it has no unit, and epsilon is ``relative_epsilon`` times the same number.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from pyro_sinkhorn.distributed import active
from pyro_sinkhorn.errors import NonFiniteError, ProgramError, is_number
from pyro_sinkhorn.losses.clouds import Cloud
from pyro_sinkhorn.ot.checks import Gradient, Value, check_variant
from pyro_sinkhorn.ot.cost import Cost, cost_matrix
from pyro_sinkhorn.ot.divergence import Debias, sinkhorn_divergence
from pyro_sinkhorn.ot.problem import ConvergenceWarning


@dataclass(frozen=True)
class MatchOptions:
    """How clouds are compared; see :class:`~pyro_sinkhorn.Trace_Sinkhorn` for the meaning of each."""

    debias: Debias = "independent"
    relative_epsilon: float = 0.1
    match_size: int = 64
    cost: Any = "sqeuclidean"
    tolerance: float = 1e-2
    max_iters: int = 500
    backend: str = "auto"
    value: Value = "entropic"
    gradient: Gradient = "envelope"

    def __post_init__(self) -> None:
        check_variant(self.value, self.gradient)
        if self.value != "entropic" and self.gradient == "envelope" and self.relative_epsilon != 0:
            raise ValueError(
                f"value={self.value!r} has no envelope gradient: give gradient='unrolled', or value='entropic'"
            )
        if not (is_number(self.relative_epsilon) and self.relative_epsilon >= 0):
            raise ValueError(
                f"relative_epsilon is {self.relative_epsilon!r}: expected a number of at least 0"
            )
        if self.relative_epsilon == 0 and self.gradient == "unrolled":
            raise ValueError("relative_epsilon=0 is an exact assignment, which has no iterations to unroll")
        if self.match_size < 1:
            raise ValueError(f"match_size is {self.match_size}: expected at least 1")
        if self.debias not in ("independent", "self", None):
            raise ValueError(f"debias is {self.debias!r}: expected 'independent', 'self' or None")

    def config(self) -> dict[str, Any]:
        """Arguments by name; not ``asdict``, which would copy a cost that learns."""
        return {option.name: getattr(self, option.name) for option in fields(self)}


@dataclass
class MatchState:
    """What is estimated once from the prior, detached, and stored with the program.

    units:      unit of length of each site's embedding
    mean_costs: mean prior-prior cost of each group
    """

    units: dict[str, Tensor] = field(default_factory=dict)
    mean_costs: dict[str, Tensor] = field(default_factory=dict)

    def load(self, saved: dict[str, Any]) -> None:
        """Take over saved estimates; other keys are left alone."""
        if "units" in saved:
            self.units, self.mean_costs = dict(saved["units"]), dict(saved["mean_costs"])

    def take_first(self) -> None:
        """Where several processes estimate, what the first one found is true for all."""
        ranks = active()
        if ranks is not None:
            held = [
                {name: value.cpu() for name, value in part.items()} for part in (self.units, self.mean_costs)
            ]
            self.units, self.mean_costs = ranks.agreed(held, "estimating units")


def mean_cost(cost: Cost, reference: Tensor) -> Tensor:
    """Mean cost between two prior draws, from the two halves of a reference cloud ``(n, e)``."""
    half = min(len(reference) // 2, 512)
    order = torch.randperm(len(reference), device=reference.device)
    first, second = reference[order[:half]], reference[order[half : 2 * half]]
    value = cost_matrix(cost, first.unsqueeze(0), second.unsqueeze(0)).mean()
    # A prior with no spread has nothing to normalise by.
    return value if bool(value > 0) else torch.ones_like(value)


def match(
    x: Cloud,
    y: Cloud,
    mean: Tensor,
    options: MatchOptions,
    *,
    group: str,
    paired: bool = False,
    warned: set[str] | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Normalised divergence between two clouds of a group, one value a particle.

    :param mean: mean cost within the reference cloud
    :param group: what the clouds are of, for errors: ``latent group (z)``
    :param paired: row i of both clouds shares covariates or weights, so no unit may be on both sides of a transport
    :param warned: what was already warned of, so that each warning comes once a group; None for no warnings
    :raises ProgramError: too few units to split
    :raises NonFiniteError: points, costs or potentials are NaN or infinite
    """
    ranks = active()
    if ranks is not None and generator is None:
        generator = ranks.generator  # all must make the same split
    n_units = x.points.shape[-2] if x.units is None else len(x.units.unique())
    match_size: int | None = options.match_size
    if options.debias == "independent":
        if n_units < 2:
            raise ProgramError(
                f"{group}: a batch of {n_units} cannot be split into two independent halves. Give at "
                "least 2 data a step (128 for the default match_size of 64), or debias='self'"
            )
        if n_units // 2 < options.match_size and _first_time(warned, f"small batch of {group}"):
            warnings.warn(
                f"{group}: a batch of {n_units} gives halves of {n_units // 2}, below match_size="
                f"{options.match_size}. The match depends on that size where the laws differ, so its weight means "
                f"something else for this batch; use batches of at least {2 * options.match_size}, or a smaller "
                "match_size throughout",
                UserWarning,
                stacklevel=2,
            )
    a = None if x.weights is None else _normalised(x.weights)
    b = None if y.weights is None else _normalised(y.weights)
    with warnings.catch_warnings():
        # Said below, once: far from the prior, as at the start of a training, every step would say it.
        warnings.simplefilter("ignore", ConvergenceWarning)
        try:
            result = sinkhorn_divergence(
                x.points,
                y.points,
                options.relative_epsilon * mean,
                a,
                b,
                cost=options.cost,
                debias=options.debias,
                value=options.value,
                gradient=options.gradient,
                match_size=match_size,
                units_x=x.units,
                units_y=y.units,
                shared_units=paired,
                candidates=None if x.states is None else x.states.points,
                tolerance=options.tolerance,
                max_iters=options.max_iters,
                backend=options.backend,
                generator=generator,
            )
        except NonFiniteError as error:
            raise NonFiniteError(
                f"{group}: transport between the guide's cloud x and the prior's y, of shape {tuple(x.points.shape)} and "
                f"{tuple(y.points.shape)}: {error}"
            ) from error
    stopped = options.tolerance > 0 and not bool(result.converged.all())
    if stopped and _first_time(warned, f"convergence of {group}"):
        warnings.warn(
            f"{group}: the transport stopped after {result.n_iters} iterations with a marginal error of "
            f"{float(result.marginal_error.max()):.2g}, above the tolerance {options.tolerance:.2g}. While the clouds "
            "are far apart this does little harm; if it lasts, raise relative_epsilon, max_iters or tolerance. "
            "This is said once",
            ConvergenceWarning,
            stacklevel=2,
        )
    value = result.value
    if x.states is not None and result.variation is not None:
        # To first order, what a change of the states' probabilities changes: of value zero, the drawn states are counted.
        moved = (x.states.probabilities * result.variation).sum((-2, -1))
        value = value + moved - moved.detach()
    return value / mean


def _first_time(warned: set[str] | None, what: str) -> bool:
    if warned is None or what in warned:
        return False
    warned.add(what)
    return True


def _normalised(weights: Tensor) -> Tensor:
    return weights / weights.sum()
