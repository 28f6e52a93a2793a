"""Posterior draws beside the values that made the data: what every check of calibration reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sinkhorn.errors import NonFiniteError, ProgramError


class Scalar(NamedTuple):
    """One number of the latents: its name, ``truth (n_sim,)`` and ``draws (n_draws, n_sim)``, both in float64."""

    name: str
    truth: Tensor
    draws: Tensor


class Joined(NamedTuple):
    """All scalars side by side, standardised, and by what.

    names:   of the k columns
    truth:   ``(n_sim, k)``
    draws:   ``(n_draws, n_sim, k)``
    centre:  what was taken away, ``(k,)``
    scale:   what was divided by, ``(k,)``
    """

    names: tuple[str, ...]
    truth: Tensor
    draws: Tensor
    centre: Tensor
    scale: Tensor


@dataclass(frozen=True, eq=False)
class PosteriorDraws:
    r"""``n_sim`` simulations of a program, and ``n_draws`` posterior draws for the data of each.

    For simulation i, latents :math:`\theta_i \sim p(\theta)`, data :math:`x_i \sim p(x \mid \theta_i)` and draws
    :math:`\theta_i^{1 \ldots S} \sim q(\theta \mid x_i)`. If q is the posterior, truth and draws are exchangeable given
    :math:`x_i`; every check rests on that. It asks for draws that are independent given the data: thin those of a
    Markov chain until they are. The simulations must be independent too: data that share a global latent are one.

    :param truth: latent site to its values ``(n_sim, *event)``; integers and booleans are welcome
    :param draws: the same sites, ``(n_draws, n_sim, *event)``, at least 2 draws
    :param data: observed site to ``(n_sim, *event)``, or None. Only :func:`tarp` reads it
    :raises ProgramError: sites or shapes that do not go together
    :raises NonFiniteError: NaN or infinity among the values

    >>> drawn = PosteriorDraws({"z": torch.randn(50, 2)}, {"z": torch.randn(9, 50, 2)})
    >>> drawn.n_sim, drawn.n_draws, [scalar.name for scalar in drawn.scalars()]
    (50, 9, ['z[0]', 'z[1]'])
    """

    truth: Mapping[str, Tensor]
    draws: Mapping[str, Tensor]
    data: Mapping[str, Tensor] | None = field(default=None)

    def __post_init__(self) -> None:
        _check_sites(self.truth, self.draws)
        if self.data is not None:
            _check_values("data", self.data, lambda name: (self.n_sim,))
        for name in ("truth", "draws", "data"):
            values = getattr(self, name)
            if values is not None:
                object.__setattr__(self, name, {site: value.detach() for site, value in values.items()})

    @property
    def n_sim(self) -> int:
        """Simulations."""
        return len(next(iter(self.truth.values())))

    @property
    def n_draws(self) -> int:
        """Posterior draws for each."""
        return len(next(iter(self.draws.values())))

    def scalars(self) -> Iterator[Scalar]:
        """Every number of every site, ``'tau'``, ``'z[0]'``, ``'theta[1,2]'``, less those of :meth:`constants`."""
        return (scalar for scalar in self._numbers() if not _is_constant(scalar))

    def constants(self) -> tuple[str, ...]:
        """Numbers that have one and the same value in all truths and draws, like the corner of a Cholesky factor.

        There is nothing to check in them, and each would cost the others some power.
        """
        return tuple(scalar.name for scalar in self._numbers() if _is_constant(scalar))

    def joined(self) -> Joined:
        r"""All scalars as columns, less the median of the truth, over half its central 68% range.

        Both are robust, so that a few wild values of a heavy tail do not set the unit of all others. Where that range
        is nothing, as for a rare state, the standard deviation is used, or 1.
        """
        scalars = list(self.scalars())
        if not scalars:
            raise ProgramError(f"nothing to check: {', '.join(self.constants())} never vary")
        truth = torch.stack([scalar.truth for scalar in scalars], -1)
        draws = torch.stack([scalar.draws for scalar in scalars], -1)
        low, centre, high = torch.quantile(truth, torch.tensor([0.16, 0.5, 0.84], dtype=truth.dtype), dim=0)
        scale, spread = (high - low) / 2, truth.std(0, correction=0)
        scale = torch.where(scale > 0, scale, torch.where(spread > 0, spread, torch.ones_like(spread)))
        names = tuple(scalar.name for scalar in scalars)
        return Joined(names, (truth - centre) / scale, (draws - centre) / scale, centre, scale)

    def _numbers(self) -> Iterator[Scalar]:
        for site, value in self.truth.items():
            truth = value.reshape(self.n_sim, -1).cpu().double()
            draws = self.draws[site].reshape(self.n_draws, self.n_sim, -1).cpu().double()
            for column, index in enumerate(product(*map(range, value.shape[1:]))):
                name = f"{site}[{','.join(map(str, index))}]" if index else site
                yield Scalar(name, truth[:, column], draws[..., column])


def _is_constant(scalar: Scalar) -> bool:
    first = scalar.truth[0]
    return bool((scalar.truth == first).all() and (scalar.draws == first).all())


def _check_sites(truth: Mapping[str, Tensor], draws: Mapping[str, Tensor]) -> None:
    if not isinstance(truth, Mapping) or not isinstance(draws, Mapping) or not truth:
        raise ProgramError("truth and draws must be dictionaries of tensors by site, with one site at least")
    if set(truth) != set(draws):
        raise ProgramError(
            f"truth has the sites {sorted(truth)} and draws {sorted(draws)}: expected the same"
        )
    first = next(iter(truth))
    for part, values in (("truth", truth), ("draws", draws)):
        least = 1 if part == "truth" else 2
        if not isinstance(values[first], Tensor) or values[first].dim() < least:
            raise ProgramError(f"{part} of site '{first}' is no tensor {_wanted(part)}")
    n_sim, n_draws = len(truth[first]), len(draws[first])
    if n_sim < 1 or n_draws < 2:
        raise ProgramError(
            f"site '{first}' has {n_sim} simulations and {n_draws} draws: needs 1 and 2 at least"
        )
    _check_values("truth", truth, lambda name: (n_sim,))
    _check_values("draws", draws, lambda name: (n_draws, *truth[name].shape))


def _check_values(part: str, values: Mapping[str, Tensor], start: Callable[[str], tuple[int, ...]]) -> None:
    """Tensors of real and finite numbers whose shape begins as ``start`` says; that of draws is all of it."""
    if not isinstance(values, Mapping) or not values:
        raise ProgramError(f"{part} must be a dictionary of tensors by site, with one site at least")
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise ProgramError(f"{part} of site '{name}' is a {type(value).__name__}: expected a tensor")
        shape = start(name)
        fits = value.shape == shape if part == "draws" else value.shape[: len(shape)] == shape
        if not fits:
            dots = "" if part == "draws" else ", ..."
            raise ProgramError(
                f"{part} of site '{name}' has shape {tuple(value.shape)}: expected {_wanted(part)}, which is "
                f"({', '.join(map(str, shape))}{dots}) here"
            )
        if value.is_complex():
            raise ProgramError(f"{part} of site '{name}' is complex: give its real and imaginary parts")
        bad = int((~value.isfinite()).sum())
        if bad:
            raise NonFiniteError(
                f"{part} of site '{name}', shape {tuple(value.shape)}, has {bad} NaN or infinite values"
            )


def _wanted(part: str) -> str:
    return "(n_draws, n_sim, *event)" if part == "draws" else "(n_sim, *event)"
