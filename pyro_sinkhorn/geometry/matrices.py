r"""Supports made of matrices: triangular ones, correlations and covariances.

Heads are log-Cholesky: a lower triangle of free numbers, exponentials on the diagonal. Embeddings:

==================  ==================================================================================
lower_cholesky      the triangle, its diagonal by logarithms (the log-Cholesky metric, Lin 2019)
corr_cholesky       the triangle: every row is a point of a half-sphere, compared by its chord
corr_matrix         Frobenius: the entries below the diagonal, :math:`\sqrt2` times
positive_definite   log-Euclidean (Arsigny et al. 2006): the matrix logarithm, off-diagonals :math:`\sqrt2` times
==================  ==================================================================================
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyro_sinkhorn.geometry.base import Geometry


def _triangle(size: int, diagonal: bool) -> int:
    return size * (size + 1) // 2 if diagonal else size * (size - 1) // 2


class _Square(Geometry):
    """A batch of square matrices of which ``count`` numbers are free.

    diagonal:  whether the diagonal is free
    """

    def __init__(self, event_shape: torch.Size, diagonal: bool) -> None:
        self.size = event_shape[-1]
        self.diagonal = diagonal
        # A 1x1 correlation has nothing free, but a head needs an output to read.
        count = _triangle(self.size, diagonal) * math.prod(event_shape[:-2])
        super().__init__(event_shape, dim=count, num_raw=max(count, 1))

    def _filled(self, raw: Tensor) -> Tensor:
        """Raw numbers in the lower triangle, zeros elsewhere: ``(..., *event_shape)``."""
        per_matrix = _triangle(self.size, self.diagonal)
        lead = (*raw.shape[:-1], *self.event_shape[:-2])
        numbers = raw[..., : self.dim].reshape(*lead, per_matrix)
        rows, columns = self._indices(raw.device)
        flat = raw.new_zeros(*lead, self.size * self.size).index_copy(-1, rows * self.size + columns, numbers)
        return flat.reshape(*lead, self.size, self.size)

    def _indices(self, device: torch.device) -> tuple[Tensor, Tensor]:
        rows, columns = torch.tril_indices(
            self.size, self.size, 0 if self.diagonal else -1, device=device
        ).unbind()
        return rows, columns

    def _taken(self, matrix: Tensor) -> Tensor:
        """The free entries of the lower triangle, ``(..., count)``."""
        rows, columns = self._indices(matrix.device)
        lead = matrix.shape[: matrix.dim() - len(self.event_shape)]
        return matrix[..., rows, columns].reshape(*lead, -1)


def _bounded_exp(x: Tensor) -> Tensor:
    """Exponential that stays well inside the floating range, also when squared."""
    limit = 40.0 if x.dtype != torch.float64 else 300.0
    return x.clamp(-limit, limit).exp()


class LowerTriangular(_Square):
    """``lower_triangular``: free numbers; ``unit_lower_cholesky`` with ones on the diagonal."""

    def __init__(self, event_shape: torch.Size, unit_diagonal: bool = False) -> None:
        super().__init__(event_shape, diagonal=not unit_diagonal)

    def head(self, raw: Tensor) -> Tensor:
        """The numbers in the triangle."""
        matrix = self._filled(raw)
        return matrix if self.diagonal else matrix + torch.eye(self.size, dtype=raw.dtype, device=raw.device)

    def embed(self, value: Tensor) -> Tensor:
        """The free entries."""
        return self._taken(value)

    def inverse(self, value: Tensor) -> Tensor | None:
        """The free entries."""
        return self._taken(value) if self.dim else None


class LowerCholesky(_Square):
    """``lower_cholesky``: free below the diagonal, positive on it."""

    def __init__(self, event_shape: torch.Size) -> None:
        super().__init__(event_shape, diagonal=True)

    def head(self, raw: Tensor) -> Tensor:
        """The numbers in the triangle, exponentials on the diagonal."""
        matrix = self._filled(raw)
        return matrix.tril(-1) + torch.diag_embed(_bounded_exp(matrix.diagonal(dim1=-2, dim2=-1)))

    def embed(self, value: Tensor) -> Tensor:
        """Entries below the diagonal, logarithms on it."""
        diagonal = value.diagonal(dim1=-2, dim2=-1).clamp_min(torch.finfo(value.dtype).tiny)
        return self._taken(value.tril(-1) + torch.diag_embed(diagonal.log()))

    def inverse(self, value: Tensor) -> Tensor:
        """The embedding itself."""
        return self.embed(value)


class CorrCholesky(_Square):
    """``corr_cholesky``: lower triangular, positive diagonal, rows of norm 1."""

    def __init__(self, event_shape: torch.Size) -> None:
        super().__init__(event_shape, diagonal=False)

    def head(self, raw: Tensor) -> Tensor:
        """Rows ``(raw, 1)`` normalised: the last entry of a row, on the diagonal, stays positive."""
        # Bounded, so that the diagonal neither rounds to 0 nor its square below the resolution of the row's norm.
        limit = 1e3 if raw.dtype != torch.float64 else 1e6
        free = self._filled(raw)
        free = limit * (free / limit).tanh()
        rows = free + torch.eye(self.size, dtype=raw.dtype, device=raw.device)
        return rows / rows.norm(dim=-1, keepdim=True)

    def embed(self, value: Tensor) -> Tensor:
        """The lower triangle, diagonal included."""
        rows, columns = torch.tril_indices(self.size, self.size, device=value.device).unbind()
        lead = value.shape[: value.dim() - len(self.event_shape)]
        return value[..., rows, columns].reshape(*lead, -1)

    def inverse(self, value: Tensor) -> Tensor | None:
        """Entries over the diagonal of their row."""
        diagonal = value.diagonal(dim1=-2, dim2=-1).clamp_min(1e-3)
        return self._taken(value / diagonal.unsqueeze(-1)).clamp(-100, 100) if self.dim else None


class CorrMatrix(_Square):
    """``corr_matrix``: positive definite with a unit diagonal."""

    def __init__(self, event_shape: torch.Size) -> None:
        super().__init__(event_shape, diagonal=False)
        self._cholesky = CorrCholesky(event_shape)

    def head(self, raw: Tensor) -> Tensor:
        """:math:`LL^T` of a Cholesky factor, moved off the singular ones by as much as its dtype resolves."""
        factor = self._cholesky.head(raw)
        margin = 20 * self.size * torch.finfo(raw.dtype).eps
        below = ((1 - margin) * factor @ factor.mT).tril(-1)
        return below + below.mT + torch.eye(self.size, dtype=raw.dtype, device=raw.device)

    def embed(self, value: Tensor) -> Tensor:
        r""":math:`\sqrt2` times the entries below the diagonal, whose square is Frobenius."""
        return math.sqrt(2) * self._taken(value)

    def inverse(self, value: Tensor) -> Tensor | None:
        """Through the Cholesky factor."""
        factor, failed = torch.linalg.cholesky_ex(value)
        return None if bool(failed.any()) else self._cholesky.inverse(factor)


class PositiveDefinite(_Square):
    """``positive_definite`` and ``positive_semidefinite``: covariances."""

    def __init__(self, event_shape: torch.Size) -> None:
        super().__init__(event_shape, diagonal=True)
        self._cholesky = LowerCholesky(event_shape)

    def head(self, raw: Tensor) -> Tensor:
        """:math:`LL^T` of a Cholesky factor, symmetric to the bit and resolvably positive."""
        limit = 1e8 if raw.dtype != torch.float64 else 1e60  # whose square is still a number
        factor = self._cholesky.head(raw.clamp(-limit, limit))
        product = factor @ factor.mT
        margin = 20 * self.size * torch.finfo(raw.dtype).eps
        scale = product.diagonal(dim1=-2, dim2=-1).detach()
        below = product.tril(-1)
        diagonal = product.diagonal(dim1=-2, dim2=-1) + margin * scale
        return below + below.mT + torch.diag_embed(diagonal)

    def embed(self, value: Tensor) -> Tensor:
        r"""The matrix logarithm, off-diagonals times :math:`\sqrt2`."""
        logarithm = _MatrixLog.apply(value)
        below = math.sqrt(2) * logarithm.tril(-1)
        return self._taken(below + torch.diag_embed(logarithm.diagonal(dim1=-2, dim2=-1)))

    def inverse(self, value: Tensor) -> Tensor | None:
        """Through the Cholesky factor."""
        factor, failed = torch.linalg.cholesky_ex(value)
        return None if bool(failed.any()) else self._cholesky.inverse(factor)


class _MatrixLog(torch.autograd.Function):
    r"""Logarithm of symmetric positive matrices, smooth also where eigenvalues coincide.

    The derivative of :math:`V f(\Lambda) V^T` is :math:`V (F \circ V^T G V) V^T` with the divided differences
    :math:`F_{ij} = (f(\lambda_i)-f(\lambda_j))/(\lambda_i-\lambda_j)`, :math:`f'(\lambda_i)` on the diagonal (Daleckii
    and Krein): unlike the eigenvectors, it does not divide by the gap. Eigenvalues below the resolution of the largest
    are raised to it.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
        info = torch.finfo(matrix.dtype)
        floor = (values.abs().amax(-1, keepdim=True) * info.eps).clamp_min(info.tiny)
        values = torch.maximum(values, floor)
        ctx.save_for_backward(values, vectors)
        return (vectors * values.log().unsqueeze(-2)) @ vectors.mT

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        values, vectors = ctx.saved_tensors
        ratio = values.unsqueeze(-1) / values.unsqueeze(-2)
        # (log r) / (r - 1) is 1 at r = 1, where it is 0 / 0.
        near = (ratio - 1).abs() < 1e-4
        safe = torch.where(near, 2, ratio)
        slope = torch.where(near, 1 - (ratio - 1) / 2, safe.log() / (safe - 1)) / values.unsqueeze(-2)
        gradient = (grad_outputs[0] + grad_outputs[0].mT) / 2
        return vectors @ (slope * (vectors.mT @ gradient @ vectors)) @ vectors.mT
