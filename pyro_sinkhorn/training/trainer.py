"""One step of a fit: what is scaled, and what is put back after an error."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.optim.optim import PyroOptim
from torch import Tensor, nn

from pyro_sinkhorn import optimiser
from pyro_sinkhorn.errors import LostRankError, NonFiniteError, ProgramError
from pyro_sinkhorn.losses.base import SinkhornLoss, Terms
from pyro_sinkhorn.modules import training_mode
from pyro_sinkhorn.recovery import kept_on_error
from pyro_sinkhorn.rng import undisturbed
from pyro_sinkhorn.training.data_scale import Batches, data_scale, may_replace, refuse_minibatches
from pyro_sinkhorn.training.sharing import shared_out


def step(
    loss: Any,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    optim: Callable[[list[Tensor]], Any],
    args: Any,
    kwargs: Any,
    max_grad_norm: float | None = None,
    autocast: torch.dtype | None = None,
) -> float:
    """One step, as ``SVI.step``; an error, or a gradient that is not finite, leaves parameters and gradients alone.

    :param max_grad_norm: gradients of all parameters together are scaled down to this norm
    :param autocast: dtype that networks compute in, see :class:`torch.autocast`

    :raises NonFiniteError: naming the parameter
    """
    with poutine.trace(param_only=True) as capture:
        try:
            with _autocast(autocast, args, kwargs):
                value = loss.loss_and_grads(model, guide, *args, **kwargs)
            parameters = {name: site["value"].unconstrained() for name, site in capture.trace.nodes.items()}
            if not parameters:
                raise ProgramError(
                    "neither model nor guide has a parameter to train: declare those of the model by pyro.param or "
                    "pyro.module; a tensor that merely requires a gradient is unknown to Pyro"
                )
            _check_finite(value, parameters)
            # A set would order parameters by address, and with them the optimiser's state.
            found = list(dict.fromkeys(parameters.values()))
            if max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(found, max_grad_norm)
            optim(found)
        finally:
            # Gradients that an interrupted step leaves behind would be added to the next one's.
            touched = [site["value"].unconstrained() for site in capture.trace.nodes.values()]
            pyro.infer.util.zero_grads({parameter for parameter in touched if parameter is not None})
    return value


def _autocast(dtype: torch.dtype | None, args: Any, kwargs: Any) -> Any:
    """On the device of the data."""
    if dtype is None:
        return nullcontext()
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    return torch.autocast(tensors[0].device.type if tensors else "cpu", dtype=dtype)


def _wake(guide: Any, batches: Batches) -> None:
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
    :param max_grad_norm: see :func:`step`
    :param autocast: see :func:`step`
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        loss: Any,
        optim: PyroOptim,
        batches: Batches,
        modules: list[nn.Module],
        max_grad_norm: float | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.loss, self.optim, self.modules = loss, optim, modules
        self.max_grad_norm, self.autocast = max_grad_norm, autocast
        self.update = optimiser.Together(optim)
        _wake(guide, batches)
        scale = data_scale(model, batches)
        if scale is not None and getattr(loss, "whole_data_sets", False):
            refuse_minibatches(model, batches, loss)
        batches.replace = (
            isinstance(loss, SinkhornLoss)
            and loss.replaces_data
            and may_replace(model, batches, loss.whole_data_sets)
        )
        self.model = model if scale is None else scale(model)
        # Sinkhorn losses score no local site of the guide; others do, and need both sides at one scale.
        self.guide = guide if scale is None or isinstance(loss, SinkhornLoss) else copy.copy(scale)(guide)
        self.batches = shared_out(model, loss, batches)
        self.n_data = batches.batch_size if scale is None else batches.n

    def step(self, number: int) -> Terms:
        """One step; ``number`` is for its error.

        :raises NonFiniteError: naming the source; the state is that of the step before
        :raises LostRankError: another process that shares the fit is gone; likewise
        """
        ours = isinstance(self.loss, SinkhornLoss)
        try:
            with kept_on_error(self.modules), self.loss.kept_on_error() if ours else nullcontext():
                if ours:
                    self.loss.before_step(self.model, self.guide, self.batches.draw)
                args, kwargs = self.batches.draw()
                value = step(
                    self.loss,
                    self.model,
                    self.guide,
                    self.update,
                    args,
                    kwargs,
                    self.max_grad_norm,
                    self.autocast,
                )
        except (NonFiniteError, LostRankError) as error:
            message = f"step {number}: {error}. The program keeps the state of the step before"
            raise type(error)(message) from error
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
