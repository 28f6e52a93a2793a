r"""Wake and sleep with the energy score, as a loss for :class:`pyro.infer.SVI`: a guide that is the posterior."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from pyro import poutine
from pyro.infer.util import torch_item
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_sinkhorn.distributions.implicit import Implicit
from pyro_sinkhorn.errors import NonFiniteError, checked_integer, is_number
from pyro_sinkhorn.guide.auto_posterior import AutoPosterior
from pyro_sinkhorn.losses.base import SinkhornLoss, Terms
from pyro_sinkhorn.losses.call import Call
from pyro_sinkhorn.losses.latent_match import GroupMatch, LatentMatch
from pyro_sinkhorn.losses.matching import MatchOptions
from pyro_sinkhorn.losses.pairs import Pairs, Simulator, follows_rows, picked
from pyro_sinkhorn.losses.sleep import Sleeper
from pyro_sinkhorn.refinement import refine
from pyro_sinkhorn.scoring import (
    blame,
    check_supports,
    log_density,
    number_of_data,
    run_guide,
    run_scored,
)
from pyro_sinkhorn.structure import (
    Plate,
    Structure,
    innermost,
    is_latent,
    nesting_of,
    sample_sites,
    structure_of,
)

#: Data sets simulated a step where there are globals, and pairs where there are none.
_DATA_SETS, _PAIRS = 128, 128
#: Draws that units of latents are estimated from, and rows simulated for them, at most.
_REFERENCE, _MOST_ROWS = 512, 200_000
#: So many where they are simulated one by one.
_FEW = 128


class Trace_EnergyScore(SinkhornLoss):
    r"""Amortised inference by a strictly proper scoring rule, beside learning: the guide becomes the posterior.

    Two steps in one loss, whose parameters are disjoint.

    *Sleep.* Data sets are simulated from the program, latents included; the guide sees the data and descends the energy
    score of its draws against the latents that made them,

    .. math::

        \frac1B \sum_{\text{blocks}} \frac{1}{c}\,\mathbb{E}_{p(z^*,x)}\Bigl[\mathbb{E}_q\|e(z)-e(z^*)\|^\beta
        - \tfrac12\mathbb{E}_q\|e(z)-e(z')\|^\beta\Bigr], \qquad z, z' \sim q(\cdot\mid x),

    with :math:`e` the embedding of the support (:mod:`pyro_sinkhorn.geometry`) and :math:`c` the score of the prior, so that
    1 is a guide that knows nothing. The loss is that mean; with a wake step beside it, times the number of data. It is
    least for :math:`q = p(z\mid x)` alone, and uses samples of the guide, the prior and the simulator only. Latents of an
    :class:`~pyro_sinkhorn.AutoPosterior` are scored block by block given the truth of those above them; other guides
    jointly with all that surrounds a datum. One written by hand is called once for every data set and draw, which takes
    time where there are many. Discrete latents are scored over all states.

    *Wake.* The program ascends :math:`\mathbb{E}_q \log p(x, z)` at the observed data, latents detached, over the sites
    that have a density. It takes the guide's draws for posterior draws: what these are too wide by, the program takes for its
    own noise. ``wake_steps`` moves them towards its posterior first, where all latents have densities. Parameters of a
    prior without one learn by matching it to the aggregated posterior, as in :class:`~pyro_sinkhorn.Trace_Sinkhorn`; an
    ``Implicit`` observation teaches its simulator nothing here (:class:`~pyro_sinkhorn.Trace_DataSinkhorn` does).

    Pure inference of a program that is fixed is ``wake=False``; :meth:`SinkhornProgram.calibrate
    <pyro_sinkhorn.SinkhornProgram.calibrate>` is made of it.

    A program with globals is simulated as whole data sets of the size of the data in the arguments: pass all data at each
    call. Calls may differ in size; the guide then serves all sizes in between.

    :param num_draws: guide draws of every pair; more reduce the variance of the gradient and cost guide passes only
    :param beta: exponent of the distance, between 0 and 2; 1 by default. At 2 only means would count
    :param resolution: a second score, with :math:`\tfrac12\log(1+\|\cdot\|^2/h^2)` in place of the power, is added to see
        details down to this share h of the prior's standard deviation, such as a posterior much narrower than its prior.
        None for the energy score alone
    :param wake: whether the program learns
    :param wake_steps: steps of Hamiltonian chains (:func:`pyro_sinkhorn.refinement.refine`) that the draws of the wake step
        make before the program is scored at them, at least 4; 0 for none. Ten make a step about three times as long, and on a
        program with a curved posterior what is learned agrees with maximum likelihood, where draws as they are do not
        (benchmarks/learning_and_calibration.py)
    :param num_simulations: data sets simulated a step; default 128 where there are globals, else as many as
        make 128 pairs
    :param prior_weight: of the match of density-free priors, per datum
    :param vectorize: simulate data sets side by side in a plate; None (default) checks whether the model allows it
    :param num_particles: guide draws of the wake step
    :param max_plate_nesting: as in Pyro; unused, since plates are counted at each call
    :raises ProgramError: where model, guide and data do not fit together, naming the site
    :raises NonFiniteError: at the first NaN or infinity, naming its source

    References: Gneiting and Raftery 2007, *Strictly proper scoring rules*; Pacchiardi and Dutta 2022, *Likelihood-free
    inference with generative neural networks via scoring rule minimization*; Hinton et al. 1995, *The wake-sleep algorithm*.

    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer import SVI
    >>> from pyro_sinkhorn import AutoPosterior
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 0.5), obs=x)
    >>> x = torch.randn(100)
    >>> svi = SVI(model, AutoPosterior(model), pyro.optim.Adam({"lr": 1e-3}), loss=Trace_EnergyScore())
    >>> isinstance(svi.step(x), float)
    True
    """

    default_guide = AutoPosterior
    makes_posterior = True
    whole_data_sets = True

    def __init__(
        self,
        num_draws: int = 8,
        beta: float = 1.0,
        resolution: float | None = 0.03,
        wake: bool = True,
        wake_steps: int = 0,
        num_simulations: int | None = None,
        prior_weight: float = 10.0,
        vectorize: bool | None = None,
        num_particles: int = 1,
        max_plate_nesting: float = float("inf"),
        retain_graph: bool | None = None,
    ) -> None:
        checked_integer("num_draws", num_draws, 2)
        if wake_steps:
            checked_integer("wake_steps", wake_steps, 4)
        if num_simulations is not None:
            checked_integer("num_simulations", num_simulations, 1)
        if not (is_number(beta) and 0 < beta < 2):
            raise ValueError(
                f"beta is {beta!r}: expected a number between 0 and 2, both excluded (at 2 only means would count)"
            )
        if not (is_number(prior_weight) and prior_weight >= 0):
            raise ValueError(f"prior_weight is {prior_weight!r}: expected a number of at least 0")
        if resolution is not None and not (is_number(resolution) and resolution > 0):
            raise ValueError(f"resolution is {resolution!r}: expected a positive number, or None")
        super().__init__(LatentMatch(MatchOptions()), num_particles, False, max_plate_nesting, retain_graph)
        self.num_draws, self.beta, self.resolution = num_draws, beta, resolution
        self.wake, self.wake_steps = wake, wake_steps
        self.num_simulations, self.prior_weight, self.vectorize = num_simulations, prior_weight, vectorize
        self.sleeper = Sleeper(num_draws, beta, resolution)
        self.simulator = Simulator(vectorize)
        self._warned: set[str] = set()
        self._follows: dict[str, bool] = {}

    def config(self) -> dict[str, Any]:
        """Arguments that make an equal loss."""
        return {
            "num_draws": self.num_draws,
            "beta": self.beta,
            "resolution": self.resolution,
            "wake": self.wake,
            "wake_steps": self.wake_steps,
            "num_simulations": self.num_simulations,
            "prior_weight": self.prior_weight,
            "vectorize": self.vectorize,
            "num_particles": self.num_particles,
            "max_plate_nesting": self._given_plate_nesting,
            "retain_graph": self.retain_graph,
        }

    def fresh(self) -> Trace_EnergyScore:
        """A copy that has seen no program."""
        return type(self)(**self.config())

    def state(self) -> dict[str, Any]:
        """Units of the latents and scores of the prior, as tensors."""
        return super().state() | {"sleep": dict(vars(self.sleeper.coordinates.state))}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state`."""
        super().load_state(state)
        self.sleeper.coordinates.state.load(state.get("sleep", {}))

    # One step.

    def sleep(
        self, model: Callable[..., Any], guide: Any, args: Any, kwargs: Any, pairs: Pairs | None = None
    ) -> dict[str, Tensor]:
        """Score of the guide on simulated pairs, block by block; 1 is the prior's.

        :param pairs: simulated before; by default they are drawn
        """
        indices = None if pairs is None else pairs.indices
        with torch.no_grad():
            seen, structure, _ = self.simulator.look(model, args, kwargs, indices or {})
        if pairs is None:
            pairs = self.simulator(model, args, kwargs, self.number_of_data_sets(structure))
        reference = (
            None if self.sleeper.knows_units else self._reference(model, args, kwargs, structure, pairs)
        )
        rows = self._fewer_rows(model, guide, pairs, structure, args, kwargs)
        if rows is None:
            return self.sleeper(guide, pairs, seen, structure, args, kwargs, "all", reference)
        plate, index = rows
        scores = self.sleeper(guide, pairs, seen, structure, args, kwargs, "globals", reference)
        args, kwargs = picked(args, kwargs, plate.size, index)
        with torch.no_grad():
            few_seen, few_structure, _ = self.simulator.look(model, args, kwargs)
        inside = (*structure.locals, *structure.data)
        few = pairs.rows(plate, index, inside)
        if reference is not None:
            reference = reference.rows(plate, index, structure.locals)
        return scores | self.sleeper(guide, few, few_seen, few_structure, args, kwargs, "locals", reference)

    def _fewer_rows(
        self, model: Any, guide: Any, pairs: Pairs, structure: Structure, args: Any, kwargs: Any
    ) -> tuple[Plate, Tensor] | None:
        """Rows to score the local latents at: given the globals they are independent, so a few of every data set do."""
        outermost = {group.plates[0] for group in structure.groups}
        if not (structure.globals and len(outermost) == 1 and getattr(guide, "autoregressive", False)):
            return None
        plate = next(iter(outermost))
        few = math.ceil(_PAIRS / len(pairs))
        if plate.size < 2 * few or set(structure.data_plates) != {
            p for g in structure.groups for p in g.plates
        }:
            return None
        if plate.name not in self._follows:
            self._follows[plate.name] = follows_rows(model, args, kwargs, plate.size)
        return (plate, torch.randperm(plate.size)[:few]) if self._follows[plate.name] else None

    def _reference(self, model: Any, args: Any, kwargs: Any, structure: Structure, pairs: Pairs) -> Pairs:
        """Latents from their prior, enough to know their units; without data, which may be expensive."""
        rows = 1 if structure.globals else max(structure.data_plates[0].size, 1)
        all_rows = math.prod(plate.size for plate in structure.data_plates)
        wanted = _REFERENCE if self.simulator.vectorize else _FEW
        number = min(math.ceil(wanted / rows), max(_MOST_ROWS // max(all_rows, 1), 2))
        if number <= len(pairs) and pairs.weights is None:
            return pairs
        return self.simulator(
            model, args, kwargs, number, indices=pairs.indices, stop_after=structure.latents
        )

    def number_of_data_sets(self, structure: Structure) -> int:
        """Data sets to simulate a step."""
        if self.num_simulations is not None:
            return self.num_simulations
        if structure.globals:
            return _DATA_SETS
        return max(1, math.ceil(_PAIRS / max(structure.data_plates[0].size, 1)))

    def _particles(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Iterator[tuple[Tensor, Terms]]:
        scores = self.sleep(model, guide, args, kwargs)
        energy = torch.stack(list(scores.values())).mean()
        value = torch_item(energy)
        # Whoever asks takes the mean over particles: of the sleep step, which is made once, so many in the first.
        left = self.num_particles * energy
        for _ in range(self.num_particles):
            if self.wake:
                loss, terms, n_data = self._wake(model, guide, args, kwargs)
                terms.loss = torch_item(loss) / n_data + value
                terms.energy = value
                yield loss + n_data * left, terms  # both are sums over data
            else:
                yield left, Terms(loss=value, energy=value)
            left = torch.zeros_like(left)

    def _wake(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Tensor, Terms, float]:
        """The program's step at the observed data, latents detached; with the number of data."""
        with torch.no_grad():
            guide_trace = run_guide(guide, args, kwargs)
        if self.wake_steps:
            self._move(model, guide_trace, args, kwargs)
        scored = run_scored(model, guide_trace, args, kwargs)
        structure = structure_of(scored)
        check_supports(scored, structure)
        n_data = number_of_data(scored, structure)
        without = {name for name, site in sample_sites(scored) if isinstance(innermost(site["fn"]), Implicit)}
        self._warn_of_untaught(scored, structure, without)
        names = {name for name, _ in sample_sites(scored)} - without
        observed = {name for name in names if scored.nodes[name]["is_observed"]}
        likelihood = log_density(scored, observed, "model")
        log_p = likelihood + log_density(scored, names - observed, "model")
        if not bool(log_p.detach().isfinite()):
            raise blame(scored, guide_trace, structure) or NonFiniteError(
                f"the log density of model and data is {float(log_p)} though data, latents and networks are finite"
            )
        matches = self._matches(model, args, kwargs, structure, scored, without)
        loss = -log_p
        for group in matches:
            loss = loss + self.prior_weight * group.n_data * group.value
        terms = Terms(
            reconstruction=-torch_item(likelihood) / n_data if observed else math.nan,
            match={group.name: torch_item(group.value) for group in matches},
            total_match=sum(torch_item(group.value) * group.n_data for group in matches) / n_data,
        )
        return loss, terms, n_data

    def _move(self, model: Any, guide_trace: Trace, args: Any, kwargs: Any) -> None:
        """Draws of the guide, moved towards the posterior of the program as it is now."""
        sites = {name: site for name, site in sample_sites(guide_trace) if is_latent(site)}
        nesting = nesting_of(guide_trace)
        draws = {}
        for name, site in sites.items():
            value, event_dim = site["value"], len(site["fn"].event_shape)
            pad = nesting - (value.dim() - event_dim)
            draws[name] = value.reshape((1,) * (1 + pad) + tuple(value.shape))
        with poutine.block(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of slow chains: a few steps are better than none
            moved = refine(
                model, draws, *args, num_steps=self.wake_steps, kernel="hmc", parallel=False, **kwargs
            ).draws
        for name, site in sites.items():
            site["value"] = moved[name].detach().reshape(site["value"].shape)

    def _matches(
        self, model: Any, args: Any, kwargs: Any, structure: Structure, scored: Trace, without: set[str]
    ) -> list[GroupMatch]:
        """Aggregated posterior against the priors that have no density, where these learn."""
        if not (self.prior_weight and without & set(structure.locals)):
            return []
        call = Call(model, args, kwargs, structure, scored)
        learns = any(
            call.prior().nodes[name]["value"].requires_grad for name in without & set(structure.locals)
        )
        return self.matcher(call) if learns else []

    def _warn_of_untaught(self, scored: Trace, structure: Structure, without: set[str]) -> None:
        for name in (*structure.data, *structure.globals):
            fn = innermost(scored.nodes[name]["fn"])
            if name in without and name not in self._warned and fn.value.requires_grad:
                self._warned.add(name)
                warnings.warn(
                    f"site {name!r} is Implicit, with parameters that would learn, but it has no density to be scored by: here "
                    "they stay as they are. Fit them by Trace_DataSinkhorn or Trace_JointSinkhorn, and calibrate() then",
                    UserWarning,
                    stacklevel=2,
                )

    def _one(self, model: Any, scored: Trace, guide: Trace, args: Any, kwargs: Any) -> tuple[Tensor, Terms]:
        raise AssertionError("both steps are made in _particles")
