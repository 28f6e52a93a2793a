"""The generator of a program: means of its observed sites as one function of the latents of a datum.

The model is replayed with given local latents; sub-samples and globals stay those of one traced run. Row i of its input
holds all local latents of datum i, as they are, and row i of its output the means of all observed sites.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_sinkhorn.diagnostics.lipschitz import UpperBound, local_norms, upper_bound
from pyro_sinkhorn.errors import NonFiniteError, ProgramError
from pyro_sinkhorn.losses.clouds import rows, varying_parameters
from pyro_sinkhorn.losses.prior import fixed_values, prior_trace
from pyro_sinkhorn.runs import run_model
from pyro_sinkhorn.scoring import check_guide, run_guide, run_scored
from pyro_sinkhorn.structure import Plate, Site, Structure, innermost, plates_of, present_of, structure_of


@dataclass(frozen=True)
class Generator:
    """A program at one draw of its globals, with one unit a slice of its outermost data plate.

    scored: a run with the guide's latents
    plate:  whose slices are data
    """

    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    structure: Structure
    scored: Trace
    plate: Plate

    def data(self) -> Tensor:
        """Rows of the observed values."""
        return self._rows({name: _whole(self.scored.nodes[name]) for name in self.structure.data})

    def encoded(self) -> dict[str, Tensor]:
        """The guide's latents, whole."""
        return {name: _whole(self.scored.nodes[name]).detach() for name in self.structure.locals}

    def drawn(self) -> dict[str, Tensor]:
        """Latents of the prior, as many."""
        with torch.no_grad():
            prior = prior_trace(self.model, self.args, self.kwargs, self.structure, self.scored)
        return {name: _whole(prior.nodes[name]) for name in self.structure.locals}

    def laid_out(self, latents: Mapping[str, Tensor]) -> Tensor:
        """Latents as rows ``(n, e)``, every site beside the other."""
        return self._rows(latents)

    def means(self, latents: Mapping[str, Tensor]) -> Tensor:
        """What the observed sites have as their means, ``(n, e)``; differentiable in the latents.

        :raises ProgramError: a site without a mean
        """
        trace = self._run(latents)
        return self._rows({name: _moment(trace.nodes[name], "mean") for name in self.structure.data})

    def noise(self, latents: Mapping[str, Tensor]) -> Tensor | None:
        """Variance around the means, summed over each row, ``(n,)``; None where a site has no finite one."""
        trace = self._run(latents)
        try:
            spread = {name: _moment(trace.nodes[name], "variance") for name in self.structure.data}
        except ProgramError:
            return None
        total = self._rows(spread).sum(-1)
        return total if bool(total.isfinite().all()) else None

    def upper(self) -> UpperBound:
        """Lipschitz constant by operations, valid for all latents."""
        latents = self.encoded()
        with pyro.validation_enabled(False):  # its checks look at values, as a choice by them does
            return upper_bound(lambda: self.means(latents), latents.values())

    def slopes(self, latents: Mapping[str, Tensor]) -> Tensor:
        """Norm of the Jacobian at every row of the latents, ``(n,)``."""

        def over(values: Mapping[str, Tensor], by: Tensor) -> dict[str, Tensor]:
            return {name: value / by.reshape(self._along(name)) for name, value in values.items()}

        def length(values: Mapping[str, Tensor]) -> Tensor:
            return self._rows(values).norm(dim=-1)

        return local_norms(self.means, latents, length, over)

    def check(self) -> None:
        """That this is one function, of each datum's own latents.

        :raises ProgramError: it differs between data, or mixes them, or draws
        """
        own, other = self.encoded(), self.drawn()
        first = {name: self._first_row(name, value) for name, value in own.items()}
        run = self._run(first)
        for group in self.structure.groups:
            if varying_parameters(run, group) is not None:
                raise ProgramError(
                    f"the prior of {group.name!r} differs between data, as with covariates: the bound compares all latents "
                    "with one prior. Ask for it of data that share their covariates"
                )
        means = {name: _moment(run.nodes[name], "mean") for name in self.structure.data}
        for name, value in means.items():
            if not bool(value.isfinite().all()):
                raise _without(run.nodes[name], "mean")
            laid_out = self._rows({name: value})
            if not _close(laid_out, laid_out[:1].expand_as(laid_out)):
                raise ProgramError(
                    f"observed site {name!r}: its mean differs between data that have equal latents, as with covariates: "
                    "the bound needs one generator for all data. Ask for it of data that share their covariates"
                )
        device = next(iter(own.values())).device
        even = torch.arange(self.plate.size, device=device) % 2 == 0
        mixed = {
            name: torch.where(even.reshape(self._along(name)), value, other[name])
            for name, value in own.items()
        }
        before, after = self.means(own), self.means(mixed)
        if not _close(before[even], after[even]):
            raise ProgramError(
                f"observed sites {list(self.structure.data)}: the mean of a datum changed with the latents of others, or from "
                "run to run: the bound needs a generator that takes each datum by itself and draws nothing. Put networks "
                "with BatchNorm or Dropout in eval mode; declare noise by the distribution of the site"
            )

    def _run(self, latents: Mapping[str, Tensor]) -> Trace:
        values = fixed_values(self.structure, self.scored) | dict(latents)
        return run_model(
            self.model, self.args, self.kwargs, values=values, stop_after=self.structure.data, grad=True
        )

    def _rows(self, values: Mapping[str, Tensor]) -> Tensor:
        laid_out = []
        for name, value in values.items():
            batch = value.shape[: value.dim() - len(self.scored.nodes[name]["fn"].event_shape)]
            laid_out.append(rows(value.reshape(*batch, -1), 1, (self.plate,))[0])
        return torch.cat(laid_out, -1) if len(laid_out) > 1 else laid_out[0]

    def _along(self, name: str) -> list[int]:
        """A shape that broadcasts one number a datum with the values of a site."""
        fn = self.scored.nodes[name]["fn"]
        shape = [1] * len(fn.batch_shape + fn.event_shape)
        shape[self.plate.dim - len(fn.event_shape)] = self.plate.size
        return shape

    def _first_row(self, name: str, value: Tensor) -> Tensor:
        axis = self.plate.dim - len(self.scored.nodes[name]["fn"].event_shape)
        return value.narrow(axis, 0, 1).expand_as(value).contiguous()


def generator_of(
    model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Generator:
    """The generator of a model at latents of a guide.

    :raises ProgramError: naming the site that makes it none
    """
    guide_trace = run_guide(guide, args, kwargs)
    scored = run_scored(model, guide_trace, args, kwargs)
    structure = structure_of(scored)
    check_guide(guide_trace, structure, structure.locals)  # nothing is differentiated in the guide
    if not structure.groups:
        raise ProgramError(
            f"the model has no latents in its data plates (its globals are {list(structure.globals)}): there is nothing "
            "that an encoder matches to a prior, and no bound"
        )
    plate = structure.groups[0].plates[0]
    for name in (*structure.locals, *structure.data):
        site = scored.nodes[name]
        if all(other.name != plate.name for other in plates_of(site)):
            raise ProgramError(
                f"site {name!r} is outside of the plate {plate.name!r}, whose slices are the data of "
                f"{structure.groups[0].name!r}: the bound needs latents and observations of each datum in one plate"
            )
        present = present_of(site)
        if present is not None and not bool(present.all()):
            raise ProgramError(
                f"site {name!r} is masked in some places: distances between data of unlike parts bound nothing. Ask for the "
                "bound of data that are complete"
            )
        kind = type(innermost(site["fn"])).__name__
        if name in structure.locals and not site["value"].is_floating_point():
            raise _discrete(name, kind)
        if name in structure.locals and getattr(site["fn"].support, "is_discrete", False):
            raise _discrete(name, kind)
        if not bool(site["value"].isfinite().all()):
            raise NonFiniteError(f"site {name!r} has NaN or infinite values: there is no distance to them")
    found = Generator(model, args, kwargs, structure, scored, plate)
    found.check()
    return found


def _discrete(name: str, kind: str) -> ProgramError:
    return ProgramError(
        f"latent site {name!r} is a {kind}, which is discrete: a generator has no slope in it, and the bound by "
        "Lipschitz constants needs one"
    )


def _whole(site: Site) -> Tensor:
    """A value in the full shape of its site, floating."""
    value = site["value"].expand(site["fn"].batch_shape + site["fn"].event_shape)
    return value if value.is_floating_point() else value.to(torch.get_default_dtype())


def _moment(site: Site, which: str) -> Tensor:
    fn = site["fn"]
    try:
        value: Tensor = getattr(fn, which)
    except (NotImplementedError, AttributeError):
        raise _without(site, which) from None
    return value.expand(fn.batch_shape + fn.event_shape)


def _without(site: Site, which: str) -> ProgramError:
    kind = type(innermost(site["fn"])).__name__
    return ProgramError(
        f"observed site {site['name']!r} is a {kind} without a finite {which}: the generator of the bound is the mean of the "
        "data given the latents. Leave out bound=True, or observe a distribution that has one"
    )


def _close(a: Tensor, b: Tensor) -> bool:
    scale = float(a.abs().max().clamp_min(1e-30))
    return float((a - b).abs().max()) <= 1e3 * torch.finfo(a.dtype).eps * scale
