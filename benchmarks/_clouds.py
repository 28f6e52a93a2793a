r"""The clouds of the speed benchmarks, and their divergence and its gradient in float64.

Clouds: ``x`` a mixture of ten clusters, as latents of a half-trained guide are, ``y`` standard normal; the cost is
:math:`C = \tfrac12\|x-y\|^2` and epsilon is :math:`\kappa` times its standard deviation. The library's ``"sqeuclidean"``
is twice this cost, so there epsilon and value are twice as large, and the plan is the same.

The reference shares no code with the library: Sinkhorn's algorithm on a stabilised kernel, accelerated by Anderson's method,
until the L1 error of the marginals is 1e-9. It is kept in the system's temporary folder, never in the repository.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

TOLERANCE = 1e-9
FOLDER = Path(tempfile.gettempdir()) / "pyro_sinkhorn_references"
#: The kernel is built anew once a potential has moved by this much, in units of epsilon.
DRIFT = 40.0


class NotConverged(RuntimeError):
    """The reference did not reach its tolerance in the time given."""


@dataclass(frozen=True)
class Cell:
    """One row of the table: what is to be solved."""

    n: int
    d: int
    kappa: float
    seed: int = 0


@dataclass(frozen=True)
class Reference:
    """Value and gradient in ``x``, with ``x`` on both sides of its self term, for the cost with the ½."""

    value: float
    gradient: Tensor
    seconds: float


def clouds(cell: Cell, groups: int | None = None) -> tuple[Tensor, Tensor]:
    """Two clouds ``(n, d)``, or ``(groups, n, d)``, in float32."""
    rng = torch.Generator().manual_seed(1_000 * cell.seed + cell.n + 7 * cell.d)
    shape = (groups or 1, cell.n, cell.d)
    centres = torch.randn(10, cell.d, generator=rng, dtype=torch.float64)
    x = centres[torch.randint(10, shape[:2], generator=rng)]
    x = x + 0.5 * torch.randn(shape, generator=rng, dtype=torch.float64)
    y = torch.randn(shape, generator=rng, dtype=torch.float64)
    if groups is None:
        x, y = x[0], y[0]
    return x.float(), y.float()


def epsilon_of(cell: Cell, x: Tensor, y: Tensor) -> float:
    """kappa times the standard deviation of the cost, on 2000 points of each (first) cloud at most."""
    xs, ys = (z.reshape(-1, cell.d)[: min(cell.n, 2_000)].double() for z in (x, y))
    return cell.kappa * half_cost(xs, ys).std().item()


def half_cost(x: Tensor, y: Tensor) -> Tensor:
    return 0.5 * torch.cdist(x, y).square()


def split(cell: Cell) -> torch.Generator:
    """The source of the random halves, the same for the reference and for who is measured against it."""
    return torch.Generator().manual_seed(cell.seed)


def reference(cell: Cell, debias: str = "self", seconds: float = 600.0) -> Reference:
    """The divergence of a cell, from the cache where it is there.

    :raises NotConverged: when that takes longer than ``seconds``
    """
    name = "_".join(f"{key}{value}" for key, value in asdict(cell).items())
    path = FOLDER / f"{name}_{debias}.pt"
    if path.exists():
        return Reference(**torch.load(path, weights_only=True))
    x, y = clouds(cell)
    epsilon, start = epsilon_of(cell, x, y), time.perf_counter()
    x, y = x.double(), y.double()
    if debias == "self":
        value, gradient = _same_batch(x, y, epsilon, start + seconds)
    else:
        value, gradient = _independent(cell, x, y, epsilon, start + seconds)
    found = Reference(value, gradient, time.perf_counter() - start)
    FOLDER.mkdir(exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(asdict(found), part)
    part.replace(path)
    return found


def _same_batch(x: Tensor, y: Tensor, epsilon: float, deadline: float) -> tuple[float, Tensor]:
    cross, gradient, _ = transport(x, y, epsilon, deadline)
    of_x, own, _ = transport(x, x, epsilon, deadline, symmetric=True)
    of_y, _, _ = transport(y, y, epsilon, deadline, symmetric=True)
    return cross - of_x / 2 - of_y / 2, gradient - own  # own: through one of its two equal sides


def _independent(cell: Cell, x: Tensor, y: Tensor, epsilon: float, deadline: float) -> tuple[float, Tensor]:
    from pyro_sinkhorn.ot.halves import draw_halves

    halves = draw_halves(cell.n, cell.n, generator=split(cell))
    x_halves = [half.index[0] for half in (halves.x1, halves.x2)]
    y_halves = [half.index[0] for half in (halves.y1, halves.y2)]
    value, gradient = 0.0, torch.zeros_like(x)
    for i in x_halves:
        for j in y_halves:
            cost, in_x, _ = transport(x[i], y[j], epsilon, deadline)
            value += cost / 4
            gradient[i] += in_x / 4
    cost, first, second = transport(x[x_halves[0]], x[x_halves[1]], epsilon, deadline)
    gradient[x_halves[0]] -= first / 2
    gradient[x_halves[1]] -= second / 2
    within, _, _ = transport(y[y_halves[0]], y[y_halves[1]], epsilon, deadline)
    return value - cost / 2 - within / 2, gradient


def transport(
    x: Tensor, y: Tensor, epsilon: float, deadline: float, symmetric: bool = False
) -> tuple[float, Tensor, Tensor]:
    """Entropic value between uniform clouds, and its gradients in both (in each side, where they are the same)."""
    scaled = half_cost(x, y).div_(epsilon)
    solve = _solve_symmetric if symmetric else _solve
    f, g = solve(scaled, deadline)
    plan = (f.unsqueeze(1) + g - scaled).exp_().div_(scaled.numel())
    value = epsilon * (f.mean() + g.mean() - plan.sum() + 1).item()
    in_x = plan.sum(1, keepdim=True) * x - plan @ y
    return value, in_x, plan.sum(0).unsqueeze(1) * y - plan.mT @ x


def _solve(scaled: Tensor, deadline: float) -> tuple[Tensor, Tensor]:
    """Potentials over epsilon of a cost over epsilon. The map is a row step and a column step, in ``g`` alone."""
    kernel: dict[str, Tensor] = {}

    def rebuild(g: Tensor) -> None:
        exponent = g - scaled
        rows = exponent.logsumexp(1)
        kernel.update(g=g, f=-rows, matrix=exponent.sub_(rows.unsqueeze(1)).exp_())

    def residual(g: Tensor) -> Tensor:
        if not kernel or (g - kernel["g"]).abs().max() > DRIFT:
            rebuild(g)
        scale = (g - kernel["g"]).exp()
        rows = kernel["matrix"] @ scale
        kernel["now"] = kernel["f"] - rows.log()
        columns = (kernel["matrix"].mT @ (1 / rows)) * scale * (scaled.shape[1] / scaled.shape[0])
        return -columns.log()

    g = _accelerated(residual, torch.zeros_like(scaled[0]), deadline)
    return kernel["now"] + torch.log(torch.tensor(scaled.shape[1])), g


def _solve_symmetric(scaled: Tensor, deadline: float) -> tuple[Tensor, Tensor]:
    """One potential for both sides; its damped step is two thirds of the whole one (rate 1/3 near the end)."""
    kernel: dict[str, Tensor] = {}

    def residual(h: Tensor) -> Tensor:
        if not kernel or (h - kernel["h"]).abs().max() > DRIFT:
            kernel.update(h=h, matrix=(h.unsqueeze(1) + h - scaled).exp_())
        scale = (h - kernel["h"]).exp()
        return -((kernel["matrix"] @ scale) * scale / len(h)).log() * (2 / 3)

    h = _accelerated(residual, torch.zeros_like(scaled[0]), deadline)
    return h, h


def _accelerated(
    residual: Callable[[Tensor], Tensor], h: Tensor, deadline: float, memory: int = 10
) -> Tensor:
    r"""Zero of a residual :math:`r`, by Anderson's acceleration of :math:`h \leftarrow h + r(h)` (Walker and Ni 2011).

    Ten plain steps first, and again from the best point whenever the error has grown tenfold.
    """
    points: list[Tensor] = []
    residuals: list[Tensor] = []
    plain, best, best_point = 10, torch.inf, h
    while True:
        r = residual(h)
        error = r.expm1().abs().mean().item()
        if error <= TOLERANCE:
            return h
        if time.perf_counter() > deadline or (plain > 0 and not error < torch.inf):
            raise NotConverged(f"marginal error {error:.1e}, above {TOLERANCE:.0e}, when the time was up")
        if plain <= 0 and not error <= 10 * best:
            h, points, residuals, plain = best_point, [], [], 10
            continue
        if error < best:
            best, best_point = error, h
        points, residuals = [*points[-memory:], h], [*residuals[-memory:], r]
        if plain > 0 or len(points) < 2:
            plain -= 1
            h = h + r
            continue
        changes = torch.stack(residuals).diff(dim=0)
        moves = torch.stack(points).diff(dim=0) + changes
        weights = torch.linalg.lstsq(changes.mT, r.unsqueeze(1), driver="gelsy").solution
        h = h + r - (weights.mT @ moves).squeeze(0)
