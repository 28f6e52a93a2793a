r"""Optimal transport between the joints over data and latents, as a loss for :class:`pyro.infer.SVI`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from pyro.infer.util import torch_item
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn

from pyro_sinkhorn.errors import NonFiniteError, checked_integer, is_number
from pyro_sinkhorn.guide.auto_posterior import AutoPosterior
from pyro_sinkhorn.losses.base import SinkhornLoss, Terms, mean_terms
from pyro_sinkhorn.losses.covariates import Covariates
from pyro_sinkhorn.losses.data_columns import Scale
from pyro_sinkhorn.losses.data_set_match import DataSetMatch, DataSets
from pyro_sinkhorn.losses.joint_call import joint_call, warn_if_nothing_learned, without_latents
from pyro_sinkhorn.losses.joint_match import Features, JointMatch
from pyro_sinkhorn.losses.learned_cost import LearnedCost
from pyro_sinkhorn.losses.matching import MatchOptions
from pyro_sinkhorn.losses.pairs import Simulator
from pyro_sinkhorn.losses.prior import warn_if_gradient_lost
from pyro_sinkhorn.losses.simulation import Simulation, run_simulated, with_data
from pyro_sinkhorn.losses.site_cost import GivenCost
from pyro_sinkhorn.ot.checks import Gradient, Value
from pyro_sinkhorn.ot.divergence import Debias
from pyro_sinkhorn.rng import undisturbed
from pyro_sinkhorn.runs import subsamples
from pyro_sinkhorn.scoring import check_inputs, log_density, number_of_data, run_guide
from pyro_sinkhorn.structure import sample_sites


class Trace_JointSinkhorn(SinkhornLoss):
    r"""Optimal transport between two joints: data with the guide's latents, and the program's own pairs.

    .. math::

        N\sum_{\text{groups}}\frac{S\bigl(\mathrm{data}(x)\,q(z\mid x),\; p(z)\,p(x\mid z)\bigr)}
        {\mathbb{E}\,c\bigl((z,x),(z',x')\bigr)}

    Each call draws latents of the data from the guide and simulates as many pairs :math:`(z, x)` from the program,
    latents and observed sites free. The two clouds are compared by the debiased entropic transport of
    :func:`pyro_sinkhorn.ot.sinkhorn_divergence`. It is zero where the joints agree, so where the simulated data have the
    law of the data and **the guide is the posterior**. No density is asked for: priors, likelihoods
    (``Implicit`` too) and guide need only be sampled. The guide learns, and so do parameters of the program that the
    simulated values carry a gradient to; a program without parameters is inferred and stays as it is. ::

        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Dirichlet(torch.ones(3)))
                simulated = simulator(z, torch.randn(len(x), 5))
                pyro.sample("x", Implicit(simulated, event_dim=1), obs=x)

        svi = SVI(model, AutoImplicit(model), Adam({"lr": 1e-3}), loss=Trace_JointSinkhorn())
        SinkhornProgram(model, loss=Trace_JointSinkhorn()).fit(x)   # the same

    **How near to the posterior** the guide comes depends on what transport at ``match_size`` resolves. Two clouds of
    128 points show a dependence in a few dimensions, and less of it the more there are; what of ``x`` they do not see,
    a guide may use as if it were noise, and come out too narrow. So where ``x`` is wide, compare ``features`` of it and
    let the guide read the same and no more: ``AutoImplicit(model, encoder_input=...)``. Only then is the law of the latents
    given the features the guide's. A program that cannot make the data leaves no guide at zero: what it then
    finds is a compromise, not a posterior.

    Latents and observed sites that share their data plates form one group, one point a slice. A nested group carries
    latents and data of the plates around it along. So a document's latent is compared together with one word at a time,
    which determines less than its joint law with all of them: observe the words as one site with an event dimension
    (``.to_event(1)``) to have that one compared. Plates of latents that hold no data become columns of their datum.
    Masked data, and latents under a mask, hold one constant in both clouds. ``pyro.factor`` is added; it changes the
    loss, not what is simulated.

    **Globals**, latents outside the data plates, have one draw a data set, so whole data sets are the points. Each call
    simulates two independent sets of them, of the size and with the covariates and masks of the data in the arguments,
    whose values do not count; the first is shown to the guide, one draw a data set. Compared are the globals beside a
    summary :math:`s` of their data set, and of every group of local latents four slices, drawn at each call, with their
    data and the globals: :math:`(s(x), g)` and :math:`(z_i, x_i, g)`, each slice with the same one of other data sets. The
    loss is the sum of these times the number of data. This is **pure inference**: the program is held fixed, is simulated
    without gradients, and a parameter of it that would learn is warned of. The guide must read data sets:
    :class:`~pyro_sinkhorn.AutoPosterior`, which a :class:`~pyro_sinkhorn.SinkhornProgram` takes by default where there are
    globals, or one by hand, called for every data set in turn. Its globals come out as the posterior given :math:`s(x)`;
    what of the data the summary leaves out, the guide may use as if it were noise, so give ``features`` that say all there
    is to say. Pass all data at each call. An entropic match hardly sees widths far below the prior's: where data are many,
    :class:`~pyro_sinkhorn.Trace_EnergyScore` is the sharper loss.

    :param data_weight: factor of the squared distance between data. With 1 a standardised column of data weighs as much as
        a standardised latent; with much more the guide comes out too narrow, with much less it misses what the data say
    :param relative_epsilon: entropic regularisation in units of the mean cost between two pairs
    :param match_size: units in each half-cloud, at most half of the batch, or of the simulated data sets where there are
        globals; larger batches are cut into blocks. 128, as where data are compared
    :param cost: ground cost. None (default): squared distance, but of latents whose site or geometry has a cost of its own
        that one; ``{latent: cost}`` overrides these, see :class:`~pyro_sinkhorn.Trace_Sinkhorn`. A single name or function
        compares whole rows
    :param scale: unit of an observed site, estimated once from the first batch: ``"site"``, ``"column"`` or None, see
        :class:`~pyro_sinkhorn.Trace_DataSinkhorn`. Latents are in the unit of their prior
    :param features: a map from values of the observed site, ``(n, *event)``, to ``(n, f)``, whose distances are compared
        instead: a function or a network. It must pass gradients for the program to learn, and is not trained itself.
        ``{site: map}`` where several sites are observed. Give the guide the same features to read, see above.
        Where there are globals, a map from values of whole data sets, ``(P, *plates, *event)``, masked ones 0, to ``(P, f)``,
        in place of the default summary: mean and standard deviation of every column over the data plates. These columns are
        standardised and, if their tails are heavy, compressed
    :param covariates: what a conditional program was given, appended to both clouds: a function of the model's arguments,
        ``"auto"``, None or ``"warn"`` (default), see :class:`~pyro_sinkhorn.Trace_DataSinkhorn`. Not asked where there are
        globals: all simulated data sets have the same covariates, slice by slice
    :param num_simulations: data sets in each of the two sets that are simulated where there are globals; default
        ``2 * match_size``, the least that fills two halves
    :param vectorize: simulate them side by side in a plate; None (default) checks whether the model allows it
    :param debias: ``"independent"`` (unbiased on minibatches), ``"self"`` (its optimum is too narrow) or None
    :param tolerance: marginal error at which the solver stops; 1e-2 leaves gradients within about 1%
    :param max_iters: iterations of the solver at most
    :param value: what of the plan is reported, see :func:`pyro_sinkhorn.ot.sinkhorn`
    :param gradient: ``"envelope"``, or ``"unrolled"`` through the iterations, which the other values need
    :param num_particles: guide draws and simulations a step, each pair of clouds compared by itself
    :param vectorize_particles: run them in one batch; noise must then come from ``pyro.sample``
    :param max_plate_nesting: as in Pyro; found out by running the programs once where needed
    :raises ProgramError: model, guide and data do not fit together, naming the site; discrete latents, and a guide whose
        globals do not depend on the data
    :raises NonFiniteError: at the first NaN or infinity, naming its source

    ``fit`` draws minibatches with replacement, as for ``Trace_DataSinkhorn``: simulated pairs are independent
    draws, data are half of every point of the other cloud, and two halves of an epoch that exhausts few data are not
    independent of each other.

    References: Ambrogioni et al. 2018, *Wasserstein variational inference*; Dumoulin et al. 2017, *Adversarially learned
    inference*, and Donahue et al. 2017, *Adversarial feature learning* (the same joints, compared by a classifier);
    Salimans et al. 2018 (the independent halves).

    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer import SVI
    >>> from pyro_sinkhorn import AutoImplicit
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> guide = AutoImplicit(model)
    >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss=Trace_JointSinkhorn(match_size=64))
    >>> for _ in range(100):
    ...     _ = svi.step(2**0.5 * torch.randn(128))
    >>> draws = guide(torch.zeros(2000))["z"]     # the posterior at 0 is Normal(0, 0.71)
    >>> abs(draws.mean().item()) < 0.3, abs(draws.std().item() - 0.71) < 0.2
    (True, True)
    """

    replaces_data = True
    guide_of_globals = AutoPosterior
    makes_posterior = True
    whole_data_sets = True

    def __init__(
        self,
        data_weight: float = 1.0,
        relative_epsilon: float = 0.1,
        match_size: int = 128,
        cost: GivenCost = None,
        scale: Scale = "site",
        features: Features = None,
        covariates: Covariates = "warn",
        num_simulations: int | None = None,
        vectorize: bool | None = None,
        debias: Debias = "independent",
        tolerance: float = 1e-2,
        max_iters: int = 500,
        backend: str = "auto",
        value: Value = "entropic",
        gradient: Gradient = "envelope",
        num_particles: int = 1,
        vectorize_particles: bool = False,
        max_plate_nesting: float = float("inf"),
        retain_graph: bool | None = None,
    ) -> None:
        if not (is_number(data_weight) and data_weight > 0):
            raise ValueError(f"data_weight is {data_weight!r}: expected a positive number")
        if scale not in ("site", "column", None):
            raise ValueError(f"scale is {scale!r}: expected 'site', 'column' or None")
        if not (covariates in ("warn", "auto", None) or callable(covariates)):
            raise ValueError(
                f"covariates is {covariates!r}: expected 'warn', 'auto', None or a function of the model's arguments"
            )
        if isinstance(cost, LearnedCost):
            raise ValueError(
                "a LearnedCost is trained by Trace_DataSinkhorn alone: give Trace_JointSinkhorn a fixed cost, or features="
            )
        maps = list(features.values()) if isinstance(features, Mapping) else [features]
        if features is not None and not all(map(callable, maps)):
            raise ValueError(
                f"features is {features!r}: expected a function or network of values of the observed site, (n, *event), or a "
                "dictionary {site: function}"
            )
        if num_simulations is not None:
            checked_integer("num_simulations", num_simulations, 2)
        options = MatchOptions(
            debias, relative_epsilon, match_size, cost, tolerance, max_iters, backend, value, gradient
        )
        matcher = JointMatch(options, data_weight, scale, features, covariates)
        super().__init__(matcher, num_particles, vectorize_particles, max_plate_nesting, retain_graph)
        self.num_simulations, self.vectorize = num_simulations, vectorize
        self._forget()

    def _forget(self) -> None:
        self.simulator = Simulator(self.vectorize)
        self._has_globals: bool | None = None  # found out at the first call

    @property
    def joint_match(self) -> JointMatch:
        """What compares the joints."""
        return self.matcher

    def config(self) -> dict[str, Any]:
        """Arguments that make an equal loss."""
        own = {
            "data_weight": self.joint_match.data_weight,
            "scale": self.joint_match.data_columns.scale,
            "features": self.joint_match.features,
            "covariates": self.joint_match.covariates,
            "num_simulations": self.num_simulations,
            "vectorize": self.vectorize,
        }
        return super().config() | own

    def fresh(self) -> Trace_JointSinkhorn:
        """A copy that has seen no program."""
        other = super().fresh()
        other._forget()
        return other

    def to(self, device: torch.device) -> None:
        """Move networks among the features."""
        features = self.joint_match.features
        for network in features.values() if isinstance(features, Mapping) else [features]:
            if isinstance(network, nn.Module):
                network.to(device)

    def simulation(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Simulation:
        """Run guide and program once, both joints side by side; what a report compares."""
        guide_trace = run_guide(guide, args, kwargs)
        simulated = run_simulated(model, without_latents(guide_trace), args, kwargs)
        return joint_call(model, simulated, guide_trace, args, kwargs)

    def data_sets(self, model: Any, guide: Any, args: Any, kwargs: Any) -> DataSets | None:
        """What is compared of a program with globals; None for one without."""
        if self._has_globals is None:
            with undisturbed():
                self._has_globals = bool(self.simulator.look(model, args, kwargs)[1].globals)
                if self._has_globals:
                    self.simulator(model, args, kwargs, 1)  # finds out whether data sets can lie in a plate
        if not self._has_globals:
            return None
        seen, structure, _ = self.simulator.look(model, args, kwargs)
        if not structure.globals:
            return None
        self._warn_of_parameters(seen)
        num = self.num_simulations or 2 * self.joint_match.options.match_size
        return DataSets(model, guide, args, kwargs, seen, structure, self.simulator, num, subsamples(seen))

    def _particles(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Iterator[tuple[Tensor, Terms]]:
        sets = self.data_sets(model, guide, args, kwargs)
        if sets is None:
            yield from super()._particles(model, guide, args, kwargs)
            return
        particles = (self._of_data_sets(sets) for _ in range(self.num_particles))
        if not self.vectorize_particles:
            yield from particles
            return
        losses, terms = zip(*particles, strict=True)
        yield sum(losses) / len(losses), mean_terms(terms)

    def _of_data_sets(self, sets: DataSets) -> tuple[Tensor, Terms]:
        matches = DataSetMatch(self.joint_match)(sets)
        n_data = number_of_data(sets.seen, sets.structure)
        total = torch.stack([group.value for group in matches]).sum()
        return n_data * total, Terms(
            loss=torch_item(total),
            match={group.name: torch_item(group.value) for group in matches},
            total_match=torch_item(total),
        )

    def _warn_of_parameters(self, seen: Trace) -> None:
        learned = [
            name for name, node in seen.nodes.items() if node["type"] == "param" and _learns(node["value"])
        ]
        if learned and self._first_time("parameters"):
            warnings.warn(
                f"the program has latents outside its data plates, so this loss infers and does not learn: its parameters "
                f"{learned} stay as they are. Fit them first, by Trace_Sinkhorn, Trace_DataSinkhorn or an ELBO, or make them "
                "latents; if they are to stay, do not register them with Pyro (requires_grad_(False)). This is said once",
                UserWarning,
                stacklevel=2,
            )

    def _first_time(self, what: str) -> bool:
        known = what in self.joint_match.warned
        self.joint_match.warned.add(what)
        return not known

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        guide_trace = run_guide(guide, args, kwargs)
        return run_simulated(model, without_latents(guide_trace), args, kwargs), guide_trace

    def _check_pair(self, guide: Any, model_trace: Trace) -> None:
        check_inputs(getattr(guide, "last_inputs", {}), with_data(model_trace))

    def _one(self, model: Any, scored: Trace, guide: Trace, args: Any, kwargs: Any) -> tuple[Tensor, Terms]:
        call = joint_call(model, scored, guide, args, kwargs)
        if torch.is_grad_enabled():
            warn_if_gradient_lost(scored, call.structure, self.joint_match.warned)
            warn_if_nothing_learned(call, self.joint_match.warned)
        n_particles = self.num_particles if self.vectorize_particles else 1
        factors = {name for name, site in sample_sites(scored) if site["is_observed"]}
        loss = -log_density(scored, factors, "model") / n_particles
        matches = self.joint_match(call)
        for group in matches:
            loss = loss + group.n_data * group.value
        if not bool(loss.detach().isfinite()):
            raise NonFiniteError(
                f"the loss is {float(loss)} though data, latents and their divergence are finite: look at the factors "
                f"{sorted(factors)}"
            )
        n_data = number_of_data(call.observed, call.structure)
        return loss, Terms(
            loss=torch_item(loss) / n_data,
            match={group.name: torch_item(group.value) for group in matches},
            total_match=sum(torch_item(group.value) * group.n_data for group in matches) / n_data,
        )


def _learns(parameter: Tensor) -> bool:
    """Whether a parameter met in a run without gradients would learn: what it was transformed from tells."""
    source = getattr(parameter, "unconstrained", None)
    return bool((parameter if source is None else source()).requires_grad)
