r"""Which latents are compared together.

====================  =========================================================  =======================================
``groups=``           cliques                                                    right when
====================  =========================================================  =======================================
``"joint"``           all local latents of a stack of data plates                always; needs more data the more latents
``"markov"``          every latent with its parents, from the model's graph      guide and prior factorise alike
``"marginal"``        every latent by itself                                     latents are independent in both
``[("a", "b"), ...]``  as given                                                  you know
====================  =========================================================  =======================================

Two clouds of 64 points in 50 dimensions are far apart even if their laws are equal. A prior that factorises along a
graph, :math:`p(z) = \prod_i p(z_i \mid z_{\mathrm{pa}(i)})`, is determined by the laws of its *families*
:math:`(z_i, z_{\mathrm{pa}(i)})`, each of few dimensions. What they leave open is whether the guide's cloud has
dependences beyond the graph. They see one step at a time: on paths of an oscillator a joint match in 100 dimensions
learned the dynamics better (benchmarks/state_space_cliques.py). The cliques of a plate stack share the weight equally, so
that ``prior_weight`` keeps its meaning.

Covariates are compared along where they enter the prior of a latent of the clique itself. Below such a latent, in another
clique, slices are only kept apart in the split: laws are compared over all slices there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyro
import torch
from pyro.infer.inspect import TrackProvenance
from pyro.ops.provenance import get_provenance

from pyro_sinkhorn.errors import ProgramError
from pyro_sinkhorn.runs import run_model
from pyro_sinkhorn.structure import Group, Site, Structure, carried_along, parameters_of, sample_sites

Grouping = Literal["joint", "markov", "marginal"] | Sequence[Sequence[str]]

NAMED = ("joint", "markov", "marginal")


@dataclass(frozen=True)
class Clique:
    """Latents that are compared together.

    name:     how tables and errors call it
    group:    sites in the finest plates of the clique
    carried:  sites in fewer plates, repeated along the others
    share:    of the weight
    """

    name: str
    group: Group
    carried: tuple[str, ...]
    share: float

    @property
    def sites(self) -> tuple[str, ...]:
        """All of them, in the order of their columns."""
        return tuple(dict.fromkeys((*self.carried, *self.group.sites)))


def check_grouping(grouping: Any) -> Grouping:
    """The argument ``groups`` of a loss, custom cliques as tuples.

    :raises ValueError: it is none
    """
    if isinstance(grouping, str):
        if grouping in NAMED:
            return grouping
    elif isinstance(grouping, Sequence) and grouping and all(map(_is_clique, grouping)):
        return tuple(tuple(clique) for clique in grouping)
    raise ValueError(
        f"groups is {grouping!r}: expected 'joint', 'markov', 'marginal' or cliques of site names such as "
        "[('z_0', 'z_1'), ('z_1', 'z_2')]"
    )


def _is_clique(value: Any) -> bool:
    named = isinstance(value, Sequence) and not isinstance(value, str) and bool(value)
    return named and all(isinstance(name, str) for name in value)


def cliques_of(
    grouping: Grouping, structure: Structure, parents: Callable[[], Mapping[str, frozenset[str]]]
) -> list[Clique]:
    """The cliques of a program.

    :param parents: local latents that each latent depends on directly; asked for by ``"markov"`` alone
    :raises ProgramError: custom cliques that name no latents, leave some out, or mix plates
    """
    if grouping == "joint":
        return [
            Clique(group.name, group, carried_along(group, structure.groups), 1.0)
            for group in structure.groups
        ]
    if grouping == "marginal":
        families: list[tuple[str, ...]] = [(name,) for name in structure.locals]
    elif grouping == "markov":
        families = _families(structure, parents())
    else:
        # The same latents twice would share the weight with themselves.
        families = list({frozenset(clique): tuple(dict.fromkeys(clique)) for clique in grouping}.values())
        _check_families(families, structure)
    cliques = [_clique(family, structure) for family in families]
    return [
        Clique(c.name, c.group, c.carried, 1 / sum(c.group.plates == other.group.plates for other in cliques))
        for c in cliques
    ]


def model_graph(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    structure: Structure,
    values: dict[str, Any],
) -> dict[str, frozenset[str]]:
    """Local latents that each local latent depends on directly.

    Values are followed through the model as :func:`pyro.infer.inspect.get_dependencies` does it, but to the parameters
    of a distribution instead of its density, which a prior here need not have.

    :param values: globals and sub-samples
    """
    tracked = TrackProvenance()(model)
    with torch.random.fork_rng(devices=[]), pyro.validation_enabled(False):
        trace = run_model(tracked, args, kwargs, values=values, stop_after=structure.locals)
    locals_ = set(structure.locals)
    return {name: _sources(site) & locals_ - {name} for name, site in sample_sites(trace) if name in locals_}


def _sources(site: Site) -> frozenset[str]:
    """Sites whose values went into the distribution of one."""
    found = [get_provenance(parameter) for parameter, _ in parameters_of(site["fn"])]
    if not found:
        try:
            found = [get_provenance(site["fn"].log_prob(site["value"]))]
        except NotImplementedError as error:
            raise ProgramError(
                f"latent site {site['name']!r}: its {type(site['fn']).__name__} shows neither parameters (arg_constraints) "
                "nor a density, so nothing says which latents it depends on: give the cliques yourself, as groups=[(...), ...]"
            ) from error
    return frozenset().union(*found)


def _families(structure: Structure, parents: Mapping[str, frozenset[str]]) -> list[tuple[str, ...]]:
    """Every latent with its parents, without those that lie in others of the same plates.

    A document's latent alone stays beside that of a document and its words: the one counts documents, the other words.
    """
    order = structure.locals
    depth = {name: len(group.plates) for group in structure.groups for name in group.sites}

    def finest(family: frozenset[str]) -> int:
        return max(depth[name] for name in family)

    families = [frozenset({name} | parents.get(name, frozenset())) for name in order]
    kept = [
        f
        for f in dict.fromkeys(families)
        if not any(f < other and finest(f) == finest(other) for other in families)
    ]
    return [tuple(name for name in order if name in family) for family in kept]


def _check_families(families: list[tuple[str, ...]], structure: Structure) -> None:
    known = structure.locals
    unknown = sorted({name for family in families for name in family} - set(known))
    if unknown:
        raise ProgramError(
            f"groups= names the sites {unknown}, but the local latents of the model are {list(known)}"
        )
    left_out = [name for name in known if not any(name in family for family in families)]
    if left_out:
        raise ProgramError(
            f"groups= leaves out the latents {left_out}: nothing would compare them with their prior. Put each into a "
            "clique, alone if need be"
        )


def _clique(family: tuple[str, ...], structure: Structure) -> Clique:
    plates = {name: group.plates for group in structure.groups for name in group.sites}
    finest = max((plates[name] for name in family), key=len)
    apart = [name for name in family if not set(plates[name]) <= set(finest)]
    if apart:
        raise ProgramError(
            f"latents {list(family)} cannot be compared together: {apart} are in the plates "
            f"{[plate.name for plate in plates[apart[0]]]}, the others in {[plate.name for plate in finest]}, and neither "
            "contains the other"
        )
    own = tuple(dict.fromkeys(name for name in family if plates[name] == finest))
    carried = tuple(dict.fromkeys(name for name in family if plates[name] != finest))
    return Clique(", ".join((*carried, *own)), Group(own, finest), carried, 1.0)
