"""What every loss of this package has in common: Pyro's contract, its terms, and what a program asks of it."""

from __future__ import annotations

import copy
import inspect
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.infer.util import torch_item
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn

from pyro_sinkhorn.errors import checked_integer
from pyro_sinkhorn.losses.registration import warn_of_untrained
from pyro_sinkhorn.losses.shared import shared, summed_gradients
from pyro_sinkhorn.rng import undisturbed
from pyro_sinkhorn.runs import preserved_buffers
from pyro_sinkhorn.scoring import run_guide, run_scored
from pyro_sinkhorn.structure import sample_sites

Batch = tuple[tuple[Any, ...], dict[str, Any]]
Loss = TypeVar("Loss", bound="SinkhornLoss")


@dataclass
class Terms:
    """The parts of the last loss, in units a person can compare: all are per datum.

    loss:            the whole
    reconstruction:  -log p(x | z); NaN for a loss that has no likelihood
    match:           normalised divergence of each group or clique, without its weight; it may be negative
    globals:         log q - log p of the global latents
    total_match:     what the weight multiplies: the matches of all, each with its share of the data
    energy:          score of a guide on simulated data, 1 being that of the prior; NaN for a loss that has none
    """

    loss: float = math.nan
    reconstruction: float = math.nan
    match: dict[str, float] = field(default_factory=dict)
    globals: float = 0.0
    total_match: float = 0.0
    energy: float = math.nan


class SinkhornLoss(ELBO):
    """A loss between clouds: a subclass says what one pair of traces costs.

    needs_guide:    whether a program without a guide is to be given ``AutoImplicit``
    replaces_data:  whether ``fit`` draws minibatches with replacement
    default_guide:  class of the guide of a program that is given none
    guide_of_globals: the same for a program with latents outside its data plates, where that differs
    makes_posterior: whether the guide that it trains is a posterior
    whole_data_sets: whether globals are read off the data of a call, which then must be all of them
    not_shared:     why several processes cannot share it, as the start of a sentence; empty where they can
    in_step_with_others: parameters that the processes that share it have taken over from the first
    """

    needs_guide = True
    replaces_data = False
    default_guide: Any = None
    guide_of_globals: Any = None
    makes_posterior = False
    whole_data_sets = False
    in_step_with_others: frozenset[tuple[str, int]] = frozenset()

    @property
    def not_shared(self) -> str:
        """Why several processes cannot share this loss."""
        return f"{type(self).__name__} compares what one process has"

    def __init__(
        self,
        matcher: Any,
        num_particles: int,
        vectorize_particles: bool,
        max_plate_nesting: float,
        retain_graph: bool | None,
    ) -> None:
        super().__init__(
            num_particles=checked_integer("num_particles", num_particles, 1),
            vectorize_particles=vectorize_particles,
            max_plate_nesting=max_plate_nesting,
            retain_graph=retain_graph,
        )
        #: What compares the clouds and owns what is estimated of them: a LatentMatch or a DataMatch.
        self.matcher = matcher
        self._given_plate_nesting = max_plate_nesting
        self._initial_plate_nesting = self.max_plate_nesting  # before it is guessed from a program
        self.terms = Terms()
        self._checked_registration = False

    # What a program asks of its loss.

    def config(self) -> dict[str, Any]:
        """Arguments that make an equal loss."""
        return self.matcher.options.config() | {
            "num_particles": self.num_particles,
            "vectorize_particles": self.vectorize_particles,
            "max_plate_nesting": self._given_plate_nesting,
            "retain_graph": self.retain_graph,
        }

    def fresh(self: Loss) -> Loss:
        """A copy that has seen no program: what another one needs."""
        other = copy.copy(self)
        other.max_plate_nesting = self._initial_plate_nesting
        other.matcher = self.matcher.fresh()
        other.terms = Terms()
        other._checked_registration = False
        other.in_step_with_others = frozenset()
        return other

    def state(self) -> dict[str, Any]:
        """What was estimated or learned, as tensors and numbers."""
        return vars(self.matcher.state)

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state`; other keys are left alone."""
        self.matcher.state.load(state)

    def modules(self) -> dict[str, nn.Module]:
        """Networks that belong to the loss itself."""
        return {}

    def to(self, device: torch.device) -> None:
        """Move what belongs to the loss; estimates follow the data by themselves."""

    @contextmanager
    def kept_on_error(self) -> Iterator[None]:
        """What belongs to the loss is as before a step if an error leaves it."""
        yield

    def __repr__(self) -> str:
        """The arguments that differ from the defaults."""
        defaults = self._defaults()
        said = [f"{name}={value!r}" for name, value in self.config().items() if value != defaults.get(name)]
        return f"{type(self).__name__}({', '.join(said)})"

    def _defaults(self) -> dict[str, Any]:
        """Defaults of the arguments."""
        return {name: p.default for name, p in inspect.signature(type(self)).parameters.items()}

    def before_step(self, model: Any, guide: Any, draw: Callable[[], Batch]) -> None:
        """Called by ``fit`` before every step.

        :param draw: draws a minibatch, for losses that have steps of their own to make
        """

    # The contract of pyro.infer.ELBO.

    def loss(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        """An estimate of the loss, without gradients."""
        with torch.no_grad():
            return torch_item(self.differentiable_loss(model, guide, *args, **kwargs))

    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """An estimate of the loss as a tensor to differentiate."""
        with shared(self, model, guide, args, kwargs):
            losses, terms = zip(*self._particles(model, guide, args, kwargs), strict=True)
        self.terms = mean_terms(terms)
        return sum(losses) / len(losses)

    def loss_and_grads(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> float:
        """An estimate of the loss; its gradients are added to the parameters', a particle at a time."""
        total, terms = 0.0, []
        n = 1 if self.vectorize_particles else self.num_particles
        with shared(self, model, guide, args, kwargs) as ranks, summed_gradients(ranks, self):
            if not self._checked_registration:
                self._checked_registration = True
                warn_of_untrained(model, guide, args, kwargs)
            for loss, term in self._particles(model, guide, args, kwargs):
                if loss.requires_grad:
                    (loss / n).backward(retain_graph=self.retain_graph)
                total += torch_item(loss) / n
                terms.append(term)
        self.terms = mean_terms(terms)
        return total

    def _guess_max_plate_nesting(self, model: Any, guide: Any, args: Any, kwargs: Any) -> None:
        """As Pyro's, but scores nothing: an implicit guide has no density to score.

        The random state is left alone, since a loss that comes out of a file asks again.
        """
        with poutine.block(), torch.no_grad(), preserved_buffers(), undisturbed():
            guide_trace = run_guide(guide, args, kwargs)
            model_trace = run_scored(model, guide_trace, args, kwargs)
        dims = [
            frame.dim
            for trace in (model_trace, guide_trace)
            for _, site in sample_sites(trace)
            for frame in site["cond_indep_stack"]
            if frame.vectorized
        ]
        self.max_plate_nesting = -min(dims) if dims else 0
        if self.vectorize_particles and self.num_particles > 1:
            self.max_plate_nesting += 1

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        guide_trace = run_guide(guide, args, kwargs)
        return run_scored(model, guide_trace, args, kwargs), guide_trace

    # One particle after the other, or all in one pair of traces.

    def _particles(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Iterator[tuple[Tensor, Terms]]:
        runner = model
        for model_trace, guide_trace in self._get_traces(model, guide, args, kwargs):
            if self.vectorize_particles:
                runner = self._vectorized_num_particles(model)
            self._check_pair(guide, model_trace)
            yield self._one(runner, model_trace, guide_trace, args, kwargs)

    def _check_pair(self, guide: Any, model_trace: Trace) -> None:
        """Complain where guide and model do not speak of the same data."""

    @abstractmethod
    def _one(self, model: Any, scored: Trace, guide: Trace, args: Any, kwargs: Any) -> tuple[Tensor, Terms]:
        """Loss of one pair of traces, and its terms."""


def mean_terms(terms: Sequence[Terms]) -> Terms:
    """Averages over particles."""
    n = len(terms)
    return Terms(
        loss=sum(t.loss for t in terms) / n,
        reconstruction=sum(t.reconstruction for t in terms) / n,
        match={name: sum(t.match[name] for t in terms) / n for name in terms[0].match},
        globals=sum(t.globals for t in terms) / n,
        total_match=sum(t.total_match for t in terms) / n,
        energy=sum(t.energy for t in terms) / n,
    )
