"""Programs to ArviZ: draws, data and densities under names that its summaries, plots and comparisons understand.

What is drawn from the encoder is kept apart from what is drawn from a posterior: ArviZ takes whatever lies in the group
``posterior`` for one, and the optimum of matching may be an encoder without any spread.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import numpy as np
import pyro.distributions as dist
from torch import Tensor, nn

from pyro_sinkhorn.errors import ProgramError, checked_integer
from pyro_sinkhorn.explain import tensors_of
from pyro_sinkhorn.labelled import (
    Groups,
    Labelled,
    Layout,
    as_array,
    checked_coords,
    container,
    layout_of,
    renamed,
    with_gaps,
)
from pyro_sinkhorn.replay import DrawnSubsamples, pinned, replayed
from pyro_sinkhorn.rng import RandomStream, undisturbed
from pyro_sinkhorn.runs import run_model, subsamples
from pyro_sinkhorn.sampling import program_draws
from pyro_sinkhorn.scoring import run_guide
from pyro_sinkhorn.structure import (
    innermost,
    is_data,
    is_latent,
    plates_of,
    sample_sites,
    structure_of,
)

_NO_POSTERIOR = "Draws of the encoder, which matching the prior does not make a posterior: their spread is no uncertainty."


def to_arviz(
    program: Any,
    *args: Any,
    num_samples: int = 500,
    seed: int | None = None,
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    **kwargs: Any,
) -> Any:
    r"""Draws, data and log densities of a program as ``arviz.InferenceData`` (ArviZ 0.2x) or ``xarray.DataTree`` (ArviZ 1).

    ========================  ===========================================================================
    group                     what is in it
    ========================  ===========================================================================
    ``posterior``             latents by ``program.posterior``; only where the program has a posterior
    ``encoder_draws``         latents by ``program.encode``, where it has none: **not** a posterior
    ``prior``                 latents by ``program.generate``
    ``prior_predictive``      observed sites of the same runs
    ``posterior_predictive``  observed sites drawn again given the latents of the first or second group
    ``log_likelihood``        :math:`\log p(x_i \mid z)` of observed sites that have a density, a number a
                              slice of their plates, at the same latents; unscaled
    ``observed_data``         values of observed sites; NaN where masked, in ``log_likelihood`` as well
    ``constant_data``         other tensors among the arguments
    ========================  ===========================================================================

    Draws lie along ``draw``; ``chain`` has length 1, since they are independent of each other. Then come the plates by
    their names, outermost first as Pyro lays them out, then the event, ``<site>_dim_0``, ``<site>_dim_1``, ...: dimensions
    of no plate that Pyro leaves at size 1 are dropped. Coordinates are ranges; of a plate that holds a sub-sample, its
    indices. A plate that draws its sub-sample by itself keeps one for the whole export. ``pyro.deterministic`` sites
    stand with the latents. A site ``x`` with ``obs_mask=`` is exported as ``x``, with what is missing drawn; its
    imputations are the latent ``x_unobserved``. A ``/`` in a name becomes a dot, since groups are paths.

    A program that has not been fitted exports its prior alone, with a warning; one without a guide, such as a simulator
    fitted by ``Trace_DataSinkhorn``, too, without one. The attributes ``latents_from`` (``"posterior"``, ``"encoder"`` or
    ``"none"``), ``loss``, ``num_steps`` and ``omitted`` say what was exported.

    **Leave-one-out**: with latents of every datum, ``log_likelihood`` is conditional on the latent of the datum itself, which
    has seen it. Without the datum that latent would follow its prior, and the importance weights of ``arviz.loo`` must bridge
    from one to the other: mostly they cannot, as their Pareto diagnostics show, and the number is then closer to the fit
    than to the prediction of new data (Merkle, Furr and Rabe-Hesketh 2019). At encoder draws it estimates nothing: ArviZ, which
    asks for a posterior, computes it only when told ``arviz.loo(data, reff=1.0)``.

    :param program: a :class:`~pyro_sinkhorn.SinkhornProgram`
    :param args: arguments of the model, as ``fit`` takes them
    :param num_samples: draws of every group, default 500: Monte Carlo errors of 1/22 standard deviations. The model is run
        about four times as often
    :param seed: default: torch's global random state
    :param coords: ``{dimension: values}``, instead of ranges
    :param dims: ``{site: names}`` of its dimensions, instead of plate names; chain and draw not among them
    :raises ProgramError: no observed data, arguments or draws that do not fit the model, names that do not fit the arrays

    Source of the names: the InferenceData schema of ArviZ (Kumar et al. 2019, *ArviZ, a unified library for exploratory
    analysis of Bayesian models in Python*); Vehtari, Gelman and Gabry 2017 for leave-one-out;
    Merkle, Furr and Rabe-Hesketh 2019, *Bayesian comparison of latent variable models*, for what it is conditional on.

    >>> import torch, pyro, pyro.distributions as dist
    >>> from pyro_sinkhorn import SinkhornProgram
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Dirichlet(torch.ones(3)))
    ...         pyro.sample("x", dist.Normal(z, 0.1).to_event(1), obs=x)
    >>> x = dist.Dirichlet(torch.ones(3)).sample((128,))
    >>> program = SinkhornProgram(model).fit(x, num_steps=2, progress=False)
    >>> exported = to_arviz(program, x[:20], num_samples=10, seed=0)
    >>> dict(exported["encoder_draws"]["z"].sizes)
    {'chain': 1, 'draw': 10, 'data': 20, 'z_dim_0': 3}
    >>> exported["log_likelihood"]["x"].dims
    ('chain', 'draw', 'data')
    """
    num_samples = checked_integer("num_samples", num_samples, 1)
    if not all(hasattr(program, name) for name in ("model", "encode", "generate", "has_posterior")):
        raise ProgramError(f"to_arviz got a {type(program).__name__}: expected a SinkhornProgram")
    args, kwargs = program._inputs(args, kwargs)
    with RandomStream(seed).active() if seed is not None else nullcontext():
        return _Export(program, args, kwargs, num_samples).run(coords, dims)


class _Export:
    """One call of :func:`to_arviz`: what a run of the model shows, and the draws made of it."""

    def __init__(self, program: Any, args: Any, kwargs: Any, num_samples: int) -> None:
        self.program, self.args, self.kwargs, self.num_samples = program, args, kwargs, num_samples
        self.names = _argument_names(program.model, args, kwargs)
        drawn = DrawnSubsamples()
        with program._evaluating(None, args, kwargs):
            self.trace = run_model(drawn(program.model), args, kwargs)
        self.plates = structure_of(self.trace).data_plates  # complains where nothing is observed
        self.indices = subsamples(self.trace)
        self.drawn = drawn.names
        self.sites = dict(sample_sites(self.trace))
        #: Sites with missing data: Pyro makes three of each, x_observed, x_unobserved and what they make up.
        self.imputed = {
            f"{name}_observed": name
            for name in self.sites
            if {f"{name}_observed", f"{name}_unobserved"} <= self.sites.keys()
        }
        self.latents = [name for name, site in self.sites.items() if is_latent(site)]
        #: Observed sites, by the name they are exported under.
        self.data = {self.imputed.get(name, name): name for name, site in self.sites.items() if is_data(site)}
        self.computed = [
            name
            for name, site in self.sites.items()
            if site["is_observed"]
            and name not in {*self.data, *self.data.values()}
            and not isinstance(innermost(site["fn"]), dist.Unit)  # pyro.factor
        ]
        self.layouts = {name: layout_of(name, site) for name, site in self.sites.items()}
        self.layouts |= {name: layout_of(name, self.sites[site]) for name, site in self.data.items()}
        self.omitted: list[str] = []

    def run(self, coords: Any, dims: Any) -> Any:
        groups: Groups = {}
        calibration = getattr(self.program, "calibration", None)
        guides = {id(one): one for one in (self.program.guide, getattr(calibration, "guide", None))}
        with pinned(guides.values(), self.trace, self.indices if self.drawn else {}):
            source, latents = self._draws()
            prior = self.program.generate(self.num_samples, *self.args, **self.kwargs)
            if source != "none":
                latents = {name: self._shaped(name, value) for name, value in latents.items()}
                name = "posterior" if source == "posterior" else "encoder_draws"
                computed, density = self._replayed(latents)
                groups[name] = self._group(latents | computed)
                with self.program._evaluating(None, self.args, self.kwargs):
                    again = program_draws(
                        self.program.model, self.num_samples, self.args, self.kwargs, latents
                    )
                groups["posterior_predictive"] = self._group({name: again[name] for name in self.data})
                groups["log_likelihood"] = self._group(density, batch=True)
        groups["prior"] = self._group({name: prior[name] for name in (*self.latents, *self.computed)})
        groups["prior_predictive"] = self._group({name: prior[name] for name in self.data})
        groups["observed_data"] = {
            name: self.layouts[name].labelled(name, self._array(name, with_gaps(self.sites[site])), False)
            for name, site in self.data.items()
        }
        groups["constant_data"] = self._constants()
        # Groups are paths, in which a slash would open another one.
        groups = {
            group: {name.replace("/", "."): one for name, one in members.items()}
            for group, members in groups.items()
            if members
        }
        if dims is not None:
            dims = {name.replace("/", "."): names for name, names in dims.items()}
        plates = {name: as_array(index) for name, index in self.indices.items()}
        named = renamed(groups, dims)
        for group, members in groups.items():
            for name, one in members.items():
                pairs = zip(one.dims, named[group][name].dims, strict=True)
                plates |= {new: plates[old] for old, new in pairs if old in self.indices}
        return container(named, checked_coords(named, coords, plates), *self._attributes(source))

    def _draws(self) -> tuple[str, dict[str, Tensor]]:
        """Where latents come from, and their draws."""
        program, size = self.program, {"num_samples": self.num_samples}
        if program.has_posterior:
            return "posterior", program.posterior(*self.args, **size, **self.kwargs)
        if not program.num_steps:
            warnings.warn(
                "the program has not been fitted: only its prior, prior predictive and data are exported",
                UserWarning,
                stacklevel=5,
            )
            self.omitted.append("encoder_draws (not fitted)")
            return "none", {}
        with program._evaluating(None, self.args, self.kwargs), undisturbed():
            guide = run_guide(program.guide, self.args, self.kwargs)
        if not any(is_latent(site) for _, site in sample_sites(guide)):
            self.omitted.append("encoder_draws (the guide samples no latents)")
            return "none", {}
        return "encoder", program.encode(*self.args, **size, **self.kwargs)

    def _shaped(self, name: str, value: Tensor) -> Tensor:
        """Draws of a latent in the shape that the model gives it, without dimensions that Predictive adds in front."""
        if name not in self.latents:
            raise ProgramError(f"draws of {name!r}: no latent of the model, which has {self.latents}")
        if len(value) != self.num_samples:
            raise ProgramError(
                f"draws of {name!r} have shape {tuple(value.shape)}: expected {self.num_samples} of them"
            )
        self.layouts[name].labelled(name, as_array(value), True)
        shape = tuple(self.sites[name]["value"].shape)
        return value.reshape(self.num_samples, *value.shape[1:][max(value.dim() - 1 - len(shape), 0) :])

    def _replayed(self, latents: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Computed sites and log densities of the data at every draw."""
        missing = [name for name in self.latents if name not in latents]
        if missing:
            self.omitted.append(f"log_likelihood (no draws of the latents {', '.join(missing)})")
        with self.program._evaluating(None, self.args, self.kwargs):
            model = functools.partial(run_model, self.program.model, self.args, self.kwargs)
            draws = ({name: value[i] for name, value in latents.items()} for i in range(self.num_samples))
            runs = (model(values=values | self.indices) for values in draws)
            computed, density = replayed(runs, self.computed, {} if missing else self.data)
        for name in {} if missing else self.data:
            if name not in density:
                self.omitted.append(f"log_likelihood of {name} (its distribution has no density)")
        return computed, density

    def _group(self, draws: dict[str, Tensor], batch: bool = False) -> dict[str, Labelled]:
        layouts = {name: self.layouts[name].batch() if batch else self.layouts[name] for name in draws}
        arrays = {name: as_array(v) if batch else self._array(name, v) for name, v in draws.items()}
        return {name: layouts[name].labelled(name, array, True) for name, array in arrays.items()}

    def _array(self, name: str, value: Tensor) -> np.ndarray:
        """Values of a site. Of a discrete one as integers, which Pyro's counts are not: ArviZ goes by the type."""
        fn = self.sites[self.data.get(name, name)]["fn"]
        if getattr(fn.support, "is_discrete", False) and bool((value == value.round()).all()):
            value = value.long()
        return as_array(value)

    def _constants(self) -> dict[str, Labelled]:
        """Tensors among the arguments that are not data. One as long as a plate belongs to it, as for ``fit``."""
        observed = [self.sites[name]["value"] for name in self.data.values()]
        found = {}
        for path, tensor in tensors_of(self.args, self.kwargs):
            plate = next((p for p in self.plates if tensor.dim() and len(tensor) == p.full_size), None)
            if plate is not None and plate.size != plate.full_size:
                tensor = tensor[self.indices[plate.name].to(tensor.device)]
            if any(_same(tensor, value) for value in observed):
                continue
            name = "_".join([self.names[path[0]], *map(str, path[1:])])
            dims = [f"{name}_dim_{i}" for i in range(tensor.dim())]
            if plate is not None:
                dims = [plate.name, *[f"{name}_dim_{i}" for i in range(tensor.dim() - 1)]]
            found[name] = Layout(tuple(tensor.shape), tuple(dims)).labelled(name, as_array(tensor), False)
        return found

    def _attributes(self, source: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        """Those of the whole, and those of single groups."""
        common = {
            "created_at": datetime.now(UTC).isoformat(),
            "inference_library": "pyro_sinkhorn",
            "inference_library_version": _version(),
            "loss": type(self.program.loss).__name__,
            "num_steps": int(self.program.num_steps),
            "latents_from": source,
            "omitted": "; ".join(self.omitted) or "nothing",
        }
        plates = {plate.name for plate in self.plates}
        local = [
            name
            for name in self.latents
            if plates.intersection(plate.name for plate in plates_of(self.sites[name]))
        ]
        notes = {"encoder_draws": {"note": _NO_POSTERIOR}}
        if local:
            notes["log_likelihood"] = {
                "conditional_on": ", ".join(local),
                "note": "Conditional on the latents of every datum, which have seen it: leave-one-out by these numbers is "
                "no estimate for new data unless its Pareto diagnostics are good.",
            }
        return common, notes


def _same(tensor: Tensor, value: Tensor) -> bool:
    """Whether an argument holds the observed values, perhaps in another shape or precision."""
    if tensor.numel() != value.numel():
        return False
    tensor, value = tensor.flatten(), value.flatten().to(tensor.device)
    return bool(((tensor == value) | ((tensor != tensor) & (value != value))).all())


def _argument_names(model: Callable[..., Any], args: Any, kwargs: Any) -> dict[int | str, str]:
    """What the model calls its arguments, by position or key.

    :raises ProgramError: it does not take them
    """
    function = model.forward if isinstance(model, nn.Module) else model
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a callable that does not say
        return {i: f"argument_{i}" for i in range(len(args))} | {key: key for key in kwargs}
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        given = [*map(str, range(len(args))), *map(repr, kwargs)]
        raise ProgramError(
            f"the model takes {signature}, but to_arviz was given {f'the arguments {given}' if given else 'none'} ({error}): "
            "pass what fit takes"
        ) from error
    names: dict[int | str, str] = {key: key for key in kwargs}
    positional = [p for p in signature.parameters.values() if p.kind <= inspect.Parameter.VAR_POSITIONAL]
    for i in range(len(args)):
        parameter = positional[min(i, len(positional) - 1)]
        variadic = parameter.kind == inspect.Parameter.VAR_POSITIONAL
        names[i] = f"{parameter.name}_{i - len(positional) + 1}" if variadic else parameter.name
    return names


def _version() -> str:
    try:
        return metadata.version("pyro-sinkhorn")
    except metadata.PackageNotFoundError:  # a checkout on the path
        return "unknown"
