"""The training loop: minibatches, one step, history."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.optim.optim import PyroOptim
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_sinkhorn.errors import NonFiniteError, ProgramError
from pyro_sinkhorn.losses.trace_sinkhorn import Terms


@dataclass
class History:
    """Every step of every ``fit``: per-datum ``loss``, ``reconstruction`` and ``match`` (the sum over groups)."""

    loss: list[float] = field(default_factory=list)
    reconstruction: list[float] = field(default_factory=list)
    match: list[float] = field(default_factory=list)

    def append(self, terms: Terms) -> None:
        """Add one step."""
        self.loss.append(terms.loss)
        self.reconstruction.append(terms.reconstruction)
        self.match.append(sum(terms.match.values()))

    def __len__(self) -> int:
        return len(self.loss)

    def __repr__(self) -> str:
        if not self.loss:
            return "History(no steps)"
        return (
            f"History({len(self)} steps, last: loss={self.loss[-1]:.4g}, reconstruction={self.reconstruction[-1]:.4g}, "
            f"match={self.match[-1]:.4g})"
        )


class DataScale(Messenger):
    """Multiply the scale of sites in some plates: a minibatch of B passed to a model stands for all N data."""

    def __init__(self, plates: set[str], factor: float) -> None:
        super().__init__()
        self.plates, self.factor = plates, factor

    def _process_message(self, msg: Any) -> None:
        if msg["type"] == "sample" and any(frame.name in self.plates for frame in msg["cond_indep_stack"]):
            msg["scale"] = msg["scale"] * self.factor


def as_tensor(value: Any, device: torch.device | None) -> Any:
    """Arrays to tensors, floats to the default dtype, everything to the device; other arguments as they are."""
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
        if value.is_floating_point():
            value = value.to(torch.get_default_dtype())
    if isinstance(value, Tensor) and device is not None:
        value = value.to(device)
    return value


class Minibatches:
    """Endless minibatches of a model's arguments.

    Tensors whose first dimension equals that of the first tensor are sliced, others passed whole. Data come in
    shuffled epochs that run into each other, so that every batch is full: a last, smaller batch would change the
    size at which clouds are matched.
    """

    def __init__(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], batch_size: int | None, order: Tensor | None = None
    ) -> None:
        #: What is left of the current epoch.
        self.order = torch.empty(0, dtype=torch.long) if order is None else order
        self.args, self.kwargs = args, kwargs
        sizes = [len(v) for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim()]
        self.n = sizes[0] if sizes else 0
        self.whole = batch_size is None or batch_size >= self.n
        self.batch_size = self.n if self.whole else int(batch_size or 0)
        if sizes and self.n == 0:
            shapes = [tuple(v.shape) for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
            raise ProgramError(f"the data are empty: arguments of shape {shapes}; fit needs at least 2 data")
        if not self.whole and self.batch_size < 1:
            raise ProgramError(f"batch_size is {batch_size}: expected a positive number, or None for all data at once")

    def draw(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The next minibatch."""
        if self.whole:
            return self.args, self.kwargs
        while len(self.order) < self.batch_size:
            self.order = torch.cat([self.order, torch.randperm(self.n)])
        index, self.order = self.order[: self.batch_size], self.order[self.batch_size :]
        return self.at(index)

    def at(self, index: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The data at these positions."""
        if self.whole:
            return self.args, self.kwargs
        return (
            tuple(self._slice(value, index) for value in self.args),
            {name: self._slice(value, index) for name, value in self.kwargs.items()},
        )

    def _slice(self, value: Any, index: Tensor) -> Any:
        if isinstance(value, Tensor) and value.dim() and len(value) == self.n:
            return value[index.to(value.device)]
        return value


def step(
    loss: ELBO, model: Callable[..., Any], guide: Callable[..., Any], optim: PyroOptim, args: Any, kwargs: Any
) -> float:
    """One step, as ``SVI.step``; parameters are left as they are if a gradient is not finite.

    :raises NonFiniteError: naming the parameter
    """
    with poutine.trace(param_only=True) as capture:
        value = loss.loss_and_grads(model, guide, *args, **kwargs)
    parameters = {name: site["value"].unconstrained() for name, site in capture.trace.nodes.items()}
    gradients = [p.grad for p in parameters.values() if p.grad is not None]
    if gradients and not bool(torch.stack([g.detach().abs().max() for g in gradients]).isfinite().all()):
        bad = [n for n, p in parameters.items() if p.grad is not None and not bool(p.grad.isfinite().all())]
        pyro.infer.util.zero_grads(set(parameters.values()))
        raise NonFiniteError(
            f"the gradient of {bad[0]!r} ({len(bad)} of {len(parameters)} parameters in all) is NaN or infinite though "
            "the loss is finite; the parameters were not updated"
        )
    # A set would order parameters by address, and with them the optimiser's state.
    optim(list(dict.fromkeys(parameters.values())))
    pyro.infer.util.zero_grads(set(parameters.values()))
    return value
