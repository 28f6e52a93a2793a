r"""A ground cost that learns to tell simulated data from observed ones.

.. math:: c_\varphi(x, y) = \|f_\varphi(x) - f_\varphi(y)\|^p

with a network :math:`f_\varphi` that *ascends* the divergence which the program descends (Genevay, Peyré, Cuturi 2017,
section 3.3; the steps, the clipping and RMSProp are those of Arjovsky et al. 2017). Distances between pixels say little
about images; distances between learned features do.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pyro_sinkhorn.errors import NonFiniteError, ProgramError, checked_integer

Constraint = Literal["spectral", "clip"] | None
MakeOptimiser = Callable[[Iterable[Tensor]], torch.optim.Optimizer]
#: Power iterations after each step. The vectors are kept, so that a few follow weights that move slowly.
_POWER_ITERATIONS = 2


def _rmsprop(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(parameters, lr=5e-4)


class LearnedCost:
    r"""A cost :math:`\|f(x)-f(y)\|^p` with a network that is trained against the program.

    Give it to :class:`~pyro_sinkhorn.Trace_DataSinkhorn`. In :meth:`SinkhornProgram.fit` every step of the program is
    preceded by ``num_steps`` steps of the cost, each on a minibatch of its own. In a loop of one's own these are two
    calls::

        loss = Trace_DataSinkhorn(cost=LearnedCost(network))
        svi = SVI(model, lambda x: None, optim, loss=loss)
        for x in batches:
            loss.cost_step(model, lambda x: None, x)    # n_c times
            svi.step(x)

    Without a bound the network could make any difference as large as it likes: after every step its weights are
    brought back to where it cannot.

    :param network: maps rows ``(..., d)`` to features ``(..., e)``. It sees the columns of all observed sites of a
        group, in their unit (``scale=`` of the loss), then those of the covariates. A program trains a copy of its own
    :param num_steps: ascent steps for every step of the program, :math:`n_c`; 5 as in the papers. With 0 the network
        stays as it is
    :param constraint: ``"spectral"``: weight matrices (kernels reshaped to matrices) with a spectral norm above
        ``bound`` are divided down to it, so that, up to the activations, features are Lipschitz. ``"clip"``: every
        parameter is clipped to ``[-bound, bound]``, as in the paper. None: nothing is done
    :param bound: default 1 for ``"spectral"`` and 0.01 for ``"clip"``
    :param power: 1 (default, the paper's norm) or 2. With 1 the limit of large epsilon is the energy distance between
        features, which still tells any two laws apart; with 2 it compares means
    :param optim: makes the optimiser of the network's parameters; default RMSprop with learning rate 5e-4. Momentum
        makes the two players circle each other
    :raises ProgramError: the network is no module or has nothing to learn

    >>> cost = LearnedCost(nn.Linear(2, 8))
    >>> cost(torch.zeros(3, 2), torch.ones(4, 2)).shape
    torch.Size([3, 4])
    """

    def __init__(
        self,
        network: nn.Module,
        num_steps: int = 5,
        constraint: Constraint = "spectral",
        bound: float | None = None,
        power: int = 1,
        optim: MakeOptimiser = _rmsprop,
    ) -> None:
        if not isinstance(network, nn.Module):
            raise ProgramError(
                f"the network of a LearnedCost is a {type(network).__name__}: expected an nn.Module"
            )
        if not any(parameter.requires_grad for parameter in network.parameters()):
            raise ProgramError("the network of a LearnedCost has no parameters that require a gradient")
        if any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in network.modules()):
            raise ProgramError(
                "the network of a LearnedCost has BatchNorm: it would bring both clouds to one location and scale before they "
                "are compared. Use LayerNorm or GroupNorm"
            )
        if constraint not in ("spectral", "clip", None):
            raise ProgramError(f"constraint is {constraint!r}: expected 'spectral', 'clip' or None")
        if power not in (1, 2):
            raise ProgramError(f"power is {power}: expected 1 or 2")
        if bound is not None and not (bound > 0 and math.isfinite(bound)):
            raise ProgramError(f"bound is {bound}: expected a positive number")
        self.network = network
        self.num_steps = checked_integer("num_steps", num_steps, 0)
        self.constraint: Constraint = constraint
        self.bound = {"spectral": 1.0, "clip": 0.01, None: math.inf}[constraint] if bound is None else bound
        self.power = power
        if not callable(optim):
            raise ProgramError(
                f"optim is a {type(optim).__name__}: expected a function of parameters that makes an optimiser, such as "
                "functools.partial(torch.optim.Adam, lr=1e-3)"
            )
        self.make_optim = optim
        self.optim = optim([p for p in network.parameters() if p.requires_grad])
        self._vectors: dict[str, Tensor] = {}

    @property
    def ground(self) -> str:
        """Name of the cost between features."""
        return "euclidean" if self.power == 1 else "sqeuclidean"

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Cost matrix ``(n, m)`` of two clouds, as every cost of :mod:`pyro_sinkhorn.ot`."""
        distances = torch.cdist(
            self.features(x), self.features(y), compute_mode="donot_use_mm_for_euclid_dist"
        )
        return distances if self.power == 1 else distances.square()

    def features(self, points: Tensor) -> Tensor:
        """Features ``(..., e)`` of points ``(..., d)``.

        :raises ProgramError: the network does not take or return such rows
        """
        # Rows of all particles in one batch: a network written for (n, d) need not know of more dimensions.
        rows = points.reshape(-1, points.shape[-1])
        try:
            features = self.network(rows)
        except RuntimeError as error:
            if not any(
                word in str(error) for word in ("shapes", "size of tensor", "Expected", "expected input")
            ):
                raise
            raise ProgramError(
                f"the network of the cost does not take rows of shape {tuple(rows.shape)}, the columns of the observed "
                f"sites and their covariates: {str(error).splitlines()[0]}"
            ) from error
        if not isinstance(features, Tensor):
            raise ProgramError(
                f"the network of the cost returned a {type(features).__name__}: expected a tensor of features"
            )
        if features.dim() != 2 or len(features) != len(rows):
            raise ProgramError(
                f"the network of the cost was given rows of shape {tuple(rows.shape)} and returned "
                f"{tuple(features.shape)}: expected ({len(rows)}, number of features)"
            )
        return features.reshape(*points.shape[:-1], features.shape[-1])

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """No gradients for the network inside: it takes no part in the program's own step."""
        learning = [p for p in self.network.parameters() if p.requires_grad]
        for parameter in learning:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in learning:
                parameter.requires_grad_(True)

    def ascend(self, value: Tensor) -> None:
        """One step of the network up the value, and back inside its bound.

        :raises NonFiniteError: the value or its gradient is NaN or infinite; the network stays as it was
        """
        if not bool(value.isfinite()):
            raise NonFiniteError(f"the divergence that the cost ascends is {float(value.detach())}")
        self.optim.zero_grad()
        (-value).backward()
        for name, parameter in self.network.named_parameters():
            if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
                self.optim.zero_grad()
                raise NonFiniteError(
                    f"the gradient of {name!r} of the cost's network is NaN or infinite though the divergence is "
                    "finite; the network was not updated"
                )
        self.optim.step()
        self.optim.zero_grad()
        self._constrain()

    def fresh(self) -> LearnedCost:
        """A copy with the weights as they are now and an optimiser that has made no step."""
        return LearnedCost(
            copy.deepcopy(self.network),
            self.num_steps,
            self.constraint,
            None if self.constraint is None else self.bound,
            self.power,
            self.make_optim,
        )

    def state(self) -> dict[str, Any]:
        """Weights, optimiser and the vectors of the power iteration."""
        return {
            "network": dict(self.network.state_dict()),
            "optim": self.optim.state_dict(),
            "vectors": self._vectors,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state`."""
        self.network.load_state_dict(state["network"])
        # load_state_dict keeps the tensors that it is given.
        self.optim.load_state_dict(copy.deepcopy(state["optim"]))
        self._vectors = {name: vector.clone() for name, vector in state["vectors"].items()}

    def to(self, device: torch.device) -> None:
        """Move network, optimiser and vectors."""
        self.network.to(device)
        self.optim.load_state_dict(
            self.optim.state_dict()
        )  # which brings its tensors to the parameters' device
        self._vectors = {name: vector.to(device) for name, vector in self._vectors.items()}

    @torch.no_grad()
    def _constrain(self) -> None:
        for name, parameter in self.network.named_parameters():
            if not parameter.requires_grad:
                continue
            if self.constraint == "clip":
                parameter.clamp_(-self.bound, self.bound)
            elif self.constraint == "spectral" and parameter.dim() > 1:
                norm = self._spectral_norm(name, parameter.flatten(1))
                parameter.mul_((self.bound / norm).clamp(max=1.0))

    def _spectral_norm(self, name: str, matrix: Tensor) -> Tensor:
        """By power iteration from the vector of the last call; the first call decomposes the matrix."""
        if name not in self._vectors:
            self._vectors[name] = torch.linalg.svd(matrix, full_matrices=False)[0][:, 0].contiguous()
        u = self._vectors[name].to(matrix)
        for _ in range(_POWER_ITERATIONS):
            v = nn.functional.normalize(matrix.mT @ u, dim=0)
            u = nn.functional.normalize(matrix @ v, dim=0)
        self._vectors[name] = u
        return (u @ matrix @ v).abs()

    def __repr__(self) -> str:
        return (
            f"LearnedCost({type(self.network).__name__}, num_steps={self.num_steps}, constraint={self.constraint!r}, "
            f"power={self.power})"
        )
