"""A distribution over finitely many values, whatever they are."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

from pyro_sinkhorn.distributions.implicit import fit_support


class Finite(TorchDistribution):
    r"""Finitely many values with probabilities: :math:`P(X = v_s) = \mathrm{softmax}(\ell)_s`.

    For guides of discrete latents that no distribution of Pyro can enumerate: vectors of switches, whose :math:`2^d`
    joint states get a probability each, or counts cut off at a largest one. Values need not be numbers in a row, and
    the probabilities of a vector's states need not factorise.

    Args:
        values: the states, ``(S, *event_shape)``, no two alike; shared by the batch.
        logits: ``(*batch_shape, S)``, unnormalised log probabilities.
        support: the constraint that all values satisfy. Default: real.
        validate_args: as everywhere in Pyro.

    ``enumerate_support`` gives all values, so ``infer={"enumerate": "parallel"}`` works as for any discrete
    distribution. There is no ``rsample``. ``log_prob`` of something that is none of the values is minus infinity.

    Raises:
        ValueError: no values; two alike; or another number of logits than of values; by ``sample``, NaN logits.

    >>> switches = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 2)
    >>> d = Finite(switches, torch.zeros(5, 4))
    >>> d.batch_shape, d.event_shape, d.enumerate_support(expand=False).shape
    (torch.Size([5]), torch.Size([2]), torch.Size([4, 1, 2]))
    >>> [round(p, 4) for p in d.log_prob(torch.tensor([0.0, 1.0])).exp().tolist()]
    [0.25, 0.25, 0.25, 0.25, 0.25]
    """

    arg_constraints = {"logits": constraints.real_vector}
    has_enumerate_support = True

    def __init__(
        self, values: Tensor, logits: Tensor, support: Any = None, validate_args: bool | None = None
    ) -> None:
        if values.dim() < 1 or len(values) == 0:
            raise ValueError(
                f"Finite: values has shape {tuple(values.shape)}: expected (S, *event_shape), at least one"
            )
        if logits.dim() < 1 or logits.shape[-1] != len(values):
            raise ValueError(
                f"Finite: {len(values)} values, but logits of shape {tuple(logits.shape)}: expected "
                f"(*batch_shape, {len(values)})"
            )
        if validate_args is not False and len(values.unique(dim=0)) < len(values):
            raise ValueError(
                f"Finite: {len(values) - len(values.unique(dim=0))} of {len(values)} values are repeated"
            )
        self.values = values
        self.logits = logits - logits.logsumexp(-1, keepdim=True)
        self._support = fit_support(support, values.dim() - 1, "Finite")
        super().__init__(logits.shape[:-1], values.shape[1:], validate_args=validate_args)

    @constraints.dependent_property
    def support(self) -> Any:
        return self._support

    @property
    def probs(self) -> Tensor:
        """``(*batch_shape, S)``."""
        return self.logits.exp()

    def expand(self, batch_shape: Any, _instance: Any = None) -> Finite:
        new = self._get_checked_instance(Finite, _instance)
        batch_shape = torch.Size(batch_shape)
        new.values, new._support = self.values, self._support
        new.logits = self.logits.expand(*batch_shape, self.logits.shape[-1])
        super(Finite, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def sample(self, sample_shape: Any = ()) -> Tensor:
        if bool(self.logits.isnan().any()):
            # In the words of torch's own check, which validate_args=False leaves out.
            raise ValueError(
                f"Expected parameter logits (Tensor of shape {tuple(self.logits.shape)}) of distribution Finite to satisfy the "
                "constraint Real(), but found invalid values: nan"
            )
        with torch.no_grad():
            index = torch.distributions.Categorical(logits=self.logits, validate_args=False).sample(
                torch.Size(sample_shape)
            )
            return self.values[index]

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        n_event = len(self.event_shape)
        same = value.unsqueeze(value.dim() - n_event) == self.values
        if n_event:
            same = same.flatten(-n_event).all(-1)
        shape = torch.broadcast_shapes(same.shape, self.logits.shape)
        logits = self.logits.expand(shape)
        picked = logits.gather(-1, same.expand(shape).to(torch.uint8).argmax(-1, keepdim=True)).squeeze(-1)
        return picked.masked_fill(~same.any(-1), -torch.inf)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        values = laid_out(self.values, len(self.batch_shape))
        return values.expand(-1, *self.batch_shape, *self.event_shape) if expand else values


def laid_out(values: Tensor, batch_dim: int) -> Tensor:
    """States ``(S, *event_shape)`` with room for a batch: ``(S, 1, ..., 1, *event_shape)``."""
    return values.reshape(len(values), *(1,) * batch_dim, *values.shape[1:])
