r"""A problem as the Triton kernels read it, and a solution as everyone else does; torch alone, no Triton.

Each cloud is taken about its own mean, the left one is scaled by :math:`2s`, :math:`s = \log_2(e)/\varepsilon`, and the
coordinates are padded with zeros to 16, 32 or a multiple of 64, which is what the tensor cores read. A cost that is no
inner product becomes a matrix of scores :math:`-sC`. Potentials travel in base 2, without squared norms: see
:mod:`~pyro_sinkhorn.ot.backends.triton_parts`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_sinkhorn.ot.backends.start import gaussian_potentials
from pyro_sinkhorn.ot.problem import Problem


@dataclass(frozen=True)
class Layout:
    """Contiguous float32 tensors and the constants that kernels are compiled for.

    left, right:    clouds ``(B, n, D)``, scaled by 2s, and ``(B, m, D)``; or, where ``dense``, scores ``(B, n, m)``, twice
    a, b:           weights, ``(B, n)`` and ``(B, m)``
    norm_x, norm_y: what the potentials travel without: :math:`s\\,(|x|^2+2\\langle x,\\delta\\rangle)` and
                    :math:`s\\,(|y|^2-2\\langle y,\\delta\\rangle+|\\delta|^2)` of the centred clouds, :math:`\\delta` the
                    difference of their means; zero where ``dense``
    scale:          s, ``(B, 1)``
    invalid:        problems with points, weights or a start that are not finite, ``(B,)``
    """

    left: Tensor
    right: Tensor
    a: Tensor
    b: Tensor
    norm_x: Tensor
    norm_y: Tensor
    scale: Tensor
    invalid: Tensor
    dense: bool
    symmetric: bool
    precision: str

    @property
    def batch(self) -> int:
        return self.a.shape[0]

    @property
    def n(self) -> int:
        return self.a.shape[1]

    @property
    def m(self) -> int:
        return self.b.shape[1]

    @property
    def constants(self) -> dict[str, Any]:
        """Arguments of every kernel that reads scores."""
        width = 16 if self.dense else self.left.shape[-1]
        return {"D": width, "BD": min(width, 64), "DENSE": self.dense, "PRECISION": self.precision}

    def transposed_scores(self) -> Tensor:
        """The matrix of scores, ``(B, m, n)``."""
        if self.dense:
            return self.left.mT.contiguous()
        return self.right @ self.left.mT

    def to_cost_units(self, phi: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """Potentials f and g; NaN for what was not finite to begin with."""
        invalid = self.invalid.unsqueeze(-1)
        f, g = (phi + self.norm_x) / self.scale, (gamma + self.norm_y) / self.scale
        return f.masked_fill(invalid, math.nan), g.masked_fill(invalid, math.nan)


@dataclass(frozen=True)
class State:
    """What a solver reports of each problem, ``(B,)``: the error, the rounds made, whether it is to do nothing more."""

    error: Tensor
    count: Tensor
    done: Tensor

    @staticmethod
    def of(layout: Layout) -> State:
        return State(
            torch.full_like(layout.scale[:, 0], math.inf),
            torch.zeros_like(layout.invalid, dtype=torch.int32),
            layout.invalid.to(torch.int32),
        )


def lay_out(problem: Problem) -> tuple[Layout, Tensor, Tensor]:
    """The layout of a problem and where its potentials begin, ``phi`` and ``gamma``.

    They begin at ``problem.start``, else at the potentials of the normal laws with the clouds' moments, else, for a cost
    that is no inner product, at zero.
    """
    x, y, a, b = (t.detach() for t in (problem.x, problem.y, problem.a, problem.b))
    scale = (math.log2(math.e) / problem.epsilon.detach()).unsqueeze(-1)
    dense = problem.cost != "sqeuclidean"
    matrix = problem.cost_matrix.detach() if dense else x
    start = [potential.detach() for potential in problem.start or ()]
    # Kernels see no NaN: what such a problem holds is replaced, nothing is done for it and its answer is NaN.
    invalid = ~torch.stack([t.isfinite().flatten(1).all(-1) for t in (x, y, a, b, matrix, *start)]).all(0)
    vector, square = invalid[:, None], invalid[:, None, None]
    x, y, matrix = (t.masked_fill(square, 0.0) for t in (x, y, matrix))
    a, b = a.masked_fill(vector, 1.0), b.masked_fill(vector, 1.0)
    # torch's own switch, of torch.set_float32_matmul_precision
    precision = "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    if dense:
        left = right = (-scale.unsqueeze(-1) * matrix).contiguous()
        norm_x, norm_y = torch.zeros_like(a), torch.zeros_like(b)
        phi, gamma = torch.zeros_like(a), torch.zeros_like(b)
    else:
        # Each cloud about its own mean: how far apart they are then costs no digits of the exponents, since what it adds
        # to the cost, a function of x and one of y, stays out of the iterations.
        mean_x, mean_y = (
            (a.unsqueeze(-2) @ x) / a.sum(-1)[:, None, None],
            (b.unsqueeze(-2) @ y) / b.sum(-1)[:, None, None],
        )
        shift = mean_x - mean_y
        x, y, double = x - mean_x, y - mean_y, 2 * scale.unsqueeze(-1)
        left, right = double * x, y
        if precision == "tf32":
            # Norms of the rounded points: then the exponents are those of points that moved by a rounding error, not
            # of distances that are off by the rounding of their norms.
            left, right = round_to_tf32(left), round_to_tf32(right)
            x, y = left / double, right
        norm_x = scale * (x * (x + 2 * shift)).sum(-1)
        norm_y = scale * ((y * (y - 2 * shift)).sum(-1) + shift.square().sum(-1))
        padding = (0, padded_width(x.shape[-1]) - x.shape[-1])
        left, right = (torch.nn.functional.pad(t, padding).contiguous() for t in (left, right))
        if problem.start is None:  # of the centred clouds
            f, g = gaussian_potentials(x, y, a, b, problem.epsilon.detach())
            phi, gamma = scale * (f - x.square().sum(-1)), scale * (g - y.square().sum(-1))
    if start:
        phi, gamma = (
            scale * potential.masked_fill(vector, 0.0) - norm
            for potential, norm in zip(start, (norm_x, norm_y), strict=True)
        )
    layout = Layout(
        left,
        right,
        a.contiguous(),
        b.contiguous(),
        norm_x,
        norm_y,
        scale,
        invalid,
        dense,
        problem.symmetric,
        precision,
    )
    return layout, phi.contiguous(), gamma.contiguous()


def round_to_tf32(points: Tensor) -> Tensor:
    """To 10 bits after the leading one, the nearest.

    >>> round_to_tf32(torch.tensor([1.0, 1 + 2**-12, 1 + 2**-10, -1 - 0.75 * 2**-10])).sub(1).mul(1024).tolist()
    [0.0, 0.0, 1.0, -2049.0]
    """
    bits = points.float().contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def padded_width(d: int) -> int:
    """Coordinates as the tensor cores read them.

    >>> [padded_width(d) for d in (1, 16, 17, 50, 64, 65)]
    [16, 16, 32, 64, 64, 128]
    """
    if d > 64:
        return 64 * math.ceil(d / 64)
    return max(16, 1 << (d - 1).bit_length())
