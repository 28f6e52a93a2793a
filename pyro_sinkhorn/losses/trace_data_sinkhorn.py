r"""Optimal transport between simulated and observed data, as a loss for :class:`pyro.infer.SVI`."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyro import poutine
from pyro.infer.util import torch_item
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn

from pyro_sinkhorn.errors import NonFiniteError
from pyro_sinkhorn.losses.base import Batch, SinkhornLoss, Terms
from pyro_sinkhorn.losses.covariates import Covariates
from pyro_sinkhorn.losses.data_columns import Scale
from pyro_sinkhorn.losses.data_match import DataMatch
from pyro_sinkhorn.losses.latent_match import GroupMatch
from pyro_sinkhorn.losses.learned_cost import LearnedCost
from pyro_sinkhorn.losses.matching import MatchOptions
from pyro_sinkhorn.losses.prior import warn_if_gradient_lost
from pyro_sinkhorn.losses.shared import added_up, check_plates, own_share, pooled
from pyro_sinkhorn.losses.simulation import Simulation, check_gradient, run_simulated, simulation_of
from pyro_sinkhorn.ot.checks import Gradient, Value
from pyro_sinkhorn.ot.cost import Cost
from pyro_sinkhorn.ot.divergence import Debias
from pyro_sinkhorn.runs import preserved_buffers
from pyro_sinkhorn.scoring import log_density, number_of_data, run_guide
from pyro_sinkhorn.structure import sample_sites


class Trace_DataSinkhorn(SinkhornLoss):
    r"""Optimal transport between simulated and observed data: minimum Kantorovich estimation.

    .. math::

        N\,w\sum_{\text{groups}}\frac{S(p_\theta(x), \mathrm{data}(x))}{\mathbb{E}\,c(x, x')}
        \;-\;\mathbb{E}_q \log\frac{p(\text{globals})}{q(\text{globals})}

    fits a program that can only be run: it needs no likelihood and no guide. Each call simulates as many data as it is
    given and compares the two clouds by the debiased entropic transport of
    :func:`pyro_sinkhorn.ot.sinkhorn_divergence`. Observations are written as ``Implicit(simulated)``, or with any
    likelihood that has ``rsample``; gradients pass through the simulator into its parameters. ::

        def model(x):
            rate = pyro.param("rate", torch.tensor(1.0), constraint=constraints.positive)
            with pyro.plate("data", len(x)):
                simulated = torch.empty(len(x), 1).exponential_() / rate
                pyro.sample("x", Implicit(simulated, event_dim=1), obs=x)

        svi = SVI(model, lambda x: None, Adam({"lr": 1e-2}), loss=Trace_DataSinkhorn())
        SinkhornProgram(model, loss=Trace_DataSinkhorn()).fit(x)     # the same; no guide is made

    Observed sites in the same plates are compared jointly, one point a datum. Every observed site is simulated, also
    where it is a parent of another. Latents inside the plates are drawn from their prior at every call. A latent
    outside them needs a guide with a density; it is scored as in ``Trace_ELBO``, which makes this a generalised Bayes
    with the divergence in place of the likelihood. ``pyro.factor`` is added.

    :param weight: factor of the divergence, per datum; of use only beside globals or factors
    :param relative_epsilon: entropic regularisation in units of the mean cost between two data. Towards 0 it is optimal
        transport, towards infinity a maximum mean discrepancy with kernel -cost
    :param match_size: units in each half-cloud, at most half of the batch; larger batches are cut into blocks. 128, for
        the default batch of 256: simulated data are further from the data than latents are from their prior, and fewer
        points see less of it
    :param cost: ground cost between data, see :func:`pyro_sinkhorn.ot.sinkhorn`, or a
        :class:`~pyro_sinkhorn.losses.LearnedCost`. ``"euclidean"`` forgives heavy tails
    :param scale: unit of an observed site, estimated once from the first batch. ``"site"``: one number, which leaves the
        distances within a site as they are. ``"column"``: the standard deviation of every column, for summary statistics
        or species in units of their own. None: as they come
    :param covariates: what a conditional simulator was given, appended to both clouds in a unit that spreads it as far as
        the data. A function of the model's arguments that returns one row a slice of the outermost data plate; ``"auto"``:
        floating arguments as long as that plate, but those that were observed as they are; None for nothing. ``"warn"``
        (default) appends nothing and says once where ``"auto"`` would: it cannot know an argument that the data are
        computed from, which must not be appended
    :param debias: ``"independent"`` (unbiased on minibatches), ``"self"`` (fits a law narrower than the data's) or None
    :param tolerance: marginal error at which the solver stops; 1e-2 leaves gradients within about 1%
    :param max_iters: iterations of the solver at most
    :param value: what of the plan is reported, see :func:`pyro_sinkhorn.ot.sinkhorn`; the papers' is ``"sharp"``
    :param gradient: ``"envelope"``, or ``"unrolled"`` through the iterations as in the papers, which the other values
        need; ``tolerance=0`` then makes exactly ``max_iters`` of them
    :param num_particles: simulations a step, each a cloud of its own
    :param vectorize_particles: run them in one batch; noise must then come from ``pyro.sample``
    :param max_plate_nesting: as in Pyro; found out by running the programs once where needed
    :raises ProgramError: model, guide and data do not fit together, or the simulator passes no gradient; naming the site
    :raises NonFiniteError: at the first NaN or infinity, naming its source

    Both clouds must be random in the same way. Simulated data are independent draws; so ``fit`` draws minibatches with
    replacement, and a loop of one's own over few data should: halves that together exhaust the data are not independent.

    Observed values are compared in the embedding of their support (:mod:`pyro_sinkhorn.geometry`): give ``Implicit`` a
    ``support`` to have positive data compared by ratios. Counts and booleans are compared as numbers, classes as one-hot
    rows; such data carry no gradient, but :meth:`loss` can be minimised without one.

    References: Genevay, Peyré, Cuturi 2017, *Learning generative models with Sinkhorn divergences*; Bassetti, Bodini,
    Regazzini 2006, *On minimum Kantorovich distance estimators*; Salimans et al. 2018 (the independent halves).

    >>> import pyro
    >>> from pyro.infer import SVI
    >>> from pyro_sinkhorn import Implicit
    >>> def model(x):
    ...     scale = pyro.param("scale", torch.tensor(0.5))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", Implicit(scale * torch.randn(len(x), 2), event_dim=1), obs=x)
    >>> x = 2 * torch.randn(256, 2)
    >>> svi = SVI(model, lambda x: None, pyro.optim.Adam({"lr": 0.1}), loss=Trace_DataSinkhorn())
    >>> for _ in range(60):
    ...     _ = svi.step(x)
    >>> abs(pyro.param("scale").item() / x.std().item() - 1) < 0.1
    True
    """

    needs_guide = False
    replaces_data = True

    def __init__(
        self,
        weight: float = 1.0,
        relative_epsilon: float = 0.1,
        match_size: int = 128,
        cost: Cost | LearnedCost = "sqeuclidean",
        scale: Scale = "site",
        covariates: Covariates = "warn",
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
        if not (weight > 0 and math.isfinite(weight)):
            raise ValueError(f"weight is {weight}: expected a positive number")
        if scale not in ("site", "column", None):
            raise ValueError(f"scale is {scale!r}: expected 'site', 'column' or None")
        if not (covariates in ("warn", "auto", None) or callable(covariates)):
            raise ValueError(
                f"covariates is {covariates!r}: expected 'warn', 'auto', None or a function of the model's arguments"
            )
        if isinstance(cost, (nn.Module, type)):
            raise ValueError(f"cost is {cost!r}: for a network that learns, pass cost=LearnedCost(network)")
        options = MatchOptions(
            debias, relative_epsilon, match_size, cost, tolerance, max_iters, backend, value, gradient
        )
        matcher = DataMatch(options, scale, covariates)
        super().__init__(matcher, num_particles, vectorize_particles, max_plate_nesting, retain_graph)
        self.weight = weight

    @property
    def not_shared(self) -> str:
        """Processes can share it, but for a cost that learns."""
        return "" if self.learned_cost is None else "a LearnedCost has an optimiser of its own"

    @property
    def data_match(self) -> DataMatch:
        """What compares the data."""
        return self.matcher

    @property
    def learned_cost(self) -> LearnedCost | None:
        """The cost, if it is one that learns."""
        cost = self.data_match.options.cost
        return cost if isinstance(cost, LearnedCost) else None

    def config(self) -> dict[str, Any]:
        """Arguments that make an equal loss."""
        own = {
            "weight": self.weight,
            "scale": self.data_match.scale,
            "covariates": self.data_match.covariates,
        }
        return super().config() | own

    def state(self) -> dict[str, Any]:
        """Units and mean costs of the data, and what a learned cost has learned."""
        learned = {} if self.learned_cost is None else {"learned_cost": self.learned_cost.state()}
        return super().state() | learned

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state`."""
        super().load_state(state)
        if self.learned_cost is not None and "learned_cost" in state:
            self.learned_cost.load_state(state["learned_cost"])

    def modules(self) -> dict[str, nn.Module]:
        """The network of a learned cost."""
        return {} if self.learned_cost is None else {"the network of the cost": self.learned_cost.network}

    def to(self, device: torch.device) -> None:
        """Move a learned cost."""
        if self.learned_cost is not None:
            self.learned_cost.to(device)

    def cost_step(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """One ascent step of a learned cost; the program stays as it is.

        :returns: the normalised divergence before the step
        :raises ValueError: the cost is not a learned one
        :raises NonFiniteError: the divergence or its gradient is not finite; the cost stays as it is
        """
        if self.learned_cost is None:
            raise ValueError("the cost of this loss does not learn: make it with cost=LearnedCost(network)")
        with poutine.block():  # nothing of this belongs to an SVI step around it
            with torch.no_grad(), preserved_buffers():
                calls = [
                    self._simulation(model, simulated, guide_trace, args, kwargs)
                    for simulated, guide_trace in self._get_traces(model, guide, args, kwargs)
                ]
            with torch.enable_grad():
                values = [_total(self.data_match(call)) for call in calls]
                value = torch.stack(values).mean()
                if value.requires_grad:  # else the batch is masked out
                    self.learned_cost.ascend(value)
        return torch_item(value)

    def before_step(self, model: Any, guide: Any, draw: Callable[[], Batch]) -> None:
        """Steps of a learned cost, each on a minibatch of its own."""
        if self.learned_cost is not None:
            for _ in range(self.learned_cost.num_steps):
                args, kwargs = draw()
                self.cost_step(model, guide, *args, **kwargs)

    @contextmanager
    def kept_on_error(self) -> Iterator[None]:
        """A learned cost goes back to what it was if an error leaves."""
        if self.learned_cost is None:
            yield
            return
        before = copy.deepcopy(self.learned_cost.state())
        try:
            yield
        except BaseException:
            self.learned_cost.load_state(before)
            raise

    def simulation(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Simulation:
        """Simulate once, beside the data; what a report compares."""
        guide_trace = run_guide(guide, args, kwargs)
        return self._simulation(
            model, run_simulated(model, guide_trace, args, kwargs), guide_trace, args, kwargs
        )

    def _simulation(self, model: Any, simulated: Trace, guide: Trace, args: Any, kwargs: Any) -> Simulation:
        runner = self._vectorized_num_particles(model) if self.vectorize_particles else model
        return simulation_of(runner, simulated, guide, args, kwargs)

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        guide_trace = run_guide(guide, args, kwargs)
        return run_simulated(model, guide_trace, args, kwargs), guide_trace

    def _one(self, model: Any, scored: Trace, guide: Trace, args: Any, kwargs: Any) -> tuple[Tensor, Terms]:
        call = simulation_of(model, scored, guide, args, kwargs)
        structure = call.structure
        if torch.is_grad_enabled():
            check_gradient(call)
            warn_if_gradient_lost(scored, structure, self.data_match.warned)
        n_particles = self.num_particles if self.vectorize_particles else 1
        names = set(structure.globals)
        log_ratio = log_density(guide, names, "guide") - log_density(scored, names, "model")
        factors = {name for name, site in sample_sites(scored) if site["is_observed"]}
        check_plates(structure, call.groups)
        factor = added_up(scored, structure, factors, lambda names: log_density(scored, names, "model"))
        loss = own_share(log_ratio) / n_particles - factor / n_particles
        if self.learned_cost is None:
            matches = self.data_match(call)
        else:
            with self.learned_cost.frozen():
                matches = self.data_match(call)
        for group in matches:
            loss = loss + own_share(self.weight * group.n_data * group.value, whole_gradient=True)
        n_data = number_of_data(call.observed, structure)
        terms = Terms(
            loss=torch_item(loss) / n_data,
            match={group.name: torch_item(group.value) for group in matches},
            globals=torch_item(own_share(log_ratio)) / n_particles / n_data,
            total_match=sum(torch_item(own_share(group.value)) * group.n_data for group in matches) / n_data,
        )
        loss, terms = pooled(loss, terms, n_data, log_ratio)
        if not bool(loss.detach().isfinite()):
            raise NonFiniteError(
                f"the loss is {float(loss)} though data, simulated data and their divergence are finite: look at the "
                f"densities of the global latents {sorted(names)} and of the factors {sorted(factors)}"
            )
        return loss, terms


def _total(matches: list[GroupMatch]) -> Tensor:
    """Divergence per datum of the outermost plate, over all groups."""
    return torch.stack([group.value for group in matches]).sum()
