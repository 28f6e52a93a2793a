"""What a program can be asked: its methods that learn nothing."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from pyro_sinkhorn import snapshot
from pyro_sinkhorn.calibration import Calibration
from pyro_sinkhorn.diagnostics.bound import wasserstein_bound
from pyro_sinkhorn.diagnostics.diagnosis import Diagnosis, posterior_report
from pyro_sinkhorn.diagnostics.matching import match_report
from pyro_sinkhorn.diagnostics.simulated_range import warn_of_range
from pyro_sinkhorn.errors import ProgramError, checked_integer
from pyro_sinkhorn.export import to_arviz
from pyro_sinkhorn.losses.base import SinkhornLoss
from pyro_sinkhorn.losses.trace_energy_score import Trace_EnergyScore
from pyro_sinkhorn.modules import training_mode
from pyro_sinkhorn.refinement import Refined, refine
from pyro_sinkhorn.rng import RandomStream, undisturbed
from pyro_sinkhorn.sampling import as_matrix, encoder_draws, posterior_draws, program_draws


class Queries:
    """Methods of :class:`~pyro_sinkhorn.SinkhornProgram` that leave it as it is."""

    model: Any
    guide: Any
    loss: Any
    num_steps: int
    calibration: Calibration | None
    #: What the last refinement of posterior draws did and cost.
    refined: Refined | None = None
    _inputs: Any
    _guarded: Any
    _all_modules: Any
    active: Any

    def encode(
        self, *args: Any, num_samples: int = 1, seed: int | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Latents that the guide makes of data: ``{site: (num_samples, *plates, *event)}``, Predictive's shapes.

        These are draws of the encoder, which matching the prior does not make a posterior.
        """
        args, kwargs = self._inputs(args, kwargs)
        with self._evaluating(seed, args, kwargs):
            return encoder_draws(self.guide, num_samples, args, kwargs)

    def transform(self, *args: Any, seed: int | None = 0, **kwargs: Any) -> np.ndarray:
        """One encoder draw as a matrix with a row a datum, as scikit-learn's estimators expect: ``(n, columns)``.

        Local latents side by side, in the program's order; what a datum has several of (inner plates, vectors) is flattened.
        Latents outside the data have no row, and are left out.

        :param seed: of the encoder's noise, so that equal data give equal codes; None draws anew
        :raises ProgramError: no latent belongs to a datum
        """
        draws = self.encode(*args, seed=seed, **kwargs)
        args, kwargs = self._inputs(args, kwargs)
        with self._evaluating(None, args, kwargs), undisturbed():
            return as_matrix(self.model, draws, args, kwargs)

    @property
    def has_posterior(self) -> bool:
        """Whether :meth:`posterior` can answer: after ``calibrate()``, or a fit by a loss that makes a posterior."""
        fitted = getattr(self.loss, "makes_posterior", False) and self.num_steps > 0
        return fitted or (self.calibration is not None and self.calibration.num_steps > 0)

    def posterior(
        self,
        *args: Any,
        num_samples: int = 100,
        seed: int | None = None,
        check_range: bool = True,
        refine_steps: int = 0,
        kernel: str = "hmc",
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Posterior draws of all latents given data: ``{site: (num_samples, *plates, *event)}``, Predictive's shapes.

        :param check_range: simulate from the program and warn where the data lie outside of what it simulates: no guide
            that learned from simulations knows anything there
        :param refine_steps: above 0, every draw starts a Markov chain of so many steps towards the exact posterior, for
            programs whose sites have densities: see :func:`pyro_sinkhorn.refinement.refine`. What it cost and how it went is
            printed, and kept in ``refined``
        :param kernel: of these chains, ``"hmc"`` (default: ``"mala"`` is cheaper a step and weak above a few dimensions) or
            ``"nuts"``
        :raises ProgramError: there is no posterior: encoder draws are none
        """
        args, kwargs = self._inputs(args, kwargs)
        guide = self._posterior_guide()
        with self._evaluating(seed, args, kwargs):
            if check_range:
                warn_of_range(self.model, args, kwargs)
            draws = posterior_draws(self.model, guide, num_samples, args, kwargs)
            if not checked_integer("refine_steps", refine_steps, 0):
                return draws
            with torch.enable_grad():
                self.refined = refine(
                    self.model, draws, *args, num_steps=refine_steps, kernel=kernel, **kwargs
                )
        print(self.refined)
        return self.refined.draws

    def _posterior_guide(self) -> Any:
        if not self.has_posterior:
            name = type(self.loss).__name__
            raise ProgramError(
                "this program has no posterior yet: "
                + (
                    "call fit() first"
                    if getattr(self.loss, "makes_posterior", False)
                    else f"the guide of {name} is an encoder, whose draws do not say how uncertain they are. Call "
                    "calibrate(data), which trains a posterior on simulated data, or use encode()"
                )
            )
        if self.calibration is None:
            return self.guide
        if self.calibration.guide is not self.guide and self.calibration.program_steps != self.num_steps:
            warnings.warn(
                f"the program was fitted for {self.num_steps - self.calibration.program_steps} more steps after calibrate(): "
                "these are draws from the posterior of the program as it was then. Call calibrate() again",
                UserWarning,
                stacklevel=3,
            )
        return self.calibration.guide

    def generate(
        self, num_samples: int, *args: Any, seed: int | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Draws from the program with its learned parameters: ``{site: (num_samples, *plates, *event)}``.

        The arguments give plate sizes and covariates; observed sites are sampled like all others.
        """
        args, kwargs = self._inputs(args, kwargs)
        with self._evaluating(seed, args, kwargs):
            return program_draws(self.model, num_samples, args, kwargs)

    def diagnose(
        self,
        *args: Any,
        num_floor: int = 20,
        num_simulations: int = 200,
        bound: bool = False,
        seed: int | None = None,
        **kwargs: Any,
    ) -> Diagnosis:
        """Print and return tables of what there is to check; ``.plot()`` of it draws the figures of a posterior.

        Of a loss that matches clouds, where it was fitted: reconstruction, match of each group against its noise floor,
        encoder variance (a collapsed one is said). Of a program with a posterior: whether the data lie in the range of its
        simulations, simulation-based calibration, coverage, contraction.

        :param num_floor: evaluations of match and floor each
        :param num_simulations: simulated data, or data sets where there are globals, to check the posterior on; 1000 and
            more see finer errors
        :param bound: also bound the Wasserstein distance between data and model by reconstruction, match and slope of the
            generator: see :func:`~pyro_sinkhorn.diagnostics.wasserstein_bound`
        """
        args, kwargs = self._inputs(args, kwargs)
        loss = self.loss if isinstance(self.loss, SinkhornLoss) else None
        with self._evaluating(seed, args, kwargs):
            match = posterior = limit = None
            # An encoder that was never fitted is none of what a program that was only calibrated has to show.
            fitted = self.num_steps > 0 or not self.has_posterior
            if fitted and not isinstance(loss, Trace_EnergyScore):
                match = match_report(self.model, self.guide, *args, loss=loss, num_floor=num_floor, **kwargs)
            if self.has_posterior:
                guide = self._posterior_guide()
                posterior = posterior_report(self.model, guide, args, kwargs, num_simulations)
            if bound:
                limit = wasserstein_bound(self.model, self.guide, *args, **kwargs)
        found = Diagnosis(match, posterior, limit)
        print(found)
        return found

    def to_arviz(self, *args: Any, num_samples: int = 500, seed: int | None = None, **kwargs: Any) -> Any:
        """Draws, data and densities for ArviZ, ``coords=`` and ``dims=`` too: see :func:`~pyro_sinkhorn.to_arviz`."""
        return to_arviz(self, *args, num_samples=num_samples, seed=seed, **kwargs)

    @contextmanager
    def _evaluating(self, seed: int | None, args: Any, kwargs: Any) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(self._guarded(args, kwargs))
            if seed is not None:
                stack.enter_context(RandomStream(seed).active())
            # Before the modules are lent, so that the originals borrow the mode as well.
            stack.enter_context(training_mode(self._all_modules(), training=False))
            stack.enter_context(self.active())
            stack.enter_context(torch.no_grad())
            snapshot.wake_guide(cast(Any, self), args, kwargs)
            yield
