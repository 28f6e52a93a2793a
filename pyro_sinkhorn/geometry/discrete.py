r"""Discrete supports: a guide gives every state a probability, and states are compared by their indicators.

=============================  ==============================  ================================================
support                        states                          embedding
=============================  ==============================  ================================================
boolean                        0, 1                            the number itself
one_hot                        unit vectors                    the vector itself
integer_interval               low, ..., high                  one-hot: all states equally far apart
nonnegative_integer (counts)   0, ..., the largest kept        one-hot in 64 columns, the last for all beyond
=============================  ==============================  ================================================

Events with more dimensions hold several coordinates of that kind; their states are all combinations, and the guide's
probabilities need not factorise. A count has no largest state. It is cut off where the prior leaves at most
:math:`10^{-4}` of its mass beyond.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyro_sinkhorn.distributions.finite import laid_out
from pyro_sinkhorn.errors import ProgramError
from pyro_sinkhorn.geometry.base import Geometry

#: More joint states of one site than this are not tabulated.
MAX_TABLE = 2**16
#: Columns of a count's embedding, fixed so that clouds of different rates can be compared.
COUNT_COLUMNS = 64
#: Prior mass that a count may lose.
LOST_MASS = 1e-4


class Discrete(Geometry):
    """Base class: ``num_coordinates`` coordinates, each in one of ``base`` states.

    :param base: states of one coordinate, ``(b, *coordinate_shape)``
    """

    def __init__(self, event_shape: torch.Size, base: Tensor, num_coordinates: int, dim: int) -> None:
        self.base, self.num_coordinates = base, num_coordinates
        super().__init__(event_shape, dim, self.num_states)

    @property
    def num_states(self) -> int:
        """How many joint states there are."""
        return len(self.base) ** self.num_coordinates

    def states(self, site: str | None = None) -> Tensor:
        """All joint states, ``(num_states, *event_shape)``, the last coordinate running fastest.

        :param site: for the error
        :raises ProgramError: they are too many for a table
        """
        if self.num_states > MAX_TABLE:
            raise ProgramError(
                f"discrete latent {site!r} of event shape {tuple(self.event_shape)} has "
                f"{len(self.base)} ** {self.num_coordinates} joint states, more than the {MAX_TABLE} that can be tabulated: "
                "use fewer coordinates, several sites, or AutoImplicit(..., discrete='straight_through')"
            )
        runs = torch.cartesian_prod(*[torch.arange(len(self.base))] * self.num_coordinates)
        return self.base[runs.reshape(-1, self.num_coordinates)].reshape(-1, *self.event_shape)

    def head(self, raw: Tensor) -> Tensor:
        """The state of the largest of ``num_states`` logits; passes no gradient, which the probabilities do."""
        return self.states().to(raw.device)[raw.argmax(-1)]

    def embed(self, value: Tensor) -> Tensor:
        """Numbers and unit vectors as they are."""
        value = value if value.is_floating_point() else value.to(torch.get_default_dtype())
        return self.flatten(value)


class Boolean(Discrete):
    """Switches, 0 or 1."""

    def __init__(self, event_shape: torch.Size) -> None:
        n = math.prod(event_shape)
        super().__init__(event_shape, torch.tensor([0.0, 1.0]), n, n)


class OneHot(Discrete):
    """Unit vectors along the last dimension of the event."""

    def __init__(self, event_shape: torch.Size) -> None:
        n, k = math.prod(event_shape[:-1]), event_shape[-1]
        super().__init__(event_shape, torch.eye(k), n, n * max(k - 1, 1))


class Integers(Discrete):
    """Integers from ``low`` to ``high``, as labels: all equally far apart."""

    def __init__(self, event_shape: torch.Size, low: int, high: int, dtype: torch.dtype = torch.long) -> None:
        self.low, self.columns = low, high - low + 1
        n = math.prod(event_shape)
        super().__init__(
            event_shape, torch.arange(low, high + 1, dtype=dtype), n, n * max(self.columns - 1, 1)
        )

    def embed(self, value: Tensor) -> Tensor:
        """One-hot, ``(..., numel * columns)``; what lies beyond the ends counts as the end."""
        index = (self.flatten(value) - self.low).long().clamp(0, self.columns - 1)
        return torch.nn.functional.one_hot(index, self.columns).to(torch.get_default_dtype()).flatten(-2)


class Counts(Integers):
    """Counts without a largest one, cut off where the prior's mass is spent.

    :param fn: the prior, whose probabilities decide
    """

    def __init__(self, event_shape: torch.Size, fn: Any) -> None:
        self.largest = _largest(fn)
        super().__init__(event_shape, 0, self.largest, torch.get_default_dtype())
        self.columns = COUNT_COLUMNS


@torch.no_grad()
def lost_mass(fn: Any, values: Tensor) -> float:
    """Mass that a prior has outside some states of its own, at worst over its batch.

    :param values: ``(s, *event_shape)``

    >>> import pyro.distributions as dist
    >>> round(lost_mass(dist.Poisson(2.0), torch.arange(6.0)), 4)
    0.0166
    """
    states = laid_out(values, len(fn.batch_shape))
    return max(0.0, 1 - float(fn.log_prob(states).logsumexp(0).exp().min()))


def _largest(fn: Any) -> int:
    """The smallest of 3, 7, 15, ... that a coordinate exceeds with probability at most ``LOST_MASS``, or the last column."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    key = _law(fn)
    if key is None:
        return _found_largest(fn)
    if key not in _LARGEST:
        if len(_LARGEST) >= 256:
            _LARGEST.clear()
        _LARGEST[key] = _found_largest(fn)
    return _LARGEST[key]


#: Of laws that were seen before: every run of a program makes its priors anew.
_LARGEST: dict[tuple[Any, ...], int] = {}


def _law(fn: Any) -> tuple[Any, ...] | None:
    """Type and parameters of a distribution of Pyro or torch, in numbers that it holds once; None where they are many.

    Those of a program mostly are a few, which a plate expands.
    """
    kind = type(fn)
    if not kind.__module__.startswith(("pyro.distributions.", "torch.distributions.")):
        return None
    law: list[Any] = [kind, torch.get_default_dtype()]
    for name in fn.arg_constraints:
        parameter = fn.__dict__.get(name)
        if parameter is None and not (
            name in ("probs", "logits") and {"probs", "logits"} & fn.__dict__.keys()
        ):
            return None  # kept in another place, by another name
        if isinstance(parameter, Tensor):
            own = parameter[
                tuple(slice(None, 1) if stride == 0 else slice(None) for stride in parameter.stride())
            ]
            if own.numel() > COUNT_COLUMNS:
                return None
            law.append((name, parameter.dtype, tuple(own.shape), *own.flatten().tolist()))
    return tuple(law) if len(law) > 2 else None


@torch.no_grad()
def _found_largest(fn: Any) -> int:
    largest = 3
    while largest < COUNT_COLUMNS - 1 and lost_mass(fn, torch.arange(largest + 1.0)) > LOST_MASS:
        largest = 2 * largest + 1
    return largest
