r"""How strongly a function can stretch distances: from above by its operations, from below by its slopes.

*From above.* Let :math:`L(t)` be a Lipschitz constant of an intermediate tensor t as a function of the inputs, in the
Euclidean norm of all of its entries. One run shows every operation, and

.. math:: L(xW+b) = \|W\|_2\,L(x), \quad L(\phi(x)) = \sup|\phi'|\,L(x), \quad L(x+y) = L(x)+L(y), \quad
          L([x,y])^2 = L(x)^2 + L(y)^2,

so that a stack of linear layers has the product of their spectral norms (Szegedy et al. 2014, section 4.3). It holds
everywhere, also where no datum is, and is loose: layers rarely stretch one and the same direction.

*From below.* :math:`\|J(z)\|_2` at single points, by power iteration on :math:`J^\top J`. It says what the function does
where it was looked at. The largest of them bounds the constant from below, on a convex set; it is no upper bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

#: Largest slopes of functions of one number, and of what only lays entries out anew.
SLOPES: dict[str, float] = {
    **dict.fromkeys(("relu", "tanh", "sin", "cos", "abs", "neg", "softplus", "log_sigmoid_forward"), 1.0),
    **dict.fromkeys(("clamp", "clamp_min", "clamp_max", "hardtanh"), 1.0),
    **dict.fromkeys(
        ("view", "_unsafe_view", "t", "transpose", "permute", "unsqueeze", "squeeze", "clone"), 1.0
    ),
    **dict.fromkeys(("alias", "detach", "slice", "select", "split", "split_with_sizes", "_to_copy"), 1.0),
    "sigmoid": 0.25,
    "_softmax": 0.5,
    "silu": 1.1,
    "mish": 1.1,
    "gelu": 1.13,
}


@dataclass(frozen=True)
class UpperBound:
    """A Lipschitz constant by operations, infinite where one of them has none that is known.

    constant: the product
    reason:   which operation stopped it; empty where none did
    """

    constant: float
    reason: str = ""


def upper_bound(function: Callable[[], Tensor], inputs: Iterable[Tensor]) -> UpperBound:
    """A constant of the function's output in all ``inputs`` together, Euclidean norms of all entries.

    :param function: runs on the very tensors of ``inputs``

    >>> z = torch.randn(5, 3)
    >>> layer = torch.nn.Linear(3, 2)
    >>> found = upper_bound(lambda: layer(z).tanh(), [z]).constant
    >>> torch.isclose(torch.tensor(found), torch.linalg.matrix_norm(layer.weight.detach(), 2)).item()
    True
    >>> upper_bound(lambda: z.exp(), [z]).reason
    'exp'
    """
    watch = _Watch(inputs)
    with torch.no_grad(), watch:
        out = function()
    found = watch.constants.get(id(out), (out, UpperBound(0.0)))[1]
    return UpperBound(math.inf, watch.branch) if watch.branch else found


class _Watch(TorchDispatchMode):
    """Runs operations and keeps a constant of everything that depends on the inputs."""

    def __init__(self, inputs: Iterable[Tensor]) -> None:
        super().__init__()
        # With the tensors themselves, since a number may be given again once one is freed.
        self.constants = {id(t): (t, UpperBound(1.0)) for t in inputs}
        self.branch = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = [(t, self.constants[id(t)][1]) for t in _tensors(args, kwargs) if id(t) in self.constants]
        out = func(*args, **kwargs)
        if not before:
            return out
        name = func._schema.name.partition("::")[2]
        if name in ("_local_scalar_dense", "item"):
            self.branch = self.branch or "a choice by their values"
            return out
        stopped = next((bound for _, bound in before if bound.reason), None)
        for t in _tensors([out], {}):
            bound = stopped or self._bound(name, args, kwargs, t)
            self.constants[id(t)] = (t, bound)
        return out

    def _of(self, value: Any, out: Tensor | None = None) -> float:
        """The constant of an argument, 0 for what does not depend on the inputs; repeated as ``out`` repeats it."""
        if not isinstance(value, Tensor) or id(value) not in self.constants:
            return 0.0
        repeated = 1.0 if out is None else max(out.numel() / max(value.numel(), 1), 1.0)
        return self.constants[id(value)][1].constant * math.sqrt(repeated)

    def _bound(self, name: str, args: Any, kwargs: Any, out: Tensor) -> UpperBound:
        in_place = name.endswith("_") and not name.endswith("__")
        constant = self._constant(name.removesuffix("_") if in_place else name, args, kwargs, out)
        if constant is None or (
            in_place and out._is_view()
        ):  # what else looks at the same numbers is not known
            return UpperBound(math.inf, name)
        return UpperBound(constant)

    def _constant(self, name: str, args: Any, kwargs: Any, out: Tensor) -> float | None:
        first: Any = args[0] if args else None
        if name in SLOPES:
            return SLOPES[name] * self._of(first)
        if name == "leaky_relu":
            return max(1.0, abs(args[1]) if len(args) > 1 else 0.0) * self._of(first)
        if name == "elu":
            alpha, scale, inner = (*args[1:4], 1.0, 1.0, 1.0)[:3] if len(args) > 1 else (1.0, 1.0, 1.0)
            return abs(scale) * max(1.0, abs(alpha * inner)) * self._of(first)
        if name in ("add", "sub"):
            return self._of(first, out) + abs(kwargs.get("alpha", 1)) * self._of(args[1], out)
        if name in ("mul", "div"):
            return self._scaled(name, first, args[1], out)
        if name == "mm":
            return self._product(first, args[1])
        if name == "addmm":
            product = self._product(args[1], args[2])
            beta, alpha = abs(kwargs.get("beta", 1)), abs(kwargs.get("alpha", 1))
            return None if product is None else beta * self._of(first, out) + alpha * product
        if name == "cat":
            return math.hypot(*map(self._of, first))
        if name == "expand":
            return self._of(first, out)
        if name in ("sum", "mean"):
            many = math.sqrt(first.numel() / max(out.numel(), 1))
            return self._of(first) * (many if name == "sum" else 1 / many)
        return None

    def _scaled(self, name: str, x: Any, y: Any, out: Tensor) -> float | None:
        mine, other = self._of(x, out), self._of(y, out)
        if (mine and other) or (other and name == "div"):
            return None
        factor = torch.as_tensor(x if other else y).double().abs()
        largest = float(factor.max()) if name == "mul" else 1 / float(factor.min())
        return (mine or other) * largest

    def _product(self, x: Tensor, y: Tensor) -> float | None:
        mine, other = self._of(x), self._of(y)
        if mine and other:
            return None
        return (mine or other) * float(torch.linalg.matrix_norm((x if other else y).double(), 2))


def _tensors(args: Iterable[Any], kwargs: Mapping[str, Any]) -> Iterable[Tensor]:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value, {})


def local_norms(
    function: Callable[[Mapping[str, Tensor]], Tensor],
    inputs: Mapping[str, Tensor],
    length: Callable[[Mapping[str, Tensor]], Tensor],
    divide: Callable[[Mapping[str, Tensor], Tensor], dict[str, Tensor]],
    iterations: int = 20,
) -> Tensor:
    r"""Spectral norms of the Jacobians of a function that treats its rows apart, ``(n,)``, each at most the true one.

    From one run: :math:`J^\top u` by reverse mode, which is linear in u, so that its own derivative along v is
    :math:`Jv`. All rows at once, since the Jacobian of them all is block-diagonal.

    :param function: named inputs to rows ``(n, e)``
    :param length: Euclidean length of each row of named tensors shaped like the inputs, ``(n,)``
    :param divide: such tensors with every row divided by its number

    >>> z = {"z": torch.randn(4, 3, dtype=torch.float64)}
    >>> A = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    >>> over = lambda v, by: {"z": v["z"] / by.unsqueeze(-1)}
    >>> [round(g, 4) for g in local_norms(lambda v: v["z"] @ A, z, lambda v: v["z"].norm(dim=-1), over).tolist()]
    [3.0, 3.0, 3.0, 3.0]
    """
    with torch.enable_grad():
        at = {name: value.detach().clone().requires_grad_() for name, value in inputs.items()}
        out = function(at)
        if not out.requires_grad:
            return torch.zeros(len(out), dtype=out.dtype, device=out.device)
        leaves = list(at.values())
        u = torch.zeros_like(out, requires_grad=True)
        pulled = torch.autograd.grad(out, leaves, u, create_graph=True, materialize_grads=True)

        v = {name: torch.randn_like(value) for name, value in inputs.items()}
        norms = torch.zeros(len(out), dtype=out.dtype, device=out.device)
        for _ in range(iterations):
            v = divide(v, length(v).clamp_min(torch.finfo(out.dtype).tiny))
            (pushed,) = torch.autograd.grad(
                pulled, u, list(v.values()), retain_graph=True, allow_unused=True, materialize_grads=True
            )
            # Of a unit vector: never more than the norm, whichever iteration it is of.
            norms = torch.maximum(norms, pushed.detach().norm(dim=-1))
            back = torch.autograd.grad(out, leaves, pushed, retain_graph=True, materialize_grads=True)
            v = {name: part.detach() for name, part in zip(v, back, strict=True)}
    return norms
