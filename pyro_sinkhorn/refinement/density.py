"""The density of a program at the latents of many chains at once, in coordinates without constraints.

A latent z with support C is written z = T(u) with T the bijection from R^k that torch registers for C. Its density in u is
p(T(u)) |det dT/du|. T is looked up while the model runs, since a support may depend on other latents (``Uniform(0, z)``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.transforms import Transform

from pyro_sinkhorn.errors import ProgramError
from pyro_sinkhorn.reachable import find_modules
from pyro_sinkhorn.recovery import explained_dtypes
from pyro_sinkhorn.refinement.checks import check_draws, check_plates, check_site, fits
from pyro_sinkhorn.runs import run_model
from pyro_sinkhorn.scoring import log_density, renormalised
from pyro_sinkhorn.structure import Site, innermost, plates_of, present_of, sample_sites

CHAIN_PLATE = "_refinement_chains"
Values = dict[str, Tensor]


class NotInSupport(ProgramError):
    """Draws that the prior cannot have produced."""


class Wrapped(Transform):
    """Angles from numbers: a chain on the line whose density has period 2π is a chain on the circle."""

    domain = dist.constraints.real
    codomain = dist.constraints.real
    bijective = False

    def _call(self, x: Tensor) -> Tensor:
        return torch.remainder(x + math.pi, 2 * math.pi) - math.pi

    def _inverse(self, y: Tensor) -> Tensor:
        return y

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.zeros_like(x)


def to_support(name: str, fn: Any) -> Any:
    """The map from unconstrained coordinates to the support of a latent.

    :raises ProgramError: there is none
    """
    if isinstance(innermost(fn), dist.VonMises):
        return Wrapped()
    try:
        return biject_to(fn.support)
    except NotImplementedError as error:
        support = getattr(type(innermost(fn)), "support", None)
        raise ProgramError(
            f"latent site {name!r}: no smooth bijection from R^k onto its support is known ({support}, of a "
            f"{type(innermost(fn)).__name__} with event shape {tuple(fn.event_shape)}), so there are no coordinates that a "
            "chain could move in. Refinement works on supports known to torch.distributions.biject_to; spheres, covariance "
            "matrices and Cholesky factors of them are not. Use the guide's draws as they are, or write the latent as a "
            "function of one that is free"
        ) from error


class _Constrain(Messenger):
    """Give latents the values of their coordinates, and keep what the change of variables costs."""

    def __init__(self, coordinates: Values) -> None:
        super().__init__()
        self.coordinates = coordinates
        self.log_dets: Values = {}

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name not in self.coordinates or msg["is_observed"]:
            return
        u, transform = self.coordinates[name], to_support(name, msg["fn"])
        msg["value"] = transform(u)
        msg["done"] = True
        log_det = transform.log_abs_det_jacobian(u, msg["value"])
        inner = log_det.dim() - (msg["value"].dim() - len(msg["fn"].event_shape))
        self.log_dets[name] = log_det.sum(list(range(-inner, 0))) if inner else log_det


class _First(Messenger):
    """Run with the first of the draws where they fit; the prior may be one that cannot be drawn from."""

    def __init__(self, draws: Any) -> None:
        super().__init__()
        self.draws = draws if isinstance(draws, dict) else {}

    def _pyro_sample(self, msg: Any) -> None:
        fn: Any = msg["fn"]
        value: Any = self.draws.get(msg["name"])
        if msg["is_observed"] or isinstance(fn, _Subsample) or not fits(value, fn) or not len(value):
            return
        msg["value"], msg["done"] = value[0].detach().reshape((*fn.batch_shape, *fn.event_shape)), True


class _Free(Messenger):
    """Give latents their values, and keep the coordinates of these."""

    def __init__(self, values: Values) -> None:
        super().__init__()
        self.values = values
        self.coordinates: Values = {}

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name not in self.values or msg["is_observed"]:
            return
        value, support = self.values[name], msg["fn"].support
        msg["value"], msg["done"] = value, True
        u = to_support(name, msg["fn"]).inv(renormalised(value, support).to(value))
        wrong = ~support.check(renormalised(value, support))
        # On the boundary a coordinate is infinite; the chain is then started elsewhere. Outside is a mistake.
        wrong = wrong & ~u.isinf().reshape(*wrong.shape, -1).any(-1)
        present = present_of(msg)
        wrong = wrong if present is None else wrong & present
        if bool(wrong.any()):
            raise NotInSupport(
                f"latent site {name!r}: {int(wrong.sum())} of {wrong.numel()} draws of shape {tuple(value.shape)} lie outside "
                f"the prior's support, {support}, or are NaN: the guide that made them is not one of this model"
            )
        self.coordinates[name] = u


class Density:
    """log p(latents, data) of a program, site by site, for chains side by side.

    Coordinates and values are dictionaries ``{site: (chains, *plates, *event)}`` with every plate dimension of the model
    present, of size 1 where a site is outside of the plate.

    :param draws: starting values in the shapes of :class:`pyro.infer.Predictive`
    :param parallel: run the model once for all chains, in an outer plate; None finds out whether the model allows it
    :raises ProgramError: a site without density, discrete, on a support without coordinates, without draws, or with
        draws of the wrong shape; a sub-sampled plate; a density that changes from run to run
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        draws: Values,
        parallel: bool | None = None,
    ) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        self.evaluations = self.failed = 0
        given = kwargs | {"draws": draws}
        with pyro.validation_enabled(False), explained_dtypes(find_modules(model), args, given):
            trace = run_model(_First(draws)(model), args, kwargs)
        self.sites: dict[str, Site] = {
            name: site for name, site in sample_sites(trace) if not site["infer"].get("_deterministic")
        }
        check_plates(trace)
        for name, site in self.sites.items():
            check_site(name, site)
        self.latents = [name for name, site in self.sites.items() if not site["is_observed"]]
        self.nesting = max(
            [-plate.dim for site in self.sites.values() for plate in plates_of(site)], default=0
        )
        self.draws = draws
        self.chains = check_draws({name: self.sites[name] for name in self.latents}, draws)
        values = {name: self._padded(name, draws[name].detach()) for name in self.latents}
        with pyro.validation_enabled(False):
            self.parallel, self.reason = self._decided(values, parallel)
            self.start, self.free = self._started(values)
            first, second = self.parts(self.start), self.parts(self.start)
        for name, part in first.items():
            if name in draws and part.dtype != draws[name].dtype:
                raise ProgramError(
                    f"latent site {name!r}: draws of {draws[name].dtype}, but the model works in {part.dtype}: bring data, "
                    "networks and draws to one dtype"
                )
            if not same(part, second[name]):
                raise ProgramError(
                    f"the density of site {name!r} was another one when the model ran again with the same latents, so there "
                    "is nothing a chain could converge to: put its modules into eval mode (dropout), and make noise a latent"
                )

    def parts(self, coordinates: Values) -> Values:
        """Log density of every site, scaled and masked, with the Jacobian of latents: ``(chains, *plates)``."""
        self.evaluations += 1
        if self.parallel:
            return self._parts(coordinates, parallel=True)
        each = [self._parts(_chain(coordinates, i), parallel=False) for i in range(len(_any(coordinates)))]
        return {name: torch.cat([part[name] for part in each]) for name in each[0]}

    def canonical(self, coordinates: Values) -> Values:
        """The same latents, angles within one turn: further turns would widen the spread that steps are scaled by."""
        wrap = Wrapped()
        angles = {
            name for name in coordinates if isinstance(innermost(self.sites[name]["fn"]), dist.VonMises)
        }
        return {name: wrap(u) if name in angles else u for name, u in coordinates.items()}

    def values(self, coordinates: Values) -> Values:
        """Latents in the shapes that their draws were given in."""
        with torch.no_grad():
            chains = range(len(_any(coordinates)))
            batches = [coordinates] if self.parallel else [_chain(coordinates, i) for i in chains]
            shaped = batches if self.parallel else [self._single(batch) for batch in batches]
            traces = [self._run(_Constrain(values), values, self.parallel) for values in shaped]
        return {
            name: torch.cat(
                [self._padded(name, _lead(t.nodes[name]["value"], self.parallel)) for t in traces]
            )
            .reshape(-1, *self.draws[name].shape[1:])
            .contiguous()
            for name in self.latents
        }

    def _parts(self, coordinates: Values, parallel: bool) -> Values:
        handler = _Constrain(coordinates if parallel else self._single(coordinates))
        trace = self._run(handler, coordinates, parallel)
        parts: Values = {}

        def keep(name: str, site: Site) -> Tensor:
            part = site["log_prob"] + handler.log_dets.get(name, 0.0)
            part = _lead(part, parallel)
            missing = self.nesting + 1 - part.dim()
            parts[name] = part.reshape(len(part), *[1] * missing, *part.shape[1:])
            return torch.zeros(())

        log_density(trace, set(self.sites), "model", keep)
        return parts

    def _run(self, handler: Messenger, values: Values, parallel: bool) -> Trace:
        def run(*args: Any, **kwargs: Any) -> None:
            with handler:
                if parallel:
                    with pyro.plate(CHAIN_PLATE, len(_any(values)), dim=-self.nesting - 1):
                        self.model(*args, **kwargs)
                else:
                    self.model(*args, **kwargs)

        trace = run_model(run, self.args, self.kwargs, grad=True)
        names = {name for name, site in sample_sites(trace) if not site["infer"].get("_deterministic")}
        if names != set(self.sites):
            raise ProgramError(
                f"the sites {sorted(names ^ set(self.sites))} came or went when the model ran with other latents: a chain "
                "needs the same sites at every step. Sample all of them always, and choose with torch.where"
            )
        return trace

    def _started(self, values: Values) -> tuple[Values, Values]:
        """Coordinates of the draws, and which of them have a density: those of masked latents do not, and stay."""
        batches = [values] if self.parallel else [_chain(values, i) for i in range(self.chains)]
        found: list[tuple[Values, Values]] = []
        for batch in batches:
            handler = _Free(batch if self.parallel else self._single(batch))
            trace = self._run(handler, batch, self.parallel)
            coordinates, free = {}, {}
            for name, u in handler.coordinates.items():
                site = trace.nodes[name]
                present, batch_dim = present_of(site), len(site["fn"].batch_shape)
                present = torch.ones((), dtype=torch.bool, device=u.device) if present is None else present
                present = present.expand(site["fn"].batch_shape)
                present = present.reshape((*present.shape, *[1] * (u.dim() - batch_dim))).expand(u.shape)
                coordinates[name] = self._padded(name, _lead(u.detach(), self.parallel), u.dim() - batch_dim)
                free[name] = self._padded(name, _lead(present, self.parallel), u.dim() - batch_dim)
            found.append((coordinates, free))
        return tuple({n: torch.cat([pair[i][n] for pair in found]) for n in self.latents} for i in (0, 1))  # type: ignore[return-value]

    def _decided(self, values: Values, parallel: bool | None) -> tuple[bool, str]:
        """Whether all chains may run as one, and why not: only if each then has the density that it has alone."""
        if parallel is False:
            return False, ""
        try:
            self.parallel = True
            coordinates, _ = self._started(values)
            together = self._parts(coordinates, parallel=True)
            reason = ""
            for i in {0, self.chains - 1}:
                alone = self._parts(_chain(coordinates, i), parallel=False)
                for name, part in alone.items():
                    if part.shape[1:] != together[name].shape[1:] or not same(
                        part[0], together[name][i], 1e3
                    ):
                        reason = reason or f"site {name!r} has another density in it than alone"
        except NotInSupport:
            raise
        except (RuntimeError, ValueError, IndexError, TypeError, KeyError) as error:
            reason = str(error).partition("\n")[0]
        if reason and parallel:
            raise ProgramError(
                f"parallel=True, but the model cannot run in an outer plate of {self.chains} chains: {reason}. Index "
                "dimensions from the right (x[..., i], sum(-1)), or pass parallel=False"
            )
        return not reason, reason

    def _padded(self, name: str, value: Tensor, event_dim: int | None = None) -> Tensor:
        """Chains first, then all plate dimensions."""
        site = self.sites[name]
        event_dim = len(site["fn"].event_shape) if event_dim is None else event_dim
        event = value.shape[value.dim() - event_dim :]
        batch = site["fn"].batch_shape
        return value.reshape(-1, *[1] * (self.nesting - len(batch)), *batch, *event)

    def _single(self, values: Values) -> Values:
        """The values of one chain in the shapes that the model alone has."""
        shapes = {name: self.sites[name]["fn"].batch_shape for name in values}
        return {name: v.reshape((*shapes[name], *v.shape[1 + self.nesting :])) for name, v in values.items()}


def is_singular(error: BaseException) -> bool:
    """Whether a matrix could not be factorised, which torch says of all chains together."""
    return isinstance(error, torch.linalg.LinAlgError) or isinstance(
        error.__cause__, torch.linalg.LinAlgError
    )


def same(a: Tensor, b: Tensor, slack: float = 1.0) -> bool:
    """Equal up to rounding; ``slack`` multiplies the tolerance."""
    tolerance = 10 * slack * torch.finfo(a.dtype).eps
    return bool(torch.isclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True).all())


def _any(values: Values) -> Tensor:
    return next(iter(values.values()))


def _chain(values: Values, i: int) -> Values:
    return {name: value[i : i + 1] for name, value in values.items()}


def _lead(value: Tensor, parallel: bool) -> Tensor:
    return value if parallel else value.unsqueeze(0)
