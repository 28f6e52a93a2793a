"""Sleep: a guide sees simulated data, draws latents, and is scored against those that made the data."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_sinkhorn.errors import NonFiniteError, ProgramError
from pyro_sinkhorn.geometry.registry import geometry_of
from pyro_sinkhorn.guide.auto_implicit import AutoImplicit
from pyro_sinkhorn.guide.lazy import LazyGuide
from pyro_sinkhorn.guide.observed import Readings, find_observed, read_observed
from pyro_sinkhorn.guide.shown import Shown, showing
from pyro_sinkhorn.losses.clouds import rows, slices
from pyro_sinkhorn.losses.energy import ScoringCoordinates, energy_score, expected_energy_score
from pyro_sinkhorn.losses.pairs import Pairs, substituted
from pyro_sinkhorn.scoring import check_drawn_shapes, run_guide
from pyro_sinkhorn.structure import Group, Plate, Structure, carried_along, is_latent, sample_sites

Part = Literal["all", "globals", "locals"]

#: Name of the plate of a guide's draws.
DRAWS = "guide_draws"


class Force(Messenger):
    """Record what a guide draws at some sites, and let it go on with the truth."""

    def __init__(self, truth: dict[str, Tensor]) -> None:
        super().__init__()
        self.truth = truth
        self.drawn: dict[str, tuple[Any, Tensor]] = {}

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self.truth and is_latent(msg):
            self.drawn[msg["name"]] = (msg["fn"], msg["value"])
            msg["value"] = self.truth[msg["name"]].to(msg["value"])


class Sleeper:
    """Scores a guide on simulated pairs.

    :param num_draws: guide draws of every pair, at least 2
    :param beta: exponent of the energy score
    :param resolution: scale of the logarithmic score beside it
    """

    def __init__(self, num_draws: int, beta: float, resolution: float | None) -> None:
        self.num_draws, self.beta, self.resolution = num_draws, beta, resolution
        self.coordinates = ScoringCoordinates()

    @property
    def knows_units(self) -> bool:
        """Whether units of latents and scores of the prior were estimated."""
        return bool(self.coordinates.state.mean_costs)

    def __call__(
        self,
        guide: Any,
        pairs: Pairs,
        seen: Trace,
        structure: Structure,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        part: Part = "all",
        reference: Pairs | None = None,
    ) -> dict[str, Tensor]:
        """Mean score of every block, in units of the prior's own: 1 is a guide that knows nothing.

        :param seen: a plain run of the model on its data: sites, plates and masks
        :param part: whether to score globals or local latents alone, for a guide whose blocks are scored one by one
        :param reference: pairs that units are estimated from, at the first call; by default those that are scored
        :raises ProgramError: the guide does not serve the model, naming the site
        :raises NonFiniteError: the guide's draws are NaN or infinite
        """
        truth = dict(pairs.values)
        drawn = self._drawn(guide, pairs, seen, structure, truth, args, kwargs, part == "globals")
        check_drawn(drawn, structure.globals if part == "globals" else structure.latents)
        relative = frozenset(getattr(guide, "relative", ())) if _is_autoregressive(guide) else frozenset()
        blocks = _blocks(guide, structure, drawn)
        if part != "all":
            blocks = {key: found for key, found in blocks.items() if bool(found[1]) == (part == "locals")}
        nodes = seen.nodes
        _check_moments(relative, pairs)
        _check_moments(relative, reference or pairs)
        self.coordinates.estimate(blocks, nodes, reference or pairs, relative, self.beta, self.resolution)
        scores = {}
        for key, (names, plates) in blocks.items():
            counted = _counted(seen, names, plates, structure)
            columns = functools.partial(
                self._columns, pairs=pairs, nodes=nodes, plates=plates, relative=relative
            )
            at_truth = torch.cat([columns(name, truth[name]) for name in names], -1)
            fn = drawn[names[0]][0]
            if len(names) == 1 and _has_states(fn):
                score = self._score_states(names[0], fn, at_truth, pairs, nodes, plates)
            else:
                joint = torch.cat([columns(name, drawn[name][1]) for name in names], -1)
                joint = joint.reshape(self.num_draws, -1, *joint.shape[1:])
                score = energy_score(joint, at_truth, self.beta, self.resolution)
            score = _averaged(score, pairs.weights, counted)
            if not bool(score.detach().isfinite()):
                raise NonFiniteError(
                    f"latents ({key}): the energy score of the guide's draws is {float(score)}"
                )
            scores[key] = score / self.coordinates.state.mean_costs[key].to(score)
        return scores

    def _columns(
        self,
        name: str,
        value: Tensor,
        *,
        pairs: Pairs,
        nodes: Any,
        plates: tuple[Plate, ...],
        relative: frozenset[str],
    ) -> Tensor:
        if not bool(value.isfinite().all()):
            raise NonFiniteError(
                f"latent site {name!r}: the guide produced NaN or infinite values (shape {tuple(value.shape)}, draws and data "
                "sets first); look for a diverged guide (lower the learning rate, clip gradients)"
            )
        return self.coordinates.columns(name, nodes[name], value, plates, pairs, name in relative)

    def _score_states(
        self, name: str, fn: Any, at_truth: Tensor, pairs: Pairs, nodes: Any, plates: tuple[Plate, ...]
    ) -> Tensor:
        """The score of a law on states, exact: ``(P, n)``."""
        values = fn.enumerate_support(expand=False)
        flat = values.reshape(len(values), *fn.event_shape)
        geometry = geometry_of(nodes[name]["fn"], name)
        states = geometry.embed(flat)
        unit = self.coordinates.state.units[name].to(states)
        states = geometry.finish(states / unit)
        log_prob = fn.log_prob(values)  # (S, draws, P, *batch)
        probabilities = log_prob.movedim(0, -1).exp()
        probabilities = probabilities.expand(*fn.batch_shape, len(flat))
        lead = probabilities.shape[: probabilities.dim() - 1 - pairs.nesting]
        # Given the truth above, the law is that of every draw.
        probabilities = probabilities.reshape(-1, len(pairs), *probabilities.shape[len(lead) :])[0]
        laid_out = rows(probabilities, len(pairs), plates)
        return expected_energy_score(states, laid_out, at_truth, self.beta, self.resolution)

    # Showing the data and drawing.

    def _drawn(
        self,
        guide: Any,
        pairs: Pairs,
        seen: Trace,
        structure: Structure,
        truth: dict[str, Tensor],
        args: Any,
        kwargs: Any,
        only_globals: bool,
    ) -> dict[str, tuple[Any, Tensor]]:
        """Draws ``(S, P, *batch, *event)`` of every latent, each with the distribution it came from."""
        refuse_plain_globals(guide, structure)
        observed = find_observed(seen, structure, args, kwargs, dict(pairs.indices))
        if isinstance(guide, LazyGuide) and getattr(guide, "_encoder_input", None) is None:
            if guide._structure is None:
                with poutine.block(hide_types=["sample"]):
                    guide(*args, **kwargs)
            present = read_observed(observed, args, kwargs, dict(pairs.indices), lambda: seen).present
            values = {name: pairs.values[name] for name in structure.data}
            shown = Shown(Readings(values, present), pairs.plate, pairs.indices, pairs.moments, only_globals)
            plate = pairs.plate
            force = Force(truth if _is_autoregressive(guide) else self._forced(guide, seen, truth))
            with (
                showing(guide, shown),
                poutine.block(hide_types=["sample"]),
                force,
                pyro.plate(DRAWS, self.num_draws, dim=plate.dim - 1),
                pyro.plate(plate.name, plate.size, dim=plate.dim),
            ):
                trace = run_guide(guide, args, kwargs)
            return _collected(trace, force.drawn)
        paths = {site.name: site.source.path for site in observed}
        by_set = []
        for i in range(len(pairs)):
            shown_args, shown_kwargs = substituted(paths, pairs, i, args, kwargs)
            own = {name: value[i] for name, value in truth.items()}
            by_draw = []
            for _ in range(self.num_draws):
                force = Force(self._forced(guide, seen, own))
                with poutine.block(hide_types=["sample"]), force, _program_fixed(guide):
                    trace = run_guide(guide, shown_args, shown_kwargs)
                check_drawn_shapes(trace, seen)
                by_draw.append(_collected(trace, force.drawn))
            by_set.append(by_draw)
        return _stacked(by_set, pairs, seen)

    def _forced(self, guide: Any, seen: Trace, truth: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of a guide whose order of sites is unknown, only discrete sites go on with the truth."""
        return {
            name: value
            for name, value in truth.items()
            if getattr(seen.nodes[name]["fn"].support, "is_discrete", False)
        }


@contextmanager
def _program_fixed(guide: Any) -> Iterator[None]:
    """Latents that an automatic guide makes relative to their prior teach the guide alone inside."""
    if isinstance(guide, LazyGuide):
        guide._program_fixed = True
    try:
        yield
    finally:
        if isinstance(guide, LazyGuide):
            guide._program_fixed = False


def _is_autoregressive(guide: Any) -> bool:
    return bool(getattr(guide, "autoregressive", False))


def _has_states(fn: Any) -> bool:
    return bool(getattr(fn, "has_enumerate_support", False))


def _collected(trace: Trace, forced: dict[str, tuple[Any, Tensor]]) -> dict[str, tuple[Any, Tensor]]:
    free = {name: (site["fn"], site["value"]) for name, site in sample_sites(trace) if is_latent(site)}
    return free | forced


def _stacked(
    by_set: list[list[dict[str, tuple[Any, Tensor]]]], pairs: Pairs, seen: Trace
) -> dict[str, tuple[Any, Tensor]]:
    """Draws of separate guide calls as ``(S, P, *batch, *event)``."""
    found = {}
    for name, (fn, _) in by_set[0][0].items():
        event_dim = pairs.event_dims.get(name, len(fn.event_shape))

        def packed(value: Tensor, event_dim: int = event_dim) -> Tensor:
            batch = value.dim() - event_dim
            return value.reshape(*[1] * (pairs.nesting - batch), *value.shape)

        value = torch.stack([torch.stack([packed(one[name][1]) for one in draws]) for draws in by_set], 1)
        if _has_states(fn):
            raise ProgramError(
                f"guide site {name!r} is a {type(fn).__name__} with states: a guide written by hand is scored by its draws, "
                "which carry no gradient to their probabilities. Use AutoPosterior or AutoImplicit, scored over all states"
            )
        found[name] = (fn, value)
    return found


def _blocks(
    guide: Any, structure: Structure, drawn: dict[str, tuple[Any, Tensor]]
) -> dict[str, tuple[tuple[str, ...], tuple[Plate, ...]]]:
    """What is scored together, by name: sites and the plates whose slices are rows."""
    plates = {name: group.plates for group in structure.groups for name in group.sites}
    if _is_autoregressive(guide):
        return {", ".join(names): (names, plates.get(names[0], ())) for names in guide.blocks()}
    discrete = [name for name in structure.latents if _has_states(drawn[name][0])]
    found: dict[str, tuple[tuple[str, ...], tuple[Plate, ...]]] = {
        name: ((name,), plates.get(name, ())) for name in discrete
    }
    # All that surrounds a row belongs to it: so the dependence of a guide's sites is scored, whatever their order.
    groups = [group for group in structure.groups if not set(group.sites) <= set(discrete)]
    for group in groups or [Group(structure.globals, ())]:
        around = carried_along(group, structure.groups) + (structure.globals if group.plates else ())
        names = tuple(name for name in (*around, *group.sites) if name not in discrete)
        if names:
            found[", ".join(names)] = (names, group.plates)
    return found


def _counted(
    seen: Trace, names: tuple[str, ...], plates: tuple[Plate, ...], structure: Structure
) -> Tensor | None:
    """Rows that a mask leaves something of; None for all."""
    if not plates:
        return None
    group = next(group for group in structure.groups if names[-1] in group.sites)
    weights, _ = slices(seen, group)
    return None if bool((weights > 0).all()) else weights > 0


def _averaged(score: Tensor, weights: Tensor | None, counted: Tensor | None) -> Tensor:
    """Mean of scores ``(P, n)``, weighted where simulations were not drawn from the prior.

    :param weights: of data sets, ``(P,)``, or of their outermost rows, ``(P, m)``
    """
    if weights is not None:
        weights = weights.to(score)
        weights = weights.unsqueeze(-1) if weights.dim() == 1 else weights
        score = score * weights.repeat_interleave(score.shape[-1] // weights.shape[-1], -1)
    if counted is not None:
        score = score[:, counted]
    return score.mean() if score.numel() else score.sum()


def check_drawn(drawn: dict[str, Any], latents: tuple[str, ...]) -> None:
    """A guide draws every latent with a gradient, or as a law on states: by name, each with its distribution.

    :raises ProgramError: naming the site
    """
    missing = [name for name in latents if name not in drawn]
    unknown = [name for name in drawn if name not in latents]
    if missing or unknown:
        said = f"does not sample the latent sites {missing}" if missing else f"samples {unknown}"
        raise ProgramError(
            f"the guide {said}; the latents of the model are {sorted(latents)}. Every one needs a sample statement "
            "of the same name in the guide, and noise is marked by infer={'is_auxiliary': True}"
        )
    for name, (fn, _) in drawn.items():
        if not getattr(fn, "has_rsample", False) and not _has_states(fn):
            raise ProgramError(
                f"guide site {name!r} is a {type(fn).__name__}, which is sampled without a gradient (has_rsample is False): "
                "use Implicit or a reparametrised distribution"
            )


def _check_moments(relative: frozenset[str], pairs: Pairs) -> None:
    lost = sorted(name for name in relative if name not in pairs.moments)
    if lost:
        raise NonFiniteError(
            f"latent site {lost[0]!r}: the mean or standard deviation of its prior is NaN, infinite or zero in some simulated "
            "data set, though not in the first ones: give the latents above it priors that stay off such values"
        )


def refuse_plain_globals(guide: Any, structure: Structure) -> None:
    """A guide whose latents do not depend on the data learns nothing from many data sets. Pyro's own are such guides.

    :raises ProgramError: naming one that does
    """
    if isinstance(guide, AutoGuide) or (isinstance(guide, AutoImplicit) and structure.globals):
        what = (
            f"globals {list(structure.globals)}"
            if structure.globals
            else f"latents {list(structure.latents)}"
        )
        raise ProgramError(
            f"{type(guide).__name__} gives the {what} one law for all data, but this loss shows it many data sets: use "
            "AutoPosterior(model), which reads them off the data"
        )
