r"""The states a guide enumerated: how likely each is, one drawn for every datum, and latents at any of them.

Pyro enumerates a discrete site by giving it a tensor dimension of its own, left of all plates, along which its value
runs through the support; whatever depends on it inherits the dimension. Here such tensors are read in two ways.
The likelihood is averaged over all states with their probabilities,

.. math:: \mathbb{E}_{q(k\mid x)} \log p(x\mid k) = \sum_k q(k\mid x)\log p(x\mid k),

while a cloud holds **one drawn state** a datum: a cloud of states weighted by their probabilities would fluctuate less
than one drawn from the prior, and differ from it where the laws agree.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import pyro.distributions as dist
import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_sinkhorn.errors import NonFiniteError, ProgramError
from pyro_sinkhorn.structure import Site, Structure, is_latent, plates_of, refuse_inner_plates, sample_sites


class ImpossibleStateError(NonFiniteError):
    """The likelihood rules out a state that the guide allows: its own cause, where other infinities have one upstream."""


@dataclass(frozen=True)
class EnumeratedSite:
    """A discrete site of a guide: its dimension, counted from the right among batch dimensions, and log probabilities.

    log_prob:  of all states, given those of earlier sites: their dimensions, its own and the plates
    """

    name: str
    dim: int
    size: int
    log_prob: Tensor
    plates: frozenset[str]


@dataclass(frozen=True)
class JointStates:
    """All joint states of some enumerated sites, in one dimension.

    dims:    dimensions that are joined, and their sizes
    rank:    batch dimensions of a tensor with all enumeration dimensions
    nesting: those that are plates
    """

    dims: dict[int, int]
    rank: int
    nesting: int

    @property
    def count(self) -> int:
        """How many there are."""
        return math.prod(self.dims.values())

    def at_all(self, value: Tensor, event_dim: int) -> Tensor:
        """``(count, *plates, *event)`` of a tensor that may have any of the dimensions."""
        value = value.reshape((1,) * (self.rank + event_dim - value.dim()) + value.shape)
        shape = list(value.shape)
        for dim, size in self.dims.items():
            shape[dim - event_dim] = size
        return value.expand(shape).reshape(self.count, *shape[self.rank - self.nesting :])


@dataclass
class Enumeration:
    """What a guide enumerated, and one state drawn for every datum.

    sites:    in the order of the guide
    nesting:  batch dimensions that are plates, the particles' included
    trace:    the model's run at all states
    drawn:    index of the drawn state of every site, laid out like its plates
    """

    sites: tuple[EnumeratedSite, ...]
    nesting: int
    trace: Trace
    drawn: dict[str, Tensor] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """Batch dimensions of a tensor that has all of them."""
        return max([self.nesting, *(-site.dim for site in self.sites)])

    def draw(self) -> None:
        """Draw a state of every site, given those drawn of the sites before it.

        :raises NonFiniteError: their probabilities are NaN
        """
        with torch.no_grad():
            for site in self.sites:
                log_prob = self.pick(site.log_prob.detach(), 0, keep=site)
                # All other enumeration dimensions now have size one.
                logits = log_prob.movedim(len(log_prob.shape) + site.dim, -1)
                if bool(logits.isnan().any()):
                    raise NonFiniteError(
                        f"guide site {site.name!r}: the probabilities of its {site.size} states are NaN (shape "
                        f"{tuple(site.log_prob.shape)}); look for a diverged encoder (lower the learning rate, clip gradients)"
                    )
                index = torch.distributions.Categorical(logits=logits, validate_args=False).sample()
                self.drawn[site.name] = index.reshape(index.shape[max(index.dim() - self.nesting, 0) :])

    def pick(self, value: Tensor, event_dim: int, keep: EnumeratedSite | None = None) -> Tensor:
        """A value at the drawn states, its enumeration dimensions taken away.

        :param keep: a site whose dimension stays; then all dimensions stay, of size one
        """
        for site in self.sites:
            axis = value.dim() + site.dim - event_dim
            if keep is site or axis < 0 or value.shape[axis] == 1:
                continue
            index = self.drawn[site.name]
            index = index.reshape(index.shape + (1,) * event_dim)
            shape = list(torch.broadcast_shapes(value.narrow(axis, 0, 1).shape, index.shape))
            value = value.expand([value.shape[axis] if i == axis else size for i, size in enumerate(shape)])
            value = value.gather(axis, index.expand(shape))
        if keep is not None:
            return value
        return value.reshape(value.shape[max(value.dim() - self.nesting - event_dim, 0) :])

    def at_drawn(self, trace: Trace) -> Trace:
        """A trace with all its latents at the drawn states."""
        picked = trace.copy()
        for name, site in sample_sites(trace):
            if is_latent(site):
                picked.nodes[name] = {**site, "value": self.pick(site["value"], site["fn"].event_dim)}
        return picked

    def joint(self, tensors: Iterable[tuple[Tensor, int]]) -> tuple[JointStates, list[EnumeratedSite]]:
        """The states that some tensors depend on, those that these depend on included.

        :param tensors: each with its number of event dimensions
        """
        dims = {dim for value, event_dim in tensors for dim in self._dims(value, event_dim)}
        wanted: list[EnumeratedSite] = []
        for site in reversed(self.sites):
            if site.dim in dims:
                wanted.insert(0, site)
                dims |= self._dims(site.log_prob, 0)
        return JointStates({site.dim: site.size for site in wanted}, self.rank, self.nesting), wanted

    def probabilities(self, sites: list[EnumeratedSite]) -> Tensor:
        """Joint probability of the states of some sites, with the dimensions of all."""
        return torch.stack(torch.broadcast_tensors(*(site.log_prob for site in sites))).sum(0).exp()

    def expectation(self, name: str, site: Site) -> Tensor:
        """Sum over the plates of a site's log density, averaged over the states of the guide.

        :raises ProgramError: the site depends on states of a plate that it is not in itself
        :raises ImpossibleStateError: it is impossible in a state that the guide allows
        """
        log_prob = site["log_prob"]
        _, sites = self.joint([(log_prob, 0)])
        if not sites:
            return log_prob.sum()
        within = {plate.name for plate in plates_of(site)}
        for enumerated in sites:
            beyond = sorted(enumerated.plates - within)
            if beyond:
                raise ProgramError(
                    f"site {name!r} is in the plates {sorted(within)} and depends on the states of {enumerated.name!r}, which "
                    f"is in {beyond} too: every slice there has states of its own, and {name!r} depends on all of them "
                    "jointly. Declare them as one site with an event dimension (.to_event), whose joint states are "
                    "enumerated"
                )
        weights = self.probabilities(sites)
        impossible = (weights > 0) & (log_prob == -torch.inf)
        if bool(impossible.any()):
            raise ImpossibleStateError(
                f"site {name!r}: the data are impossible in {int(impossible.sum())} of the {impossible.numel()} states of "
                f"{[site.name for site in sites]} that the guide gives a probability to, and a network never gives none: "
                "let the likelihood allow for a little noise in every state"
            )
        # States of probability zero may be impossible: 0 times minus infinity, in the gradient too.
        return (weights * torch.where(weights > 0, log_prob, torch.zeros_like(log_prob))).sum()

    def _dims(self, value: Tensor, event_dim: int) -> set[int]:
        """Enumeration dimensions of a tensor."""
        shape = value.shape[: value.dim() - event_dim]
        return {site.dim for site in self.sites if len(shape) >= -site.dim and shape[site.dim] > 1}


def read_enumeration(guide: Trace, model: Trace, nesting: int) -> Enumeration:
    """The states that a guide enumerated in parallel.

    :param model: its run at all of them
    :param nesting: dimensions that belong to plates
    :raises ProgramError: two sites share a dimension, or states were sampled instead of enumerated
    """
    found: list[EnumeratedSite] = []
    for name, site in sample_sites(guide):
        dim = site["infer"].get("_enumerate_dim")
        if dim is None:
            continue
        if site["infer"].get("num_samples") is not None:
            raise ProgramError(
                f"guide site {name!r} is enumerated with num_samples={site['infer']['num_samples']}: its states are sampled "
                "(tensor Monte Carlo), and the loss needs all of them. Leave num_samples out"
            )
        twin = next((other.name for other in found if other.dim == dim), None)
        if twin is not None:
            raise ProgramError(
                f"guide sites {twin!r} and {name!r} share one enumeration dimension, as pyro.markov does to chains of discrete "
                "latents: their joint states cannot be told apart. Write the guide without pyro.markov if there are few of "
                "them; a long discrete chain is beyond this loss"
            )
        fn = site["fn"]
        while isinstance(fn, dist.MaskedDistribution):
            fn = fn.base_dist
        log_prob = fn.log_prob(site["value"])
        plates = frozenset(plate.name for plate in plates_of(site))
        found.append(EnumeratedSite(name, dim, log_prob.shape[dim], log_prob, plates))
    return Enumeration(tuple(found), nesting, model)


def check_enumeration(enumeration: Enumeration, structure: Structure) -> None:
    """Enumerated sites must be local and lie in the data plates alone.

    :raises ProgramError: naming the site
    """
    for site in enumeration.sites:
        if site.name in structure.globals:
            raise ProgramError(
                f"global latent {site.name!r} is discrete: its states would share all data, and a cloud below every one of "
                "them is not built. Marginalise it, fit a program for each of its states, or make it local"
            )
        within = {
            plate.name for group in structure.groups if site.name in group.sites for plate in group.plates
        }
        if within and not site.plates & within:
            raise ProgramError(
                f"guide site {site.name!r} is in none of the plates {sorted(within)} that it is in in the model: its states "
                "would share all data. Put the guide's sample statement into the same plates"
            )
        refuse_inner_plates(site.name, site.plates - {plate.name for plate in structure.data_plates})


def joint_counts(sites: Iterable[tuple[str, int, frozenset[str]]]) -> Iterator[tuple[list[str], int]]:
    """For every site: it and all others whose states are enumerated beside its own, and the number of joint states.

    Sites multiply where the plates of one are among those of the other; data sets beside each other do not.

    >>> list(joint_counts([("a", 3, frozenset({"data"})), ("b", 4, frozenset({"data", "words"}))]))[1]
    (['a', 'b'], 12)
    """
    known = list(sites)
    for _, _, plates in known:
        beside = [(name, size) for name, size, others in known if plates <= others or others <= plates]
        yield [name for name, _ in beside], math.prod(size for _, size in beside)
