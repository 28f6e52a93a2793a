"""A distribution known by its draw alone."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

from pyro_sinkhorn.errors import NoDensityError


class Implicit(TorchDistribution):
    r"""The law of a tensor somebody has drawn: it can be sampled, but has no density.

    Wraps the output of a network or simulator so that it can stand in a ``pyro.sample`` statement::

        z = pyro.sample("z", Implicit(encoder(x, noise), event_dim=1))        # a guide without density
        pyro.sample("x", Implicit(simulator(z), event_dim=1), obs=x)          # a simulator without likelihood

    Losses that compare clouds of samples need no more. Losses that score (``Trace_ELBO`` and the like) do,
    and get an explanation instead of a number. ``pyro.distributions.Delta`` would hand them a density: an
    ELBO would then silently do MAP estimation.

    **The draw is the value itself.** ``sample`` and ``rsample`` return it, repeated along ``sample_shape``
    and along expanded dimensions. Repetitions are *copies*: for independent draws make the noise that
    feeds the value independent, for instance by ``pyro.sample`` inside the same plates.

    Args:
        value: the draw, shape ``batch_shape + event_shape``.
        event_dim: how many of its last dimensions form one event. Default 0, as in ``Delta``.
        support: the constraint every draw satisfies. Default: real. Give it where it is known: the loss
            chooses its ground cost by it. Where it has fewer event dimensions than ``event_dim``, the rest
            are added as independent ones. The value is not checked against it, since a simulator's last
            digits may not pass.
        validate_args: whether values given later are checked against the support; default as everywhere in
            Pyro.

    Gradients flow through ``rsample``, which is what ``pyro.sample`` calls, into whatever made the value;
    that is what ``has_rsample`` promises here. ``sample`` detaches, as everywhere in torch.

    Raises:
        TypeError: value is not a tensor, event_dim is not an int, support is not a constraint.
        ValueError: event_dim is negative or exceeds the value's dimensions; the support needs more event
            dimensions than event_dim, or depends on parameters.
        NoDensityError: by ``log_prob``; it is a ``NotImplementedError`` and a ``ValueError``.

    Source: Huszár 2017, *Variational inference using implicit distributions*, for the word and the idea.

    >>> draws = torch.randn(5, 3, requires_grad=True)
    >>> d = Implicit(draws, event_dim=1)
    >>> d.batch_shape, d.event_shape, d.rsample() is draws
    (torch.Size([5]), torch.Size([3]), True)
    >>> d.log_prob(draws)  # doctest: +IGNORE_EXCEPTION_DETAIL
    Traceback (most recent call last):
    pyro_sinkhorn.errors.NoDensityError: Implicit has no density ...
    """

    has_rsample = True
    arg_constraints = {"value": constraints.dependent}

    def __init__(
        self,
        value: Tensor,
        event_dim: int = 0,
        support: Any = None,
        validate_args: bool | None = None,
    ) -> None:
        if not isinstance(value, Tensor):
            raise TypeError(f"Implicit: value must be a torch.Tensor, but got {type(value).__name__}")
        if not isinstance(event_dim, int) or isinstance(event_dim, bool):
            raise TypeError(f"Implicit: event_dim must be an int, but got {event_dim!r}")
        if not 0 <= event_dim <= value.dim():
            raise ValueError(
                f"Implicit: event_dim must lie between 0 and {value.dim()}, the number of dimensions of the "
                f"value (shape {tuple(value.shape)}), but got {event_dim}"
            )
        self.value = value
        self._support = fit_support(support, event_dim, "Implicit")
        batch_dim = value.dim() - event_dim
        super().__init__(value.shape[:batch_dim], value.shape[batch_dim:], validate_args=validate_args)

    @constraints.dependent_property
    def support(self) -> Any:
        return self._support

    def expand(self, batch_shape: Any, _instance: Any = None) -> Implicit:
        new = self._get_checked_instance(Implicit, _instance)
        batch_shape = torch.Size(batch_shape)
        new.value = self.value.expand(batch_shape + self.event_shape)
        new._support = self._support
        super(Implicit, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        sample_shape = torch.Size(sample_shape)
        return self.value.expand(sample_shape + self.value.shape) if sample_shape else self.value

    def sample(self, sample_shape: Any = ()) -> Tensor:
        # The inherited method switches gradients off while drawing; this value was drawn before.
        return self.rsample(sample_shape).detach()

    def log_prob(self, value: Tensor) -> NoReturn:
        raise NoDensityError(
            "Implicit has no density, so its log_prob cannot be computed (batch_shape "
            f"{tuple(self.batch_shape)}, event_shape {tuple(self.event_shape)}). Implicit wraps the output "
            "of a network or simulator that can only be sampled. pyro.infer.Trace_ELBO, and whatever else "
            "scores a trace, needs a density at each site. Either compare samples instead, with "
            "loss=pyro_sinkhorn.Trace_Sinkhorn() for a latent and Trace_DataSinkhorn() for an observed site, or give this "
            "site a distribution that has a density"
        )

    @property
    def mean(self) -> Tensor:
        """The value: the best guess from a single draw, and unbiased for the mean of the law behind it."""
        return self.value


def fit_support(support: Any, event_dim: int, owner: str) -> Any:
    """The constraint of a draw: real if none is given, with independent dimensions added where it has too few.

    :param owner: the distribution's name, for errors
    """
    if support is None:
        support = constraints.real
    if not isinstance(support, torch.distributions.constraints.Constraint):
        raise TypeError(
            f"{owner}: support must be a constraint such as pyro.distributions.constraints.simplex, "
            f"got {support!r}"
        )
    if constraints.is_dependent(support):
        raise ValueError(
            f"{owner}: the support {support!r} depends on parameters that {owner} does not have; pass a "
            "complete one, for instance the support of a distribution instead of that of its class"
        )
    missing = event_dim - support.event_dim
    if missing < 0:
        raise ValueError(
            f"{owner}: the support {support!r} describes events of {support.event_dim} dimensions, "
            f"but event_dim is {event_dim}; pass event_dim={support.event_dim} or more"
        )
    return constraints.independent(support, missing) if missing else support
