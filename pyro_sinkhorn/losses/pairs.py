"""Simulated pairs of latents and data: whole data sets drawn from a program, many at once.

Many data sets at once means one run of the model inside one more plate. Models written with Pyro's broadcasting allow it;
others would quietly mix data sets up. The first call finds out (:mod:`pyro_sinkhorn.losses.side_by_side`); where a model does
not allow it, data sets are simulated one by one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_sinkhorn.errors import NonFiniteError, ProgramError
from pyro_sinkhorn.explain import bad_rows
from pyro_sinkhorn.geometry.registry import geometry_of
from pyro_sinkhorn.guide.shown import DATA_SETS, Moments
from pyro_sinkhorn.guide.start import moments
from pyro_sinkhorn.losses.side_by_side import in_plate, packed, padded, vectorises
from pyro_sinkhorn.rng import undisturbed
from pyro_sinkhorn.runs import Resample, run_model, subsamples
from pyro_sinkhorn.structure import (
    Plate,
    Structure,
    check_shapes,
    innermost,
    nesting_of,
    sample_sites,
    structure_of,
)


@dataclass(frozen=True)
class Pairs:
    """Simulated data sets with their latents; all values are ``(P, *batch, *event)`` with equally many batch dimensions.

    values:   of latents and observed sites
    event_dims: of these
    moments:  mean and standard deviation of priors on the line given their parents, ``(P, *batch, numel)``
    indices:  sub-samples, common to all
    weights:  where they were not drawn from the prior: of the data sets, ``(P,)``, or of their outermost rows, ``(P, n)``
    """

    values: Mapping[str, Tensor]
    event_dims: Mapping[str, int]
    moments: Mapping[str, Moments]
    indices: Mapping[str, Tensor]
    nesting: int
    weights: Tensor | None = None

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))

    @property
    def plate(self) -> Plate:
        """The plate of the data sets."""
        return Plate(DATA_SETS, -(self.nesting + 1), len(self), len(self))

    def pick(self, index: Tensor) -> Pairs:
        """Some of the data sets."""
        return dataclasses.replace(
            self,
            values={name: value[index] for name, value in self.values.items()},
            moments={name: (loc[index], scale[index]) for name, (loc, scale) in self.moments.items()},
            weights=None if self.weights is None else self.weights[index],
        )

    def rows(self, plate: Plate, index: Tensor, names: Iterable[str]) -> Pairs:
        """Some slices of a plate, for the sites in it."""

        def picked(value: Tensor) -> Tensor:
            axis = 1 + self.nesting + plate.dim
            return value if value.shape[axis] == 1 else value.index_select(axis, index.to(value.device))

        values, moments = dict(self.values), dict(self.moments)
        for name in names:
            values[name] = picked(values[name])
            if name in moments:
                moments[name] = (picked(moments[name][0]), picked(moments[name][1]))
        indices = {name: value for name, value in self.indices.items() if name != plate.name}
        return dataclasses.replace(self, values=values, moments=moments, indices=indices)


@dataclass
class Simulator:
    """How pairs of one program are made; knows, from its first call on, whether data sets can lie in a plate.

    vectorize:  True, False, or None to find out
    """

    vectorize: bool | None = None

    def look(
        self, model: Callable[..., Any], args: Any, kwargs: Any, values: Mapping[str, Tensor] = {}
    ) -> tuple[Trace, Structure, int]:
        """One plain run of the model on its data: the trace, its structure, and how deep its plates are nested."""
        trace = run_model(model, args, kwargs, values=dict(values))
        structure = structure_of(trace)
        check_shapes(trace, structure)
        _check_laws(trace, structure)
        return trace, structure, nesting_of(trace)

    @torch.no_grad()
    def __call__(
        self,
        model: Callable[..., Any],
        args: Any,
        kwargs: Any,
        num: int,
        given: Mapping[str, Tensor] | None = None,
        indices: Mapping[str, Tensor] | None = None,
        stop_after: tuple[str, ...] = (),
    ) -> Pairs:
        """Simulate ``num`` data sets of the shape of the data in the arguments.

        :param given: values of latents, ``(num, *batch, *event)``; all others are drawn
        :param indices: of sub-samples; by default drawn
        :param stop_after: latents after which the runs may stop, where no data are wanted
        :raises NonFiniteError: simulated values are NaN or infinite
        """
        seen, structure, nesting = self.look(model, args, kwargs, indices or {})
        shared = subsamples(seen)
        free = Resample()(model)
        if self.vectorize is None:
            self.vectorize = vectorises(free, args, kwargs, shared, nesting)
        plate = Plate(DATA_SETS, -(nesting + 1), num, num)
        fixed = dict(given or {})
        if self.vectorize:
            trace = run_model(
                in_plate(free, plate), args, kwargs, values=fixed | shared, stop_after=stop_after
            )
            nodes = {name: packed(site, num, nesting) for name, site in sample_sites(trace)}
            found = _moments(trace, structure, num, nesting)
        else:
            each = []
            for i in range(num):
                own = {
                    name: value[i].reshape(seen.nodes[name]["value"].shape) for name, value in fixed.items()
                }
                each.append(run_model(free, args, kwargs, values=own | shared, stop_after=stop_after))
            names = [name for name, _ in sample_sites(each[0])]
            nodes = {name: torch.cat([packed(one.nodes[name], 1, nesting) for one in each]) for name in names}
            apart = [_moments(one, structure, 1, nesting) for one in each]
            common = set.intersection(*(set(one) for one in apart)) if apart else set()
            found = {
                name: (torch.cat([one[name][0] for one in apart]), torch.cat([one[name][1] for one in apart]))
                for name in common
            }
        wanted = [name for name in (*structure.latents, *structure.data) if name in nodes]
        event_dims = {name: len(seen.nodes[name]["fn"].event_shape) for name in wanted}
        for name in wanted:
            _check_finite(name, nodes[name])
        return Pairs({name: nodes[name] for name in wanted}, event_dims, found, shared, nesting)


def _moments(trace: Trace, structure: Structure, num: int, nesting: int) -> dict[str, Moments]:
    found = {}
    for name in structure.latents:
        if name not in trace.nodes:
            continue
        fn = trace.nodes[name]["fn"]
        pair = moments(fn, geometry_of(fn, name), detach_scale=True)
        if pair is not None:
            found[name] = (padded(pair[0], 1, num, nesting), padded(pair[1], 1, num, nesting))
    return found


def _check_laws(trace: Trace, structure: Structure) -> None:
    """Every latent needs a prior that can be drawn from."""
    for name in structure.latents:
        if isinstance(innermost(trace.nodes[name]["fn"]), dist.ImproperUniform):
            raise ProgramError(
                f"latent site {name!r}: its ImproperUniform is no law that could be drawn from, so no data can be simulated: "
                "give it a proper prior"
            )


def _check_finite(name: str, value: Tensor) -> None:
    if value.is_floating_point() and not bool(value.isfinite().all()):
        raise NonFiniteError(
            f"site {name!r}: {bad_rows(value)} of the simulated values (shape {tuple(value.shape)}, data sets first). A "
            "guide cannot learn from what is no number: have the simulator return numbers, or give the latents "
            "priors from which it can"
        )


def picked(args: Any, kwargs: Any, n: int, index: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Some rows of all arguments that have ``n``."""

    def sliced(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() and len(value) == n:
            return value[index.to(value.device)]
        return value

    return tuple(sliced(value) for value in args), {name: sliced(value) for name, value in kwargs.items()}


@torch.no_grad()
def follows_rows(model: Callable[..., Any], args: Any, kwargs: Any, n: int) -> bool:
    """Whether rows of the arguments, ``n`` of them, are slices of a data plate, which is as long as they are."""
    sizes = []
    try:
        for number in (n, n + 1):
            with undisturbed():
                trace = run_model(model, *picked(args, kwargs, n, torch.arange(number) % n))
            plates = structure_of(trace).data_plates
            sizes.append({plate.name: plate.size for plate in plates if plate.size == plate.full_size})
    except Exception:  # whatever a model does that knows how many data it has
        return False
    return any(size == n and sizes[1].get(name) == n + 1 for name, size in sizes[0].items())


def substituted(
    paths: Mapping[str, Any], pairs: Pairs, i: int, args: Any, kwargs: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with the observed values replaced by those of data set ``i``.

    :param paths: where each observed site's values are among the arguments
    :raises ProgramError: for a site they are not, so that a guide that reads arguments could not be shown others
    """
    args, kwargs = list(args), dict(kwargs)
    for name, path in paths.items():
        if path is None or len(path) != 1:
            raise ProgramError(
                f"observed site {name!r}: its values are no argument of the model, so simulated ones cannot be shown to a "
                "guide that reads the arguments. Pass the data as an argument of model and guide and write obs=argument, "
                "or take AutoPosterior without encoder_input, which reads the observed sites themselves"
            )
        key = path[0]
        held = args[key] if isinstance(key, int) else kwargs[key]
        value = pairs.values[name][i]
        if value.numel() != held.numel():
            raise ProgramError(
                f"observed site {name!r}: the model observes {value.numel()} of the {held.numel()} numbers of its argument, "
                "a sub-sample: pass minibatches instead, or take AutoPosterior, which reads the sub-sample"
            )
        value = value.reshape(held.shape).to(held.dtype)
        if isinstance(key, int):
            args[key] = value
        else:
            kwargs[key] = value
    return tuple(args), kwargs
