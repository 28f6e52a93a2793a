r"""Who is measured: every way to the same-batch Sinkhorn divergence and its gradient in ``x``, by name.

A method offers attempts, the setting its own documentation starts with first (``default``), then its own accuracy knob from
loose to tight. All are given :math:`\tfrac12\|x-y\|^2`, or twice it with twice the epsilon and half the value.

Libraries are imported by the method that needs them; one that is not here raises :class:`Missing`.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from _clouds import Cell, split
from torch import Tensor

#: Value, gradient in x, and how many iterations the slowest problem took where that is told.
Outcome = tuple[Any, Any, int | None]
TOLERANCES = (3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4)


class Missing(RuntimeError):
    """A method cannot run here; the text says why."""


@dataclass(frozen=True)
class Attempt:
    """One setting of a method. A tighter knob of the same variant follows it."""

    variant: str
    knob: str
    run: Callable[[], Outcome]
    default: bool = False
    tolerance: float | None = None
    in_order: bool = True  # False where a tighter default comes before the knob's loosest setting


def _need(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Missing(f"{package} is not installed") from error


def _differentiated(function: Callable[[Tensor], tuple[Tensor, int | None]], x: Tensor) -> Outcome:
    leaf = x.detach().requires_grad_()
    value, passes = function(leaf)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient, passes


# The library.


#: Every name that ``sinkhorn`` may know, the default first.
BACKENDS = ("auto", "dense", "streaming", "triton", "flash", "log")


def available_backends() -> list[str]:
    """Those of :data:`BACKENDS` that this version has, and this machine can run."""
    from pyro_sinkhorn.ot import sinkhorn

    found, point = [], torch.zeros(2, 1)
    for name in BACKENDS:
        with contextlib.suppress(ValueError, ImportError, RuntimeError):
            sinkhorn(point, point, 1.0, backend=name)
            found.append(name)
    return found


def chosen_backend(asked: str) -> str:
    """The backend asked for; ``log`` while there is no ``auto``."""
    found = available_backends()
    if asked in found:
        return asked
    if asked == "auto":
        return "log"
    raise Missing(f"this version has no backend {asked!r}, but {', '.join(found)}")


def ours(
    x: Tensor, y: Tensor, epsilon: float, cell: Cell, backend: str = "auto", debias: str = "self"
) -> Iterator[Attempt]:
    """The library, by tolerance."""
    from pyro_sinkhorn.ot import sinkhorn_divergence

    backend = chosen_backend(backend)

    def attempt(tolerance: float | None) -> Outcome:
        def value(leaf: Tensor) -> tuple[Tensor, int | None]:
            source = split(cell) if debias == "independent" else None
            options: dict[str, Any] = {"debias": debias, "tolerance": tolerance, "generator": source}
            out = sinkhorn_divergence(leaf, y, 2 * epsilon, backend=backend, **options)
            return out.value.sum() / 2, out.n_iters  # over groups, where there are any

        return _differentiated(value, x)

    yield Attempt(backend, "tolerance as it comes", lambda: attempt(None), default=True, in_order=False)
    for tolerance in TOLERANCES:
        yield Attempt(
            backend, f"tolerance {tolerance:g}", lambda t=tolerance: attempt(t), tolerance=tolerance
        )


# What people write by hand in torch.


def _row_step(potential: Tensor, cost: Tensor) -> Tensor:
    """In units of epsilon, of columns with equal weights."""
    return math.log(cost.shape[1]) - (potential - cost).logsumexp(1)


def _alternate(x: Tensor, y: Tensor, epsilon: float, length: int) -> Tensor:
    cost = half_cost_by_product(x, y) / epsilon
    g = torch.zeros_like(cost[0])
    for _ in range(length):
        f = _row_step(g, cost)
        g = _row_step(f, cost.mT)
    return epsilon * (f.mean() + g.mean())


def half_cost_by_product(x: Tensor, y: Tensor) -> Tensor:
    """Differentiable where points coincide, as a distance is not."""
    return (x.square().sum(1, keepdim=True) + y.square().sum(1)) / 2 - x @ y.mT


def unrolled(x: Tensor, y: Tensor, epsilon: float, cell: Cell) -> Iterator[Attempt]:
    """Autograd through L log-domain iterations of all three problems; as in the papers at L = 100.

    The value is the entropic one, so that all methods compute the same function; theirs is the sharp one.
    """

    def attempt(length: int) -> Outcome:
        def value(leaf: Tensor) -> tuple[Tensor, int | None]:
            parts = [_alternate(p, q, epsilon, length) for p, q in ((leaf, y), (leaf, leaf), (y, y))]
            return parts[0] - parts[1] / 2 - parts[2] / 2, length

        return _differentiated(value, x)

    for length in (10, 20, 50, 100, 200):
        yield Attempt("", f"L = {length}", lambda length=length: attempt(length), default=length == 100)


def envelope(x: Tensor, y: Tensor, epsilon: float, cell: Cell) -> Iterator[Attempt]:
    """The same iterations without a graph, symmetric ones averaged, then one differentiable half-step."""

    def settle(step: Callable[[Tensor], Tensor], start: Tensor, tolerance: float) -> tuple[Tensor, int]:
        potential = start
        for iteration in range(1, 2_001):
            new = step(potential)
            done = iteration % 5 == 0 and (potential - new).expm1().abs().mean() <= tolerance
            potential = new
            if done:
                break
        return potential, iteration

    def attempt(tolerance: float) -> Outcome:
        with torch.no_grad():
            cost = half_cost_by_product(x, y) / epsilon
            start = torch.zeros_like(cost[0])
            g, passes = settle(lambda g: _row_step(_row_step(g, cost), cost.mT), start, tolerance)
            own = []
            for cloud in (x, y):
                within = half_cost_by_product(cloud, cloud) / epsilon
                averaged = settle(
                    lambda h, within=within: (h + _row_step(h, within)) / 2, start.clone(), tolerance
                )
                own.append(averaged[0])

        def value(leaf: Tensor) -> tuple[Tensor, int | None]:
            f = _row_step(g, half_cost_by_product(leaf, y) / epsilon)
            f_own = _row_step(own[0], half_cost_by_product(leaf, x) / epsilon)
            return epsilon * (f.mean() + g.mean() - f_own.mean() - own[1].mean()), passes

        return _differentiated(value, x)

    for tolerance in (1e-1, *TOLERANCES):
        yield Attempt("", f"tolerance {tolerance:g}", lambda t=tolerance: attempt(t))


# Other libraries.


def geomloss(x: Tensor, y: Tensor, epsilon: float, cell: Cell) -> Iterator[Attempt]:
    """Its tensorized backend, by the ratio between the epsilons of its schedule."""
    samples_loss = _need("geomloss", "geomloss").SamplesLoss

    def attempt(loss: Any) -> Outcome:
        return _differentiated(lambda leaf: (loss(leaf, y), None), x)

    for scaling in (0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99):
        loss = samples_loss(
            "sinkhorn", p=2, blur=math.sqrt(epsilon), scaling=scaling, backend="tensorized", debias=True
        )
        yield Attempt("", f"scaling {scaling:g}", lambda loss=loss: attempt(loss), default=scaling == 0.5)


def pot(x: Tensor, y: Tensor, epsilon: float, cell: Cell) -> Iterator[Attempt]:
    """``ot.solve_sample(debias=True, grad="envelope")``, whose function is this one.

    Its ``empirical_sinkhorn_divergence`` is another one: without the entropic term, and never negative.
    """
    solve_sample = _need("ot", "POT").solve_sample

    def attempt(tolerance: float) -> Outcome:
        def value(leaf: Tensor) -> tuple[Tensor, int | None]:
            options = {"reg_type": "KL", "debias": True, "grad": "envelope", "max_iter": 5_000}
            return solve_sample(leaf, y, reg=2 * epsilon, tol=tolerance, **options).value / 2, None

        return _differentiated(value, x)

    for tolerance in (1e-1, *TOLERANCES):
        yield Attempt("", f"tol {tolerance:g}", lambda t=tolerance: attempt(t))


def ott(x: Tensor, y: Tensor, epsilon: float, cell: Cell, tuned: bool = False) -> Iterator[Attempt]:
    """OTT-JAX, compiled: as it comes, or by its own means of acceleration, of which the best counts."""
    jax, tools = _need("jax", "ott-jax"), _need("ott.tools.sinkhorn_divergence", "ott-jax")
    from ott.geometry.pointcloud import PointCloud  # type: ignore[import-not-found]
    from ott.initializers.linear.initializers import GaussianInitializer  # type: ignore[import-not-found]
    from ott.solvers.linear.acceleration import (  # type: ignore[import-not-found]
        AndersonAcceleration,
        Momentum,
    )

    variants: dict[str, dict[str, Any]] = {"default": {}}
    if tuned:
        anderson = AndersonAcceleration(memory=6, refresh_every=1, ridge_identity=1e-6)
        variants = {
            "Anderson": {"anderson": anderson, "inner_iterations": 3},
            "Anderson, Gaussian start": {
                "anderson": anderson,
                "initializer": GaussianInitializer(),
                "inner_iterations": 2,
            },
            "Gaussian start": {"initializer": GaussianInitializer(), "inner_iterations": 5},
            "momentum": {"momentum": Momentum(start=20), "inner_iterations": 5},
        }
    points = [jax.numpy.asarray(cloud.numpy()) for cloud in (x, y)]

    def compiled(options: dict[str, Any]) -> Any:
        def loss(x: Any, y: Any, epsilon: Any, threshold: Any) -> Any:
            solver = {"threshold": threshold, "max_iterations": 5_000, **options}
            value, out = tools.sinkhorn_divergence(PointCloud, x, y, epsilon=epsilon, solve_kwargs=solver)
            return value / 2, jax.numpy.stack(jax.numpy.asarray(out.n_iters)).max()

        return jax.jit(jax.value_and_grad(loss, has_aux=True))

    def attempt(function: Any, threshold: float) -> Outcome:
        (value, passes), gradient = function(*points, 2 * epsilon, threshold)
        gradient.block_until_ready()
        return value, gradient, passes

    for name, options in variants.items():
        function = compiled(options)
        if not tuned:
            yield Attempt(
                name, "threshold 0.001", lambda f=function: attempt(f, 1e-3), default=True, in_order=False
            )
        for threshold in (1e-1, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4):
            run = lambda f=function, t=threshold: attempt(f, t)  # noqa: E731
            yield Attempt(name, f"threshold {threshold:g}", run)


def flash(x: Tensor, y: Tensor, epsilon: float, cell: Cell) -> Iterator[Attempt]:
    """flash-sinkhorn, on CUDA alone, by the number of its iterations."""
    if not torch.cuda.is_available():
        raise Missing("flash-sinkhorn needs CUDA, and there is none")
    samples_loss = _need("flash_sinkhorn", "flash-sinkhorn").SamplesLoss
    points, others = x.cuda(), y.cuda()

    def attempt(loss: Any, length: int) -> Outcome:
        value, gradient, _ = _differentiated(lambda leaf: (loss(leaf, others), None), points)
        torch.cuda.synchronize()
        return value, gradient, length

    for length in (5, 10, 20, 50, 100, 200):
        loss = samples_loss("sinkhorn", eps=epsilon, n_iters=length, debias=True, half_cost=True)
        run = lambda loss=loss, length=length: attempt(loss, length)  # noqa: E731
        yield Attempt("", f"n_iters {length}", run, default=length == 100)


#: By name, with the options that tell variants of one function apart.
METHODS: dict[str, tuple[Callable[..., Iterator[Attempt]], dict[str, Any]]] = {
    "ours": (ours, {}),
    "ours, independent halves": (ours, {"debias": "independent"}),
    "ours, log backend": (ours, {"backend": "log"}),
    "unrolled": (unrolled, {}),
    "log domain, envelope": (envelope, {}),
    "geomloss": (geomloss, {}),
    "POT": (pot, {}),
    "OTT": (ott, {}),
    "OTT, tuned": (ott, {"tuned": True}),
    "flash-sinkhorn": (flash, {}),
}
