"""A model with its guide, its loss and its fitted state."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from pyro.infer import ELBO
from pyro.optim.optim import PyroOptim
from torch import nn

from pyro_sinkhorn import optimiser
from pyro_sinkhorn.calibration import Calibration, calibrate, calibration_for, undone_on_error
from pyro_sinkhorn.fitting import Callback
from pyro_sinkhorn.fitting.loop import FitOptions, run
from pyro_sinkhorn.losses.base import SinkhornLoss
from pyro_sinkhorn.losses.trace_energy_score import Trace_EnergyScore
from pyro_sinkhorn.modules import Owned, shared_copy, training_mode
from pyro_sinkhorn.notebook import program_html
from pyro_sinkhorn.parts import checked_parts, guide_for, loss_for
from pyro_sinkhorn.persistence import Persistent
from pyro_sinkhorn.queries import Queries
from pyro_sinkhorn.reachable import find_modules
from pyro_sinkhorn.recovery import explained_dtypes, unmade_on_error
from pyro_sinkhorn.rng import RandomStream
from pyro_sinkhorn.training import Epoch, History, as_tensor, by_rows, is_lazy


class SinkhornProgram(Queries, Persistent):
    """A Pyro model together with the guide, the loss and the state that belong to it.

    The program owns copies of the modules that the model refers to (``program.modules``), a parameter store and a
    random stream: two programs in one process share nothing, even when made from one function, and the modules in the
    user's hands keep the weights they had. It is still callable as the model.

    :param model: a Pyro program, function or module, with an observed site in a plate. Of another program, its model,
        and its guide and loss where none are given
    :param guide: a guide; default ``AutoImplicit(model)``, ``AutoPosterior(model)`` for ``Trace_EnergyScore`` and, where
        there are globals, ``Trace_JointSinkhorn``, or none for ``Trace_DataSinkhorn``. A module is
        copied; a class such as ``AutoImplicit``, or a ``functools.partial`` of one, is called with the model
    :param loss: default ``Trace_Sinkhorn()``
    :param encoder: for the default guide, see :class:`~pyro_sinkhorn.AutoImplicit`
    :raises ProgramError: where these do not fit together

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Dirichlet(torch.ones(3)))
    ...         pyro.sample("x", dist.Normal(z, 0.1).to_event(1), obs=x)
    >>> program = SinkhornProgram(model)
    >>> x = dist.Dirichlet(torch.ones(3)).sample((200,))
    >>> program.fit(x, num_steps=3, batch_size=128, seed=0, progress=False)
    SinkhornProgram(model, AutoImplicit, Trace_Sinkhorn, 3 steps)
    >>> program.encode(x)["z"].shape
    torch.Size([1, 200, 3])
    >>> program.generate(5, x[:1])["x"].shape
    torch.Size([5, 1, 3])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Any = None,
        loss: ELBO | None = None,
        *,
        encoder: nn.Module | None = None,
    ) -> None:
        if isinstance(model, SinkhornProgram):
            guide = model._guide_given if guide is None and encoder is None else guide
            loss = model._loss_given if loss is None else loss
            model = model.model
        model, guide, loss = checked_parts(model, guide, loss, encoder)
        self.model: Callable[..., Any] = model
        self._guide_given: Any = guide
        self._loss_given: Any = loss
        functools.update_wrapper(self, model, updated=())
        self.reset()

    def reset(self) -> SinkhornProgram:
        """Back to the state before any ``fit``: modules copied anew from the user's, parameters and history gone."""
        guide = guide_for(self._guide_given, self._loss_given, self.model)
        found = find_modules(self.model)
        known = {id(module) for module in found.values()}
        if isinstance(guide, nn.Module):
            known |= {id(module) for module in guide.modules()}
        found |= {f"guide.{name}": m for name, m in find_modules(guide).items() if id(m) not in known}
        self.owned = Owned(found)
        if isinstance(guide, nn.Module):
            # A decoder that the guide holds too is the program's decoder.
            guide = shared_copy(guide, replaced=[*self.owned.pairs(), (self.model, self.model)])
        self.guide: Any = guide
        self.pending_guide: dict[str, Any] | None = None
        self.loss: Any = loss_for(self._loss_given)
        self.optim: PyroOptim | None = None
        self.pending_optim: dict[str, Any] = {}
        self.stream: RandomStream | None = None
        self.history = History()
        self.epoch = Epoch()
        self.num_steps = 0
        self.device: torch.device | None = None
        #: The posterior guide that :meth:`calibrate` trains, with its history.
        self.calibration: Calibration | None = None
        self.refined = None
        return self

    @property
    def modules(self) -> dict[str, nn.Module]:
        """This program's own copies of the modules that the model refers to, trained weights included."""
        return self.owned.copies

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model, with this program's parameters."""
        with self.active():
            return self.model(*args, **kwargs)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make this program's modules and parameter store the current ones inside."""
        with self.owned.active():
            yield

    def fit(
        self,
        *args: Any,
        num_steps: int | None = None,
        num_epochs: float | None = None,
        batch_size: int | None = 256,
        lr: float | None = None,
        optim: PyroOptim | None = None,
        seed: int | None = None,
        device: torch.device | str | None = None,
        progress: bool = True,
        validation: Any = None,
        validate_every: int = 100,
        patience: int | None = None,
        keep_best: bool = True,
        callbacks: Sequence[Callback] = (),
        max_grad_norm: float | None = None,
        autocast: torch.dtype | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        every: int = 100,
        resume: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> SinkhornProgram:
        """Minimise the loss on minibatches of the model's arguments; a second call continues.

        :param args: arguments of the model: arrays, tensors, memory-mapped arrays or sparse matrices of scipy; those as long as
            the first one are cut into minibatches. Or one ``DataLoader`` or ``Dataset``, whose batches are the arguments
        :param num_steps: optimiser steps; default 2000
        :param num_epochs: passes over the data instead
        :param batch_size: data a step, in shuffled epochs, or drawn with replacement for a loss that compares data; None
            passes everything as it is, as models that sub-sample by themselves need. A ``DataLoader`` has its own
        :param lr: learning rate of the default optimiser, Adam: 1e-3 at first, then what it was
        :param optim: a Pyro optimiser instead, which starts afresh; schedulers are stepped every step
        :param seed: seed of the program's random stream; by default it continues, or at first follows torch's
        :param device: move modules and data there
        :param progress: show a bar with the per-datum loss, reconstruction and match
        :param validation: data to hold out: a share of them such as .1, the arguments of a call, or a ``DataLoader``. Their
            loss is measured in evaluation mode, with the same noise each time
        :param validate_every: steps between two measurements
        :param patience: stop after so many measurements without a better one; default never
        :param keep_best: with ``validation``, end in the state whose held-out loss was least
        :param callbacks: called with the program and a dictionary of figures after every step; one that returns True stops
            the fit. :func:`~pyro_sinkhorn.fitting.log_to` makes one for TensorBoard or Weights & Biases
        :param max_grad_norm: scale gradients of all parameters together down to this norm
        :param autocast: dtype that networks compute in, ``torch.bfloat16`` say; transport stays in float32
        :param checkpoint: file to write the state of the fit to, every ``every`` steps, at the end, and after NaN or Ctrl-C
        :param every: steps between two checkpoints
        :param resume: checkpoint to go on from, with the same data and arguments: the fit ends where it would have ended,
            on a CPU to the bit. It is the default of ``checkpoint``; given as both, it may be missing, and the fit begins
        :returns: the program
        :raises ProgramError: model, guide and data do not fit together
        :raises NonFiniteError: NaN or infinity; the program keeps the state of the last good step
        """
        options = FitOptions(
            num_steps=num_steps,
            num_epochs=num_epochs,
            batch_size=batch_size,
            lr=lr,
            optim=optim,
            seed=seed,
            device=device,
            progress=progress,
            validation=validation,
            validate_every=validate_every,
            patience=patience,
            keep_best=keep_best,
            callbacks=callbacks,
            max_grad_norm=max_grad_norm,
            autocast=autocast,
            checkpoint=checkpoint,
            every=every,
            resume=resume,
        )
        run(self, *self._inputs(args, kwargs, device, lazy=True), options)
        return self

    def calibrate(
        self,
        *args: Any,
        num_steps: int = 2000,
        num_simulations: int | None = None,
        num_rounds: int = 1,
        prior_share: float = 0.2,
        sizes: tuple[int, int] | None = None,
        lr: float = 2e-3,
        guide: Any = None,
        loss: Trace_EnergyScore | None = None,
        seed: int | None = None,
        progress: bool = True,
        **kwargs: Any,
    ) -> SinkhornProgram:
        """Train a posterior guide on data simulated from the program, which stays as it is.

        The data give shapes and covariates; their values count only for ``num_rounds`` above 1. An encoder that ``fit``
        has trained is the start of the posterior's. A second call goes on with the same guide.

        :param num_steps: optimiser steps in all; the learning rate falls to 0 at the end of every round. More steps are what
            makes a guide exact: 2000 are a start, 10,000 to 30,000 for numbers to be relied on
        :param num_simulations: simulate so many data (data sets, where there are globals) and go through them again and
            again, for simulators that are expensive; a tenth is held out, and the state that is best there is kept.
            Default: fresh ones at every step
        :param num_rounds: above 1, later rounds simulate near the data given, see :mod:`pyro_sinkhorn.proposal`: the guide
            then is sharper there, and as valid everywhere
        :param prior_share: of simulations from the whole prior in later rounds; their weights are at most its inverse
        :param sizes: smallest and largest number of data in a simulated data set, for programs with globals; by default that
            of the data given
        :param lr: learning rate
        :param guide: the posterior guide, a module that is trained in place, or a class or partial to be called with the
            model; default :class:`~pyro_sinkhorn.AutoPosterior`
        :param loss: a :class:`~pyro_sinkhorn.Trace_EnergyScore`, of which a copy is used; default
            ``Trace_EnergyScore(wake=False)``
        :returns: the program; its ``calibration`` holds the guide and its history
        :raises ProgramError: model, guide and data do not fit together
        :raises NonFiniteError: NaN or infinity; the guide keeps the state of the last good step
        """
        args, kwargs = self._inputs(args, kwargs)
        if seed is not None or self.stream is None:
            self.stream = RandomStream(seed)
        before = self.calibration
        self.calibration = calibration_for(before, guide, loss, self)
        with (
            self._guarded(args, kwargs),
            self.stream.active(),
            training_mode(self._all_modules(), training=False),
            training_mode([self.calibration.guide], training=True),
            self.active(),
            undone_on_error(self, before),
        ):
            calibrate(
                self.model,
                self.calibration,
                args,
                kwargs,
                num_steps=num_steps,
                lr=lr,
                num_simulations=num_simulations,
                num_rounds=num_rounds,
                prior_share=prior_share,
                sizes=sizes,
                fixed=self.modules.values(),
                progress=progress,
            )
        return self

    def to(self, device: torch.device | str) -> SinkhornProgram:
        """Move modules, parameters and the data of later calls to a device."""
        self.device = torch.device(device)
        for module in self._all_modules():
            module.to(self.device)
        if isinstance(self.loss, SinkhornLoss):
            self.loss.to(self.device)
        for parameter in self.owned.store["params"].values():
            parameter.data = parameter.data.to(self.device)
        if self.optim is not None:
            optimiser.move(self.optim, self.device)
        return self

    def __repr__(self) -> str:
        guide = getattr(self.guide, "__name__", type(self.guide).__name__)
        return f"SinkhornProgram({self._name()}, {guide}, {type(self.loss).__name__}, {self.num_steps} steps)"

    def _repr_html_(self) -> str:
        return program_html(self)

    def _name(self) -> str:
        return getattr(self.model, "__name__", type(self.model).__name__)

    def _all_modules(self) -> list[nn.Module]:
        calibrated = [] if self.calibration is None else [self.calibration.guide]
        found = [*self.owned.copies.values(), self.guide, *calibrated]
        return [module for module in dict.fromkeys(found) if isinstance(module, nn.Module)]

    def _inputs(
        self, args: Any, kwargs: Any, device: torch.device | str | None = None, lazy: bool = False
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments as tensors on the program's device; with ``lazy``, what can be read by rows is left for later."""
        place = self.device if device is None else torch.device(device)

        def made(value: Any) -> Any:
            return by_rows(value) if lazy and is_lazy(value) else as_tensor(value, place)

        return tuple(made(value) for value in args), {name: made(value) for name, value in kwargs.items()}

    @contextmanager
    def _guarded(self, args: Any, kwargs: Any) -> Iterator[None]:
        modules = self.modules | ({"the guide": self.guide} if isinstance(self.guide, nn.Module) else {})
        modules |= self.loss.modules() if isinstance(self.loss, SinkhornLoss) else {}
        with unmade_on_error(self), explained_dtypes(modules, args, kwargs):
            yield
