"""The uniform distribution on a sphere of any dimension."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

from pyro_sinkhorn.distributions._sphere import log_surface, random_directions


class HypersphericalUniform(TorchDistribution):
    r"""Uniform distribution on the unit sphere :math:`S^{d-1}` in :math:`\mathbb R^d`.

    .. math:: p(x) = \frac{\Gamma(d/2)}{2\pi^{d/2}}, \qquad \|x\| = 1,

    with respect to surface measure. Draws are normalised normal vectors (Muller 1959, *A note on a method for
    generating points uniformly on N-dimensional spheres*).

    Args:
        dim: d, the number of coordinates, at least 2; ``event_shape`` is ``(dim,)``. The sphere itself has
            dimension d - 1, and other libraries count by that: here a circle is ``dim=2``.
        batch_shape: default ``()``; a plate expands it as usual.
        validate_args: whether ``log_prob`` checks its argument; default as everywhere in Pyro.
        dtype, device: of the draws. Default: torch's at the time of construction. They are asked for because
            there is no parameter to take them from.

    Raises:
        TypeError: dim is not an int; dtype is not a floating point one.
        ValueError: dim is below 2; by ``log_prob``, when its argument is not made of unit vectors of length
            dim.

    >>> d = HypersphericalUniform(3, dtype=torch.float64)
    >>> x = d.sample((4,))
    >>> x.shape, d.log_prob(x)[0].exp().mul(4 * torch.pi).round(decimals=12).item()  # the surface is 4 pi
    (torch.Size([4, 3]), 1.0)
    """

    arg_constraints: dict[str, Any] = {}
    support = constraints.sphere
    # There is no parameter a gradient could be wanted for, so any draw is a reparametrised one. False would
    # be harmful: Pyro would then add a score-function term for this site, and noise with it.
    has_rsample = True

    def __init__(
        self,
        dim: int,
        batch_shape: Any = (),
        validate_args: bool | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if not isinstance(dim, int) or isinstance(dim, bool):
            raise TypeError(f"HypersphericalUniform: dim must be an int, but got {dim!r}")
        if dim < 2:
            raise ValueError(
                f"HypersphericalUniform: dim must be at least 2 (the circle), but got {dim}; "
                "dim counts the coordinates of a point, not the dimension of the surface"
            )
        probe = torch.empty(0, dtype=dtype, device=device)  # resolves the defaults
        if not probe.is_floating_point():
            raise TypeError(f"HypersphericalUniform: dtype must be a floating point one, but got {dtype}")
        self._dtype, self._device = probe.dtype, probe.device
        super().__init__(torch.Size(batch_shape), torch.Size((dim,)), validate_args=validate_args)

    @property
    def dim(self) -> int:
        """Number of coordinates."""
        return self.event_shape[0]

    def __repr__(self) -> str:
        return f"HypersphericalUniform(dim={self.dim}, batch_shape={tuple(self.batch_shape)})"

    def expand(self, batch_shape: Any, _instance: Any = None) -> HypersphericalUniform:
        new = self._get_checked_instance(HypersphericalUniform, _instance)
        new._dtype, new._device = self._dtype, self._device
        super(HypersphericalUniform, new).__init__(
            torch.Size(batch_shape), self.event_shape, validate_args=False
        )
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        # Half-precision draws are coarse enough for the norm to matter: normalise before rounding.
        working = torch.promote_types(self._dtype, torch.float32)
        return random_directions(shape, working, self._device).to(self._dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        return value.new_full(shape, -log_surface(self.dim))

    def entropy(self) -> Tensor:
        """Logarithm of the surface."""
        return torch.full(self.batch_shape, log_surface(self.dim), dtype=self._dtype, device=self._device)

    @property
    def mean(self) -> Tensor:
        """The mean in the surrounding space: the centre of the ball."""
        return torch.zeros(self._extended_shape(), dtype=self._dtype, device=self._device)

    @property
    def variance(self) -> Tensor:
        """Of each coordinate: 1/d."""
        return torch.full(self._extended_shape(), 1 / self.dim, dtype=self._dtype, device=self._device)
