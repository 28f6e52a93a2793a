r"""Sinkhorn latent matching as a loss for :class:`pyro.infer.SVI`."""

from __future__ import annotations

import math
from typing import Any, Literal, Self, cast

import torch
from pyro.infer.util import torch_item
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_sinkhorn.errors import NonFiniteError, ProgramError
from pyro_sinkhorn.losses.base import SinkhornLoss, Terms
from pyro_sinkhorn.losses.call import Call
from pyro_sinkhorn.losses.cliques import Grouping, check_grouping
from pyro_sinkhorn.losses.latent_match import LatentMatch
from pyro_sinkhorn.losses.learned_cost import LearnedCost
from pyro_sinkhorn.losses.matching import MatchOptions
from pyro_sinkhorn.losses.shared import added_up, own_share, pooled
from pyro_sinkhorn.losses.site_cost import GivenCost
from pyro_sinkhorn.losses.states import Enumeration, ImpossibleStateError
from pyro_sinkhorn.losses.weight_rule import WeightRule
from pyro_sinkhorn.ot.checks import Gradient, Value
from pyro_sinkhorn.ot.divergence import Debias
from pyro_sinkhorn.scoring import (
    blame,
    check_guide,
    check_inputs,
    check_supports,
    log_density,
    number_of_data,
    scored_sites,
)
from pyro_sinkhorn.structure import Structure, structure_of


class Trace_Sinkhorn(SinkhornLoss):
    r"""Reconstruction plus optimal transport between the aggregated posterior and the prior.

    .. math::

        -\,\mathbb{E}_{q}\log p(x\mid z)\;+\;N\,w\sum_{\text{groups}}\frac{S(q(z), p(z))}{\mathbb{E}\,c(z_p,z_p')}
        \;-\;\mathbb{E}_q \log\frac{p(\text{globals})}{q(\text{globals})}

    where :math:`q(z)` is the *aggregated posterior*, the cloud of latents that the guide makes of a batch, and
    :math:`S` the debiased entropic transport of :func:`pyro_sinkhorn.ot.sinkhorn_divergence`. Only samples of local
    latents are used, of guide and prior alike: neither needs a density. Global latents are scored with their
    densities as in ``Trace_ELBO``. The scale is an ELBO's: a sum over data, with plate scales and masks.

    The guide learned this way is an encoder; it is **not** a Bayesian posterior, and may become deterministic.

    :param prior_weight: weight :math:`w` of the normalised match, per datum, so that it means the same at every batch
        size. The default of 10 is a start: raise it until the match reaches its noise floor, see ``match_report``.
        ``"auto"`` begins with 10 and raises it during training, see :mod:`pyro_sinkhorn.losses.weight_rule`
    :param relative_epsilon: entropic regularisation in units of the mean prior-prior cost of the group. Measured on
        Gaussians, .02 to .2 do equally well in 2 and 8 dimensions and .1 best in 64; on a sparse Dirichlet .05 and .1
        cannot be told apart (benchmarks/no_shrinkage.py --sweep)
    :param match_size: units in each half-cloud, at most half of the batch. The divergence between unequal laws depends
        on it, so it is fixed instead of following the batch; larger batches are cut into blocks
    :param groups: which latents are matched together, each clique with an equal share of the weight. ``"joint"``
        (default): all of one plate stack. ``"markov"``: every latent with its parents in the model's graph, for priors of
        many latents that factorise, such as time series. ``"marginal"``: site by site, which loses their dependence.
        ``[("z_0", "z_1"), ("z_1", "z_2")]``: as given. See docs/structure.md for when each is right
    :param num_prior_batches: independent prior clouds a step; more reduce the variance of the gradient
    :param debias: ``"independent"`` (unbiased on minibatches), ``"self"`` (shrinks latents) or None, for comparison
    :param cost: ground cost. None (default): that of every site, which is the squared distance of its embedding unless the
        model's ``infer={"sinkhorn": {"cost": ...}}`` or a registered geometry says otherwise. ``{site: cost}`` overrides
        these: a name (``"geodesic"`` on spheres and circles, ``"l1"``, ``"euclidean"``, ``"sqeuclidean"``) or a function
        of two tensors of values, ``(n, *event_shape)`` and ``(m, *event_shape)``, that returns ``(n, m)``. A single name or
        function compares the concatenated embeddings of a whole group
    :param tolerance: marginal error at which the solver stops; 1e-2 leaves gradients within about 1%
    :param max_iters: iterations of the solver at most
    :param value: what of the plan is reported, see :func:`pyro_sinkhorn.ot.sinkhorn`; the papers' is ``"sharp"``
    :param gradient: ``"envelope"``, or ``"unrolled"`` through the iterations as in the papers, which the other values
        need; ``tolerance=0`` then makes exactly ``max_iters`` of them
    :param num_particles: guide draws a step; each has a cloud of its own
    :param vectorize_particles: run them in one batch
    :param max_plate_nesting: as in Pyro; found out by running the programs once where needed
    :raises ProgramError: where model, guide and data do not fit together, naming the site
    :raises NonFiniteError: at the first NaN or infinity, naming its source

    References: Patrini et al. 2019, *Sinkhorn AutoEncoders*; Salimans et al. 2018, *Improving GANs using optimal
    transport* (the independent halves); Tolstikhin et al. 2018, *Wasserstein auto-encoders*.

    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer import SVI
    >>> from pyro_sinkhorn import AutoImplicit
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Dirichlet(torch.ones(3)))
    ...         pyro.sample("x", dist.Normal(z, 0.1).to_event(1), obs=x)
    >>> x = dist.Dirichlet(torch.ones(3)).sample((128,))
    >>> svi = SVI(model, AutoImplicit(model), pyro.optim.Adam({"lr": 1e-3}), loss=Trace_Sinkhorn(prior_weight=10.0))
    >>> isinstance(svi.step(x), float)
    True
    """

    def __init__(
        self,
        prior_weight: float | Literal["auto"] = 10.0,
        relative_epsilon: float = 0.1,
        match_size: int = 64,
        groups: Grouping = "joint",
        num_prior_batches: int = 1,
        debias: Debias = "independent",
        cost: GivenCost = None,
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
        if prior_weight == "auto":
            if debias != "independent":
                raise ValueError(
                    f"prior_weight='auto' with debias={debias!r}: only independent halves have a floor of zero, which "
                    "the rule looks for; give a number"
                )
        elif isinstance(prior_weight, str) or not (prior_weight >= 0 and math.isfinite(prior_weight)):
            raise ValueError(f"prior_weight is {prior_weight!r}: expected a number of at least 0, or 'auto'")
        if num_prior_batches < 1:
            raise ValueError(f"num_prior_batches is {num_prior_batches}: expected at least 1")
        if isinstance(cost, LearnedCost):
            raise ValueError(
                "a LearnedCost is trained by Trace_DataSinkhorn alone: give Trace_Sinkhorn a fixed cost"
            )
        options = MatchOptions(
            debias, relative_epsilon, match_size, cost, tolerance, max_iters, backend, value, gradient
        )
        matcher = LatentMatch(options, check_grouping(groups), num_prior_batches)
        super().__init__(matcher, num_particles, vectorize_particles, max_plate_nesting, retain_graph)
        self.prior_weight = prior_weight
        self._rule = WeightRule() if prior_weight == "auto" else None

    @property
    def weight(self) -> float:
        """The weight now: ``prior_weight``, or what ``"auto"`` has come to."""
        return cast(float, self.prior_weight) if self._rule is None else self._rule.weight

    def fresh(self) -> Self:
        """A copy that has seen no program."""
        other = super().fresh()
        other._rule = None if self._rule is None else WeightRule()
        return other

    def state(self) -> dict[str, Any]:
        """What was estimated or learned."""
        return super().state() | ({} if self._rule is None else {"weight_rule": self._rule.state()})

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state`."""
        super().load_state(state)
        if self._rule is not None and "weight_rule" in state:
            self._rule.load(state["weight_rule"])

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """An estimate of the loss; its gradients are added to the parameters'. ``"auto"`` learns from these calls alone."""
        value = super().loss_and_grads(model, guide, *args, **kwargs)
        if self._rule is not None:
            self._rule.observe(self.terms.total_match)
        return value

    @property
    def not_shared(self) -> str:
        """Processes can share it."""
        return ""

    @property
    def latent_match(self) -> LatentMatch:
        """What compares the latents."""
        return self.matcher

    def config(self) -> dict[str, Any]:
        """Arguments that make an equal loss."""
        own = {
            "prior_weight": self.prior_weight,
            "groups": self.latent_match.grouping,
            "num_prior_batches": self.latent_match.num_prior_batches,
        }
        return super().config() | own

    def _check_pair(self, guide: Any, model_trace: Trace) -> None:
        check_inputs(getattr(guide, "last_inputs", {}), model_trace)

    def _enumeration(self, guide: Trace, scored: Trace, structure: Structure) -> Enumeration | None:
        """The states that the guide enumerated, with one of them drawn a datum; here it enumerates none."""
        return None

    def _one(self, model: Any, scored: Trace, guide: Trace, args: Any, kwargs: Any) -> tuple[Tensor, Terms]:
        structure = structure_of(scored)
        try:
            enumeration = self._enumeration(guide, scored, structure)
        except NonFiniteError as error:
            raise (blame(scored, guide, structure) or error) from error
        enumerated = {} if enumeration is None else {site.name: site.log_prob for site in enumeration.sites}
        check_guide(guide, structure, enumerated)
        n_particles = self.num_particles if self.vectorize_particles else 1
        try:
            check_supports(scored, structure, enumerated)
            over_states, nesting, at_drawn = None, float("inf"), scored
            if enumeration is not None:
                over_states, nesting = enumeration.expectation, self.max_plate_nesting
                at_drawn = enumeration.at_drawn(scored)

            def likelihood(names: set[str]) -> Tensor:
                return log_density(scored, names, "model", over_states, nesting) / n_particles

            log_likelihood = added_up(scored, structure, scored_sites(scored), likelihood)
            log_ratio = torch.zeros(())
            if structure.globals:
                names = set(structure.globals)
                log_ratio = log_density(guide, names, "guide") - log_density(scored, names, "model")
                log_ratio = log_ratio / n_particles
            call = Call(model, args, kwargs, structure, at_drawn, enumeration)
            matches = self.latent_match(call) if self.weight else []
        except ImpossibleStateError:
            raise
        except (NonFiniteError, ProgramError) as error:
            # A NaN upstream shows first as somebody else's complaint: report the cause, not the symptom.
            raise (blame(scored, guide, structure) or error) from error
        loss = -log_likelihood + own_share(log_ratio)
        for group in matches:
            loss = loss + own_share(self.weight * group.n_data * group.value, whole_gradient=True)
        n_data = number_of_data(scored, structure)
        terms = Terms(
            loss=torch_item(loss) / n_data,
            reconstruction=-torch_item(log_likelihood) / n_data,
            match={group.name: torch_item(group.value) for group in matches},
            globals=torch_item(own_share(log_ratio)) / n_data,
            total_match=sum(torch_item(own_share(group.value)) * group.n_data for group in matches) / n_data,
        )
        loss, terms = pooled(loss, terms, n_data, log_ratio)
        if not bool(loss.detach().isfinite()):
            raise blame(scored, guide, structure) or NonFiniteError(
                f"the loss is {float(loss)} though data, latents and densities are finite"
            )
        return loss, terms
