"""The von Mises-Fisher distribution on a sphere of any dimension."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor
from torch.distributions.kl import register_kl

from pyro_sinkhorn.distributions._bessel import log_tilt, mean_projection, over_concentration
from pyro_sinkhorn.distributions._sphere import log_surface, random_tangents
from pyro_sinkhorn.distributions._wood import sample_one_minus_cosine
from pyro_sinkhorn.distributions.hyperspherical_uniform import HypersphericalUniform


class VonMisesFisher(TorchDistribution):
    r"""Von Mises-Fisher distribution on the unit sphere :math:`S^{d-1}` in :math:`\mathbb R^d`,
    :math:`d\ge2`.

    .. math::

        p(x\mid\mu,\kappa) = \frac{\kappa^{d/2-1}}{(2\pi)^{d/2} I_{d/2-1}(\kappa)}\,
        e^{\kappa\langle\mu,x\rangle}, \qquad \|x\|=1,

    with respect to surface measure: the normal law of covariance :math:`I/\kappa` and mean :math:`\mu`,
    conditioned on the sphere. ``concentration=0`` is the uniform law; at high concentration the draws lie
    about :math:`\sqrt{(d-1)/\kappa}` from ``loc``, so what counts as high grows with d.

    Args:
        loc: mean direction :math:`\mu`, unit vectors, shape ``(..., d)``.
        concentration: :math:`\kappa\ge0`, shape ``(...)`` or a number; its batch broadcasts with that of
            ``loc``.
        validate_args: whether arguments are checked; default as everywhere in Pyro.

    Shapes: ``batch_shape`` is the broadcast of the two, ``event_shape`` is ``(d,)``.

    **No reparametrised draws.** ``has_rsample`` is False. The widely copied code of Davidson et al. 2018
    (*Hyperspherical variational auto-encoders*) differentiates through an accepted proposal and drops
    the term for the acceptance probability; its gradient in ``concentration`` is biased except for d = 3,
    where nothing is rejected. As a prior this distribution needs no such gradient. In a guide Pyro uses the
    score function; ``pyro.distributions.ProjectedNormal`` is the reparametrised alternative.

    **Sampling** is exact, under ``no_grad``, from torch's global generator of the parameters' device. The
    cosine is drawn in float64 whatever the dtype (see ``_wood``). How many random numbers a call
    consumes varies, because of rejections.

    **The density** is computed as :math:`-\tfrac\kappa2\|x-\mu\|^2` minus a normaliser, since at large
    :math:`\kappa` the digits of :math:`\kappa\langle\mu,x\rangle-\kappa` are lost. The two agree on the
    sphere and so do their gradients along it; across it they differ. The normaliser has relative error below
    1e-13 (see ``_bessel``) and a finite gradient at 0. Sampler and normaliser need float64, which Apple's MPS
    does not have.

    Raises:
        TypeError: loc is not a floating point tensor; concentration is neither tensor nor number.
        ValueError: loc has no last dimension of size 2 or more; batches do not broadcast; under validation,
            loc is not made of unit vectors, concentration is negative, or a value is off the sphere.

    Sources: Mardia and Jupp 2000, *Directional statistics*, for the law; Wood 1994 for the sampler.

    >>> d = VonMisesFisher(torch.tensor([0.0, 0.6, 0.8], dtype=torch.float64), 10.0)
    >>> d.sample((5,)).shape, d.log_prob(d.loc).shape
    (torch.Size([5, 3]), torch.Size([]))
    >>> d.mean.div(d.loc)[1:].round(decimals=9).tolist()  # coth 10 - 1/10
    [0.900000004, 0.900000004]
    """

    arg_constraints = {"loc": constraints.sphere, "concentration": constraints.nonnegative}
    support = constraints.sphere
    has_rsample = False

    def __init__(self, loc: Tensor, concentration: Tensor | float, validate_args: bool | None = None) -> None:
        if not isinstance(loc, Tensor) or not loc.is_floating_point():
            got = loc.dtype if isinstance(loc, Tensor) else type(loc).__name__
            raise TypeError(f"VonMisesFisher: loc must be a floating point tensor, but got {got}")
        if isinstance(concentration, (int, float)):
            concentration = loc.new_tensor(float(concentration))
        elif not isinstance(concentration, Tensor):
            raise TypeError(
                "VonMisesFisher: concentration must be a tensor or a number, "
                f"got {type(concentration).__name__}"
            )
        if loc.dim() < 1 or loc.shape[-1] < 2:
            raise ValueError(
                f"VonMisesFisher: loc must have a last dimension of 2 or more coordinates, but has shape "
                f"{tuple(loc.shape)}"
            )
        try:
            batch_shape = torch.broadcast_shapes(loc.shape[:-1], concentration.shape)
        except RuntimeError as error:
            raise ValueError(
                f"VonMisesFisher: the batch {tuple(loc.shape[:-1])} of loc (shape {tuple(loc.shape)}) "
                f"does not broadcast with concentration, of shape {tuple(concentration.shape)}"
            ) from error
        if self._validate_args if validate_args is None else validate_args:
            _check(loc, concentration)
        self.loc = loc.expand(batch_shape + loc.shape[-1:])
        self.concentration = concentration.expand(batch_shape)
        super().__init__(batch_shape, loc.shape[-1:], validate_args=validate_args)

    @classmethod
    def infer_shapes(cls, **arg_shapes: Any) -> tuple[torch.Size, torch.Size]:
        loc = torch.Size(arg_shapes["loc"])
        return torch.broadcast_shapes(loc[:-1], arg_shapes.get("concentration", ())), loc[-1:]

    def expand(self, batch_shape: Any, _instance: Any = None) -> VonMisesFisher:
        new = self._get_checked_instance(VonMisesFisher, _instance)
        batch_shape = torch.Size(batch_shape)
        new.loc = self.loc.expand(batch_shape + self.event_shape)
        new.concentration = self.concentration.expand(batch_shape)
        super(VonMisesFisher, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def dim(self) -> int:
        """Number of coordinates."""
        return self.event_shape[0]

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        # Half-precision draws are coarse enough for the norm to matter: normalise before rounding.
        loc = self.loc.to(torch.promote_types(self.loc.dtype, torch.float32)).expand(shape)
        u = sample_one_minus_cosine(self.dim, self.concentration.to(torch.float64).expand(shape[:-1]))
        sine = (u * (2 - u)).clamp_min(0).sqrt()
        draws = (
            loc
            - u.to(loc.dtype).unsqueeze(-1) * loc
            + sine.to(loc.dtype).unsqueeze(-1) * random_tangents(loc)
        )
        # loc itself is a unit vector only up to rounding.
        return (draws / draws.norm(dim=-1, keepdim=True)).to(self.loc.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        # Both terms grow with d and kappa and nearly cancel, so the sum is formed in float64.
        concentration = self.concentration.to(torch.float64)
        energy = (value - self.loc).square().sum(-1).to(torch.float64) / 2
        log_prob = -concentration * energy - log_tilt(self.dim, concentration) - log_surface(self.dim)
        return log_prob.to(torch.promote_types(value.dtype, self._dtype))

    @property
    def mean(self) -> Tensor:
        r"""The mean in the surrounding space, :math:`A_d(\kappa)\,\mu` with
        :math:`A_d = I_{d/2}/I_{d/2-1}`."""
        projection, _ = mean_projection(self.dim, self.concentration)
        return projection.to(self._dtype).unsqueeze(-1) * self.loc

    @property
    def mode(self) -> Tensor:
        """The mean direction ``loc`` (arbitrary where ``concentration`` is 0)."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        r"""Of each coordinate: :math:`\sigma_t^2 + (\sigma_r^2-\sigma_t^2)\mu_i^2`.

        Across :math:`\mu`, :math:`\sigma_t^2 = A/\kappa`; along it,
        :math:`\sigma_r^2 = 1 - A^2 - (d-1)A/\kappa`.
        """
        projection, shortfall = mean_projection(self.dim, self.concentration)
        across = over_concentration(self.dim, self.concentration, projection)
        along = shortfall * (2 - shortfall) - (self.dim - 1) * across
        square = self.loc.square()
        return (across.unsqueeze(-1) * (1 - square) + along.unsqueeze(-1) * square).to(self._dtype)

    def entropy(self) -> Tensor:
        r"""Differential entropy :math:`\kappa(1-A_d) + \varphi_d(\kappa) + \log|S^{d-1}|`, see
        ``_bessel``."""
        return (log_surface(self.dim) - _kl_to_uniform(self)).to(self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        return torch.promote_types(self.loc.dtype, self.concentration.dtype)


def _check(loc: Tensor, concentration: Tensor) -> None:
    if not constraints.sphere.check(loc).all():
        norm = loc.detach().norm(dim=-1)
        raise ValueError(
            "VonMisesFisher: loc must hold unit vectors along its last dimension, but the norms of loc "
            f"(shape {tuple(loc.shape)}) range from {norm.min().item():.6g} to {norm.max().item():.6g}. "
            "Normalise it: loc / loc.norm(dim=-1, keepdim=True)"
        )
    if not constraints.nonnegative.check(concentration).all():
        raise ValueError(
            "VonMisesFisher: concentration must be nonnegative, but its smallest entry is "
            f"{concentration.detach().min().item():.6g} (shape {tuple(concentration.shape)}). A negative "
            "one would be the law of the opposite direction: use -loc. For a free parameter use exp or "
            "softplus."
        )


def _kl_to_uniform(p: VonMisesFisher) -> Tensor:
    kappa = p.concentration.to(torch.float64)
    _, shortfall = mean_projection(p.dim, kappa)
    # Two numbers of size kappa cancel near 0, where the rest is kappa^2 / 2d: rounding must not make it
    # negative.
    return (-kappa * shortfall - log_tilt(p.dim, kappa)).clamp_min(0)


@register_kl(VonMisesFisher, HypersphericalUniform)
def _kl_vmf_uniform(p: VonMisesFisher, q: HypersphericalUniform) -> Tensor:
    _check_same_dim(p.dim, q.dim)
    return _kl_to_uniform(p).to(p._dtype).expand(torch.broadcast_shapes(p.batch_shape, q.batch_shape))


@register_kl(VonMisesFisher, VonMisesFisher)
def _kl_vmf_vmf(p: VonMisesFisher, q: VonMisesFisher) -> Tensor:
    _check_same_dim(p.dim, q.dim)
    kappa = q.concentration.to(torch.float64)
    projection, shortfall = mean_projection(p.dim, p.concentration)
    # E_p (1 - <mu_q, x>), from the distance between the mean directions for the reason given in log_prob.
    miss = shortfall + projection * (p.loc - q.loc).square().sum(-1).to(torch.float64) / 2
    divergence = _kl_to_uniform(p) + log_tilt(q.dim, kappa) + kappa * miss
    return divergence.to(torch.promote_types(p._dtype, q._dtype))


def _check_same_dim(p: int, q: int) -> None:
    if p != q:
        raise ValueError(f"the KL divergence needs distributions on the same sphere, but got dim {p} and {q}")
