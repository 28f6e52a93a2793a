"""Whether data sets may lie side by side in one more plate of a model, or would be mixed up there.

Models written with Pyro's broadcasting may run inside one more plate; others would quietly mix data sets up. Three runs tell:

1. In a plate of size 1, with the random numbers of a plain run, every latent and every datum must be what it is there. A loop
   over ``range(len(x))``, ``z[0]`` or a sum over dimension 0 is found out.
2. In a plate of size 2, whatever the latents of one data set are, the laws of the other must stay as they are. With a single
   datum ``z.cumsum(0)`` looks right in a plate of size 1 and adds data sets up in a larger one.
3. With equal latents in both, noise that the model draws by itself (``torch.randn(len(x))``) must differ between them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyro
import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_sinkhorn.guide.shown import DATA_SETS
from pyro_sinkhorn.runs import run_model
from pyro_sinkhorn.structure import Plate, Site, Structure, is_data, is_latent, parameters_of, sample_sites

#: Name of the plate that draws of a guide lie in.
DRAWS_OF_GUIDE = "posterior_draws"
#: Rows that a guide makes at once, at most.
ROWS_AT_ONCE = 200_000


def draws_in_plate(structure: Structure) -> bool:
    """Whether an automatic guide can draw in a plate whatever its model: a guide of one block runs that for plates alone."""
    return not structure.globals and len(structure.groups) == 1


def in_plate(model: Callable[..., Any], plate: Plate) -> Callable[..., Any]:
    """The model, run in one more plate."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with pyro.plate(plate.name, plate.size, dim=plate.dim):
            return model(*args, **kwargs)

    return run


def packed(site: Site, num: int, nesting: int) -> Tensor:
    """A value as ``(num, *batch, *event)`` with ``nesting`` batch dimensions."""
    return padded(site["value"], len(site["fn"].event_shape), num, nesting)


def padded(value: Tensor, event_dim: int, num: int, nesting: int) -> Tensor:
    """``(..., *event)`` as ``(num, *batch, *event)`` with ``nesting`` batch dimensions."""
    batch, event = value.shape[: value.dim() - event_dim], value.shape[value.dim() - event_dim :]
    if len(batch) > nesting + 1:
        batch = batch[len(batch) - nesting - 1 :]
        value = value.reshape(*batch, *event)
    value = value.reshape(*[1] * (nesting + 1 - len(batch)), *batch, *event)
    return value.expand(num, *value.shape[1:])


@torch.no_grad()
def vectorises(
    model: Callable[..., Any], args: Any, kwargs: Any, indices: Mapping[str, Tensor], nesting: int
) -> bool:
    """Whether data sets may lie in a plate around the model; the random state is left as it was.

    :param indices: sub-samples, common to all runs
    """
    before = _RandomState()
    plain = run_model(model, args, kwargs, values=dict(indices))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            before.restore()
            inside = run_model(in_plate(model, _plate(1, nesting)), args, kwargs, values=dict(indices))
            return _equal(plain, inside, nesting) and _apart(model, args, kwargs, indices, plain, nesting)
    except Exception:  # whatever a model does with a dimension that it did not expect
        return False
    finally:
        before.restore()


def _plate(size: int, nesting: int) -> Plate:
    return Plate(DATA_SETS, -(nesting + 1), size, size)


def _sites(trace: Trace) -> Iterator[tuple[str, Site]]:
    """Sites whose values count; those of ``pyro.deterministic`` take the new dimension into their event."""
    return ((name, site) for name, site in sample_sites(trace) if is_latent(site) or is_data(site))


def _equal(plain: Trace, inside: Trace, nesting: int) -> bool:
    for name, site in _sites(plain):
        if name not in inside.nodes:
            return False
        value, event_dim = inside.nodes[name]["value"], len(site["fn"].event_shape)
        if value.dim() - event_dim > nesting + 1:
            return False  # a dimension too many, which would be lost below
        one, other = packed(site, 1, nesting), packed(inside.nodes[name], 1, nesting)
        if one.shape != other.shape or not _close(one, other):
            return False
    return True


def _apart(
    model: Callable[..., Any],
    args: Any,
    kwargs: Any,
    indices: Mapping[str, Tensor],
    plain: Trace,
    nesting: int,
) -> bool:
    """Whether two data sets in a plate neither see each other's latents nor share noise."""
    plate = _plate(2, nesting)
    model_of_two = in_plate(model, plate)
    free = [
        name for name, site in sample_sites(plain) if is_latent(site) and "was_observed" not in site["infer"]
    ]
    drawn = [run_model(model_of_two, args, kwargs, values=dict(indices)) for _ in range(2)]
    state = _RandomState()

    def laws(first: int, second: int) -> list[_Laws]:
        """Of both data sets, with the first latents of these draws."""
        chosen = [drawn[first], drawn[second]]
        values = {
            name: torch.cat([packed(run.nodes[name], 2, nesting)[:1] for run in chosen]) for name in free
        }
        trace = run_model(model_of_two, args, kwargs, values={**indices, **values})
        return [_laws(trace, plate, i) for i in range(2)]

    one, two = laws(0, 0)
    for kept, others in ((0, (0, 1)), (1, (1, 0))):
        state.restore()
        if not _same((one, two)[kept], laws(*others)[kept]):
            return False
    # Equal laws in both: then the model draws nothing by itself, or shares what it draws.
    state.advance()
    return not _same(one, two) or _same(one, laws(0, 0)[0])


_Laws = dict[str, list[Tensor]]


def _laws(trace: Trace, plate: Plate, i: int) -> _Laws:
    """Parameters of all sites of one data set in a plate; of an Implicit or Delta these are its value."""
    found: _Laws = {}
    for name, site in _sites(trace):
        found[name] = []
        for value, event_dim in parameters_of(site["fn"]):
            axis = value.dim() - event_dim + plate.dim
            own = value.select(axis, min(i, value.shape[axis] - 1)) if axis >= 0 else value
            found[name].append(own)
    return found


def _same(one: _Laws, other: _Laws) -> bool:
    return all(
        a.shape == b.shape and _close(a, b)
        for name, values in one.items()
        for a, b in zip(values, other[name], strict=True)
    )


def _close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one.double(), other.double(), rtol=1e-4, atol=1e-6, equal_nan=True)


class _RandomState:
    """The global random state of now, that of the current CUDA device too."""

    def __init__(self) -> None:
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)

    def advance(self) -> None:
        """Other random numbers than those from here."""
        self.restore()
        torch.rand(1)
        if torch.cuda.is_initialized():
            torch.rand(1, device="cuda")
