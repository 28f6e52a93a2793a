"""The training loop: minibatches, one step, history."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.optim.optim import PyroOptim
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_sinkhorn import optimiser
from pyro_sinkhorn.errors import NonFiniteError, ProgramError, checked_integer
from pyro_sinkhorn.losses.base import SinkhornLoss, Terms
from pyro_sinkhorn.losses.pairs import picked
from pyro_sinkhorn.modules import training_mode
from pyro_sinkhorn.recovery import kept_on_error
from pyro_sinkhorn.rng import undisturbed
from pyro_sinkhorn.runs import run_model
from pyro_sinkhorn.structure import Plate, Structure, plates_of, sample_sites, structure_of


@dataclass
class History:
    """Every step of every ``fit``: per-datum ``loss``, ``reconstruction`` and ``match`` (what its weight multiplies)."""

    loss: list[float] = field(default_factory=list)
    reconstruction: list[float] = field(default_factory=list)
    match: list[float] = field(default_factory=list)

    def append(self, terms: Terms) -> None:
        """Add one step."""
        self.loss.append(terms.loss)
        self.reconstruction.append(terms.reconstruction)
        self.match.append(terms.total_match)

    def show_last(self, bar: tqdm) -> None:
        """Put the last step into a progress bar."""
        bar.set_postfix({name: f"{value:.4g}" for name, value in self._last().items()}, refresh=False)

    def _last(self) -> dict[str, float]:
        """The last step; a loss without likelihood has no reconstruction."""
        last = {name: values[-1] for name, values in vars(self).items()}
        return {name: value for name, value in last.items() if not math.isnan(value)}

    def __len__(self) -> int:
        return len(self.loss)

    def __repr__(self) -> str:
        if not self.loss:
            return "History(no steps)"
        last = ", ".join(f"{name}={value:.4g}" for name, value in self._last().items())
        return f"History({len(self)} steps, last: {last})"


def as_tensor(value: Any, device: torch.device | None) -> Any:
    """Arrays to tensors, floats to the default dtype, everything to the device; other arguments as they are.

    Data are data: a graph behind them, left by whatever simulated them, would be walked a second time at the second step.
    """
    if isinstance(value, np.ndarray):
        # torch cannot share memory that is read-only or runs backwards.
        shareable = value.flags.writeable and all(stride >= 0 for stride in value.strides)
        value = torch.from_numpy(value if shareable else value.copy())
        if value.is_floating_point():
            value = value.to(torch.get_default_dtype())
    if isinstance(value, Tensor) and device is not None:
        value = value.to(device)
    return value.detach() if isinstance(value, Tensor) and value.requires_grad else value


@dataclass
class Epoch:
    """What is left of a pass over ``n`` data in random order; the next fit goes on with it."""

    n: int = 0
    order: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))


class Minibatches:
    """Endless minibatches of a model's arguments.

    Tensors whose first dimension equals that of the first tensor are sliced, others passed whole. Data come in
    shuffled epochs that run into each other, so that every batch is full: a last, smaller batch would change the
    size at which clouds are matched.

    :param epoch: to continue with, and to advance; one over another number of data is begun anew

    replace:  draw every datum of a batch anew from all, instead of in epochs. A loss that compares data wants it: its
              simulated clouds are independent draws, and halves of few data that exhaust them are not
    """

    def __init__(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        batch_size: int | None,
        epoch: Epoch | None = None,
    ) -> None:
        self.args, self.kwargs = args, kwargs
        sizes = [len(v) for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim()]
        self.n = sizes[0] if sizes else 0
        if batch_size is not None:  # None for all data at once
            batch_size = checked_integer("batch_size", batch_size, 1)
        if sizes and self.n == 0:
            shapes = [tuple(v.shape) for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
            raise ProgramError(f"the data are empty: arguments of shape {shapes}; fit needs at least 2 data")
        self.everything = batch_size is None
        self.whole = batch_size is None or batch_size >= self.n
        self.batch_size = self.n if self.whole or batch_size is None else batch_size
        self.replace = False
        self.epoch = Epoch() if epoch is None else epoch
        if self.epoch.n != self.n:
            self.epoch.n, self.epoch.order = self.n, Epoch().order

    def draw(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The next minibatch."""
        if self.replace:
            return self.pick(torch.randint(self.n, (self.batch_size,)))
        if self.whole:
            return self.args, self.kwargs
        order = self.epoch.order
        while len(order) < self.batch_size:
            order = torch.cat([order, torch.randperm(self.n)])
        index, self.epoch.order = order[: self.batch_size], order[self.batch_size :]
        return self.at(index)

    def first(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A minibatch to look at: the first data, in their order."""
        return self.at(torch.arange(self.batch_size))

    def at(self, index: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The data at these positions."""
        return (self.args, self.kwargs) if self.whole else self.pick(index)

    def pick(self, index: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The data at these positions, whatever the batch size."""
        return picked(self.args, self.kwargs, self.n, index)


class DataScale(Messenger):
    """Multiply the scale of sites in some plates: a minibatch of B passed to a model stands for all N data."""

    def __init__(self, plates: set[str], factor: float) -> None:
        super().__init__()
        self.plates, self.factor = plates, factor

    def _process_message(self, msg: Any) -> None:
        if msg["type"] == "sample" and any(frame.name in self.plates for frame in msg["cond_indep_stack"]):
            msg["scale"] = msg["scale"] * self.factor


def data_scale(model: Callable[..., Any], batches: Minibatches) -> DataScale | None:
    """What scales minibatched plates up to all data, where something outside them makes the scale matter.

    That is a global latent, a ``pyro.factor``, or a plate that is whole in every minibatch (features, say).

    :raises ProgramError: no plate follows the minibatch
    """
    if batches.whole:
        return None
    trace, structure = _look(model, batches, batches.batch_size)
    plates = _minibatched(model, batches, structure)
    outside = [
        name
        for name, site in sample_sites(trace)
        if plates.isdisjoint(plate.name for plate in plates_of(site))
        and not site["infer"].get("_deterministic")
    ]
    return DataScale(plates, batches.n / batches.batch_size) if outside else None


def _may_replace(model: Callable[..., Any], batches: Minibatches, whole_data_sets: bool) -> bool:
    """Whether data can be drawn with replacement: rows of the arguments must be slices of a data plate.

    :param whole_data_sets: whether a data set with globals is to stay as it is
    """
    if not batches.whole:
        return True  # which data_scale has checked
    if not batches.n or batches.everything:
        return False
    _, structure = _look(model, batches, batches.n)
    if whole_data_sets and structure.globals:
        return False
    return any(plate.size == plate.full_size == batches.n for plate in structure.data_plates)


def _minibatched(model: Callable[..., Any], batches: Minibatches, structure: Structure) -> set[str]:
    """Names of the data plates that are as long as a minibatch and would change with it."""
    plates = structure.data_plates
    for plate in plates:
        if plate.size != plate.full_size:
            raise ProgramError(
                f"plate {plate.name!r} sub-samples {plate.size} of {plate.full_size} by itself: pass the whole data "
                "with batch_size=None"
            )
    found = {plate.name for plate in plates if plate.size == batches.batch_size}
    if len(found) != 1:
        # None, or several of which some may be so long by chance: a batch one longer tells them apart.
        _, other = _look(model, batches, batches.batch_size + 1)
        sizes = {plate.name: plate.size for plate in other.data_plates}
        found = {plate.name for plate in plates if sizes.get(plate.name, plate.size) != plate.size}
    if not found:
        raise ProgramError(
            f"no data plate follows the minibatch of {batches.batch_size} out of {batches.n}: {_sizes(plates)} all the "
            "same. Write the plate's size as that of the argument, pyro.plate('data', len(x)), or pass "
            "batch_size=None"
        )
    return found


def _sizes(plates: tuple[Plate, ...]) -> str:
    return " and ".join(f"plate {plate.name!r} has size {plate.size}" for plate in plates)


def _look(model: Callable[..., Any], batches: Minibatches, size: int) -> tuple[Trace, Structure]:
    args, kwargs = batches.at(torch.arange(size))
    with undisturbed():  # a look at the model must not shift what follows
        trace = run_model(model, args, kwargs)
    return trace, structure_of(trace)


def _refuse_minibatches(model: Callable[..., Any], batches: Minibatches, loss: Any) -> None:
    _, structure = _look(model, batches, batches.batch_size)
    if structure.globals:
        raise ProgramError(
            f"{type(loss).__name__} reads the globals {list(structure.globals)} off whole data sets, but batch_size="
            f"{batches.batch_size} shows {batches.batch_size} of {batches.n} data at a time: pass batch_size=None"
        )


def step(
    loss: Any,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    optim: Callable[[list[Tensor]], Any],
    args: Any,
    kwargs: Any,
) -> float:
    """One step, as ``SVI.step``; an error, or a gradient that is not finite, leaves parameters and gradients alone.

    :raises NonFiniteError: naming the parameter
    """
    with poutine.trace(param_only=True) as capture:
        try:
            value = loss.loss_and_grads(model, guide, *args, **kwargs)
            parameters = {name: site["value"].unconstrained() for name, site in capture.trace.nodes.items()}
            if not parameters:
                raise ProgramError(
                    "neither model nor guide has a parameter to train: declare those of the model by pyro.param or "
                    "pyro.module; a tensor that merely requires a gradient is unknown to Pyro"
                )
            _check_finite(value, parameters)
            # A set would order parameters by address, and with them the optimiser's state.
            optim(list(dict.fromkeys(parameters.values())))
        finally:
            # Gradients that an interrupted step leaves behind would be added to the next one's.
            found = [site["value"].unconstrained() for site in capture.trace.nodes.values()]
            pyro.infer.util.zero_grads({parameter for parameter in found if parameter is not None})
    return value


def _wake(guide: Any, batches: Minibatches) -> None:
    """Let an automatic guide that was loaded make its networks, which it does at its first call.

    Not in the first step: losses begin with runs that put buffers back, loaded ones too.
    """
    if getattr(guide, "_pending_state", None) is not None:
        args, kwargs = batches.first()
        with undisturbed(), training_mode([guide], False), poutine.block(), torch.no_grad():
            guide(*args, **kwargs)


class Trainer:
    """Steps of a program on minibatches: what is scaled, and what is put back after an error.

    :param modules: those whose buffers a failed step must leave alone
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        loss: Any,
        optim: PyroOptim,
        batches: Minibatches,
        modules: list[nn.Module],
    ) -> None:
        self.loss, self.optim, self.batches, self.modules = loss, optim, batches, modules
        self.update = optimiser.Together(optim)
        _wake(guide, batches)
        scale = data_scale(model, batches)
        if scale is not None and getattr(loss, "whole_data_sets", False):
            _refuse_minibatches(model, batches, loss)
        batches.replace = (
            isinstance(loss, SinkhornLoss)
            and loss.replaces_data
            and _may_replace(model, batches, loss.whole_data_sets)
        )
        self.model = model if scale is None else scale(model)
        # Sinkhorn losses score no local site of the guide; others do, and need both sides at one scale.
        self.guide = guide if scale is None or isinstance(loss, SinkhornLoss) else copy.copy(scale)(guide)
        self.n_data = batches.batch_size if scale is None else batches.n

    def step(self, number: int) -> Terms:
        """One step; ``number`` is for its error.

        :raises NonFiniteError: naming the source; the state is that of the step before
        """
        ours = isinstance(self.loss, SinkhornLoss)
        try:
            with kept_on_error(self.modules), self.loss.kept_on_error() if ours else nullcontext():
                if ours:
                    self.loss.before_step(self.model, self.guide, self.batches.draw)
                args, kwargs = self.batches.draw()
                value = step(self.loss, self.model, self.guide, self.update, args, kwargs)
        except NonFiniteError as error:
            message = f"step {number}: {error}. The program keeps the state of the step before"
            raise NonFiniteError(message) from error
        optimiser.advance_schedule(self.optim, value)
        return getattr(self.loss, "terms", Terms(value / max(self.n_data, 1)))


def _check_finite(loss: float, parameters: dict[str, Tensor]) -> None:
    if not math.isfinite(loss):
        raise NonFiniteError(f"the loss is {loss}; the parameters were not updated")
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None and p.grad.numel()}
    largest = [(g.coalesce().values() if g.is_sparse else g).detach().abs().max() for g in gradients.values()]
    # One transfer from the device in the usual case; names only where they are needed.
    if largest and not bool(torch.stack([one.to(largest[0]) for one in largest]).isfinite().all()):
        bad = [name for name, one in zip(gradients, largest, strict=True) if not bool(one.isfinite())]
        raise NonFiniteError(
            f"the gradient of {bad[0]!r} ({len(bad)} of {len(parameters)} parameters in all) is NaN or infinite though "
            "the loss is finite; the parameters were not updated"
        )
