r"""The energy score, a strictly proper scoring rule of samples, and the coordinates that latents are scored in.

.. math:: \mathrm{ES}(q, z^*) = \mathbb{E}\,\|e(z)-e(z^*)\|^\beta - \tfrac12\,\mathbb{E}\,\|e(z)-e(z')\|^\beta,
          \qquad z, z' \sim q,

whose expectation over :math:`z^* \sim p` is least for :math:`q = p` alone, :math:`0 < \beta < 2` (Székely and Rizzo 2013;
Gneiting and Raftery 2007). A guide that minimises it on simulated pairs is the posterior, averaged over the data that the
program simulates.

Distances that are small beside the prior's hardly count in it: a posterior a hundredth as wide as its prior is found slowly.
The same rule with :math:`\tfrac12\log(1+\|\cdot\|^2/h^2)`, of negative type as well, counts ratios of distances down to h,
and is added: a sum of strictly proper scores is one.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_sinkhorn.geometry.registry import geometry_of
from pyro_sinkhorn.guide.layout import columns_along
from pyro_sinkhorn.losses.clouds import blanked, rows
from pyro_sinkhorn.losses.matching import MatchState
from pyro_sinkhorn.losses.pairs import Pairs
from pyro_sinkhorn.structure import Plate, Site, plates_of


def energy_score(draws: Tensor, truth: Tensor, beta: float = 1.0, resolution: float | None = None) -> Tensor:
    r"""Unbiased estimate of the energy score from independent draws.

    .. math:: \frac1S\sum_s\|z_s - z^*\|^\beta - \frac{1}{2S(S-1)}\sum_{s\ne s'}\|z_s - z_{s'}\|^\beta

    :param draws: ``(S, ..., e)``, at least 2
    :param truth: ``(..., e)``
    :param beta: between 0 and 2, both excluded; at 2 it would see means only
    :param resolution: scale h of a logarithmic score that is added; None for the energy score alone
    :returns: ``(...)``
    :raises ValueError: fewer than 2 draws, or another beta

    >>> truth = torch.zeros(1000, 1)
    >>> wide, exact = torch.ones(2, 1000, 1), torch.zeros(2, 1000, 1)
    >>> bool(energy_score(exact, truth).mean() < energy_score(wide, truth).mean())
    True
    """
    if not 0 < beta < 2:
        raise ValueError(f"beta is {beta}: expected a number between 0 and 2, both excluded")
    n = len(draws)
    if n < 2:
        raise ValueError(f"{n} draws: the spread of a law needs at least 2")
    to_truth = distance(draws - truth, beta, resolution).mean(0)
    between = torch.zeros_like(to_truth)
    for shift in range(1, n // 2 + 1):
        # Every pair once: by half a turn each comes twice.
        share = 0.5 if 2 * shift == n else 1.0
        between = between + share * distance(draws - draws.roll(shift, 0), beta, resolution).sum(0)
    return to_truth - between / (n * (n - 1))


def expected_energy_score(
    states: Tensor,
    probabilities: Tensor,
    truth: Tensor,
    beta: float = 1.0,
    resolution: float | None = None,
) -> Tensor:
    r"""The energy score of a law on finitely many states: for two, half a Brier score.

    :param states: embedded, ``(S, e)``
    :param probabilities: ``(..., S)``
    :param truth: embedded, ``(..., e)``
    :returns: ``(...)``, exact

    >>> states = torch.eye(2)
    >>> expected_energy_score(states, torch.tensor([0.25, 0.75]), states[1])
    tensor(0.0884)
    """
    to_truth = (probabilities * distance(states - truth.unsqueeze(-2), beta, resolution)).sum(-1)
    between = distance(states.unsqueeze(0) - states.unsqueeze(1), beta, resolution)
    return to_truth - 0.5 * torch.einsum("...s,st,...t->...", probabilities, between, probabilities)


def distance(difference: Tensor, beta: float, resolution: float | None) -> Tensor:
    """What the score takes for the distance, from differences ``(..., e)``; its gradient at 0 is 0."""
    square = difference.square().sum(-1)
    tiny = torch.finfo(square.dtype).tiny ** 0.5
    power = (square + tiny).pow(beta / 2)
    return power if resolution is None else power + 0.5 * (square / resolution**2).log1p()


class ScoringCoordinates:
    """Columns that latents are scored in: embedded, in the prior's unit, or relative to their prior given its parents.

    The second is right for a site whose parents are given: their truth then is a constant of the conditional law.
    """

    def __init__(self) -> None:
        self.state = MatchState()

    def columns(
        self,
        name: str,
        site: Site,
        value: Tensor,
        plates: tuple[Plate, ...],
        pairs: Pairs,
        relative: bool,
    ) -> Tensor:
        """Rows ``(num, n, e)`` of values ``(..., P, *batch, *event)``, all that is left of the plates being ``num``.

        :param site: the node of a plain run, whose plates and masks are the pairs'
        """
        geometry = geometry_of(site["fn"], name)
        if relative:
            loc, scale = pairs.moments[name]
            columns = (geometry.flatten(value) - loc) / scale
        else:
            columns = geometry.embed(value)
        batch = columns.shape[:-1]
        lead = batch[: len(batch) - pairs.nesting]
        num = int(torch.Size(lead).numel())
        columns = columns.reshape(num, *batch[len(lead) :], columns.shape[-1])
        own = {plate.name for plate in plates_of(site)}
        if not own <= {plate.name for plate in plates}:
            # Another plate, of a global vector say, may lie at the dimension of one of these.
            shared = tuple(plate for plate in plates if plate.name in own)
            columns = columns_along(columns, shared, pairs.nesting)
        laid_out = rows(columns, num, plates)
        if plates:
            laid_out = blanked(laid_out, site, plates, laid_out.new_zeros(()))
        if not relative and name in self.state.units:
            centre = self.state.units.get(f"centre of {name}")
            laid_out = laid_out if centre is None else laid_out - centre.to(laid_out)
            laid_out = geometry.finish(
                laid_out / self.state.units[name].to(laid_out), heavy=centre is not None
            )
        return laid_out

    @torch.no_grad()
    def estimate(
        self,
        blocks: Mapping[str, tuple[tuple[str, ...], tuple[Plate, ...]]],
        nodes: Mapping[str, Site],
        pairs: Pairs,
        relative: frozenset[str],
        beta: float,
        resolution: float | None,
    ) -> None:
        """Units of all sites and the score of the prior for every block, from simulated pairs, once."""
        for key, (names, plates) in blocks.items():
            if key in self.state.mean_costs:
                continue
            for name in names:
                if name in relative or name in self.state.units:
                    continue
                pooled = self.columns(name, nodes[name], pairs.values[name], plates, pairs, False).flatten(
                    0, 1
                )
                geometry = geometry_of(nodes[name]["fn"], name)
                unit, centre = geometry.unit(pooled), geometry.tails(pooled)
                self.state.units[name] = unit
                if centre is not None:
                    self.state.units[f"centre of {name}"] = centre
            joint = torch.cat(
                [
                    self.columns(n, nodes[n], pairs.values[n], plates, pairs, n in relative).flatten(0, 1)
                    for n in names
                ],
                -1,
            )
            # Shifted, so that no row meets itself.
            order = torch.randperm(len(joint), device=joint.device)
            joint = joint[order]
            other = joint.roll(1, 0)
            score = 0.5 * distance(joint - other, beta, resolution).mean()
            # A prior with no spread has nothing to be measured by.
            varies = bool((joint != joint[:1]).any())
            self.state.mean_costs[key] = score if varies else torch.ones_like(score)
