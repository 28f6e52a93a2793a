"""The body of ``SinkhornProgram.fit``: a thin loop over steps, and what surrounds it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pyro.optim.optim import PyroOptim
from tqdm.auto import tqdm

from pyro_sinkhorn import distributed, optimiser, snapshot
from pyro_sinkhorn.distributed import Ranks
from pyro_sinkhorn.errors import LostRankError, NonFiniteError, ProgramError, checked_integer
from pyro_sinkhorn.fitting.callbacks import Callback
from pyro_sinkhorn.fitting.checkpoint import Checkpoints, best_of, check_same, conditions, read
from pyro_sinkhorn.fitting.interrupts import Interrupts
from pyro_sinkhorn.fitting.validation import HeldOut, Validation, as_held_out, check_validation, split
from pyro_sinkhorn.losses.base import Terms
from pyro_sinkhorn.rng import RandomStream
from pyro_sinkhorn.training import (
    Batches,
    LoadedBatches,
    Minibatches,
    Trainer,
    common_random_state,
    is_loader,
    loader_of,
)

#: Steps where neither ``num_steps`` nor ``num_epochs`` is given.
NUM_STEPS = 2000


@dataclass(frozen=True)
class FitOptions:
    """Arguments of :meth:`~pyro_sinkhorn.SinkhornProgram.fit`, which says what each means."""

    num_steps: int | None = None
    num_epochs: float | None = None
    batch_size: int | None = 256
    lr: float | None = None
    optim: PyroOptim | None = None
    seed: int | None = None
    device: torch.device | str | None = None
    progress: bool = True
    validation: Any = None
    validate_every: int = 100
    patience: int | None = None
    keep_best: bool = True
    callbacks: Sequence[Callback] = ()
    max_grad_norm: float | None = None
    autocast: torch.dtype | None = None
    checkpoint: str | os.PathLike[str] | None = None
    every: int = 100
    resume: str | os.PathLike[str] | None = None

    def checked(self) -> FitOptions:
        """Itself.

        :raises ProgramError: arguments that make no sense, or do not go together
        """
        if self.num_steps is not None and self.num_epochs is not None:
            raise ProgramError(
                f"num_steps={self.num_steps} and num_epochs={self.num_epochs}: give one of them"
            )
        if self.num_steps is not None:
            checked_integer("num_steps", self.num_steps, 0)
        for name in ("num_epochs", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and 0 < value < math.inf):
                raise ProgramError(f"{name} is {value!r}: expected a positive number")
        checked_integer("validate_every", self.validate_every, 1)
        checked_integer("every", self.every, 1)
        if self.patience is not None:
            checked_integer("patience", self.patience, 1)
            if self.validation is None:
                raise ProgramError(
                    f"patience={self.patience} stops by held-out data, but there are none: give validation=.1, say"
                )
        if self.autocast is not None and self.autocast not in (torch.bfloat16, torch.float16):
            raise ProgramError(
                f"autocast is {self.autocast!r}: expected torch.bfloat16 (or torch.float16, on a GPU)"
            )
        if not isinstance(self.callbacks, (list, tuple)):
            raise ProgramError(
                f"callbacks is a {type(self.callbacks).__name__}: expected a list of functions, [log_to(writer)] say"
            )
        if self.validation is not None:
            check_validation(self.validation)
        for callback in self.callbacks:
            if not callable(callback):
                raise ProgramError(
                    f"a callback is a {type(callback).__name__}, which cannot be called: expected a function of the program "
                    "and a dictionary of figures; log_to(writer) makes one for TensorBoard or Weights & Biases"
                )
        return self


@dataclass
class _Fit:
    """One call of ``fit`` under way.

    conditions: of its data, and what a checkpoint says besides
    """

    program: Any
    options: FitOptions
    trainer: Trainer
    total: int
    done: int
    validation: Validation | None
    checkpoints: Checkpoints | None
    conditions: dict[str, Any] = field(default_factory=dict)

    def run(self) -> None:
        """The steps that are left."""
        program, options = self.program, self.options
        bar = tqdm(
            total=self.total,
            initial=self.done,
            disable=not (options.progress and distributed.is_first()),
            desc=program._name(),
            unit="step",
        )
        with bar, Interrupts() as interrupts:
            try:
                # A fit that patience had ended is over when it is resumed, too.
                stop = self.validation is not None and self.validation.over
                while self.done < self.total and not stop:
                    terms = self.trainer.step(program.num_steps)
                    program.history.append(terms)
                    program.num_steps += 1
                    self.done += 1
                    stop = self._after(terms, bar)
                    interrupts.check()
            except (NonFiniteError, LostRankError, KeyboardInterrupt) as error:
                self._save_last_good(error)
                raise
        if self.validation is not None:
            self.validation.restore(program)
        self.write()

    def write(self) -> None:
        """A checkpoint of now, by one of the processes that share the fit."""
        if self.checkpoints is not None and distributed.is_first():
            progress = self.conditions | {"num_steps": self.total, "done": self.done}
            self.checkpoints.write(self.program, progress, self.validation)

    def _after(self, terms: Terms, bar: tqdm) -> bool:
        """What follows a step; whether it was the last."""
        program, options = self.program, self.options
        last = self.done == self.total
        values = {"step": float(program.num_steps)} | _figures(terms)
        stop = False
        if self.validation is not None and (self.done % options.validate_every == 0 or last):
            values["validation"] = self.validation.measure(program, self.trainer, self.done)
            program.history.validation.append(values["validation"])
            program.history.validated_at.append(program.num_steps)
            stop = self.validation.over
        bar.update()
        if self.done % 10 == 0 or last or stop:
            program.history.show_last(bar)
        if stop and options.progress and distributed.is_first():
            best = self.validation.best  # type: ignore[union-attr]
            bar.write(
                f"stopped after {self.done} steps: the held-out loss was least, {best.value:.4g}, after {best.step}"
            )
        for callback in options.callbacks:
            stop = bool(callback(program, values)) or stop
        if options.callbacks and distributed.running():
            stop = Ranks(f"after step {program.num_steps}").any(stop, "asking whether to stop")
        if self.checkpoints is not None and self.done % self.checkpoints.every == 0 and not (last or stop):
            self.write()
        return stop

    def _save_last_good(self, error: BaseException) -> None:
        if self.checkpoints is None or not distributed.is_first():
            return
        self.write()
        error.add_note(f"the state of the last good step is in {str(self.checkpoints.path)!r}")


def _figures(terms: Terms) -> dict[str, float]:
    """The terms of a step that are there, by name."""
    found = {"loss": terms.loss, "reconstruction": terms.reconstruction, "energy": terms.energy}
    figures = {name: value for name, value in found.items() if not math.isnan(value)}
    if terms.match:
        figures |= {"match": terms.total_match}
        figures |= {f"match/{name}": value for name, value in terms.match.items()}
    return figures


def run(program: Any, args: tuple[Any, ...], kwargs: dict[str, Any], options: FitOptions) -> None:
    """Fit a program; see :meth:`~pyro_sinkhorn.SinkhornProgram.fit`."""
    options = options.checked()
    found = None
    if options.resume is not None and not (
        _same_file(options.resume, options.checkpoint) and not Path(options.resume).exists()
    ):
        found = read(options.resume, program)
    device = program.device if options.device is None else torch.device(options.device)
    program.optim = optimiser.choose(program.optim, program.pending_optim, options.optim, options.lr)
    program.pending_optim = {}
    if options.device is not None:
        program.to(options.device)
    if found is None and (options.seed is not None or program.stream is None):
        program.stream = RandomStream(options.seed)
    checkpoint = options.checkpoint if options.checkpoint is not None else options.resume
    checkpoints = None if checkpoint is None else Checkpoints(checkpoint, options.every)
    loading = len(args) == 1 and is_loader(args[0])
    for value in args:
        if isinstance(value, Iterator):
            raise ProgramError(
                f"an argument is a {type(value).__name__}, which can be read once only: pass arrays, tensors, or a DataLoader "
                "or Dataset of torch.utils.data"
            )
    with program._guarded(() if loading else args, kwargs), program.stream.active(), program.active():
        common_random_state()
        args, kwargs, held_out, positions = _hold_out(args, kwargs, options, found, device, loading)
        batches: Batches = (
            LoadedBatches(loader_of(args[0], options.batch_size), program.epoch, device)
            if loading
            else Minibatches(args, kwargs, options.batch_size, program.epoch, device)
        )
        if found is not None:
            check_same(found, batches)
        trainer = _trainer(program, batches, options)
        validation = None
        if held_out is not None:
            data = HeldOut(held_out, batches.batch_size, device)
            validation = Validation(data, options.patience, options.keep_best, best_of(found))
        kept = conditions(batches) | {"held_out": positions}
        total, done = _lengths(options, batches, found)
        _Fit(program, options, trainer, total, done, validation, checkpoints, kept).run()


def _trainer(program: Any, batches: Batches, options: FitOptions) -> Trainer:
    """What makes the steps; it looks at the program once, which NaN may end as it may end a step.

    :raises NonFiniteError: naming source and step
    """
    try:
        snapshot.wake_guide(program, *batches.first())
        modules = [*program.owned.originals.values(), *program._all_modules()]
        return Trainer(
            program.model,
            program.guide,
            program.loss,
            program.optim,
            batches,
            modules,
            options.max_grad_norm,
            options.autocast,
        )
    except NonFiniteError as error:
        raise NonFiniteError(f"step {program.num_steps}: {error}") from error


def _same_file(a: Any, b: Any) -> bool:
    return b is not None and Path(a) == Path(b)


def _lengths(options: FitOptions, batches: Batches, found: dict[str, Any] | None) -> tuple[int, int]:
    """Steps in all and steps that are done, of this fit."""
    if options.num_epochs is not None:
        total = batches.steps(options.num_epochs)
    elif options.num_steps is not None:
        total = options.num_steps
    else:
        total = NUM_STEPS if found is None else found["num_steps"]
    return total, 0 if found is None else found["done"]


def _hold_out(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: FitOptions,
    found: dict[str, Any] | None,
    device: torch.device | None,
    loading: bool,
) -> tuple[tuple[Any, ...], dict[str, Any], Any, torch.Tensor | None]:
    """Data to train on, data held out, and the positions of these where they were drawn here."""
    given = options.validation
    if given is None:
        return args, kwargs, None, None
    if not isinstance(given, float):
        return args, kwargs, as_held_out(given, device), None
    if loading or options.batch_size is None:
        what = "a loader" if loading else "batch_size=None"
        raise ProgramError(f"validation={given:g} with {what}: pass the data to validate on themselves")
    before = None if found is None else found.get("held_out")
    (args, kwargs), held, positions = split(args, kwargs, given, before)
    return args, kwargs, held, positions
