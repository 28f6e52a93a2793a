"""Gradients of transport are written by hand, once: a second derivative would leave out how the plan moves."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


def first_derivative(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Of a ``torch.autograd.Function``: refuses ``create_graph=True``, where PyTorch would drop the second derivative.

    ``once_differentiable`` only refuses where the incoming gradient needs one, which that of a loss does not.
    """

    @wraps(backward)
    def wrapped(ctx: Any, *grad_outputs: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the gradient of transport was asked for with create_graph=True, but it has no derivative of its own: it "
                "would be counted as constant. Differentiate once; for a penalty on gradients take the other terms of the "
                "loss apart from the transport"
            )
        return backward(ctx, *grad_outputs)

    return wrapped
