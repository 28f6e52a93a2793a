"""The automatic guide that is to be a posterior: globals read off whole data sets, locals below them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn

from pyro_sinkhorn.errors import ProgramError
from pyro_sinkhorn.geometry.registry import geometry_of
from pyro_sinkhorn.guide.auto_implicit import AutoImplicit
from pyro_sinkhorn.guide.encoder import Standardise, check_device, joined
from pyro_sinkhorn.guide.factorisation import check_factorises
from pyro_sinkhorn.guide.layout import columns_along
from pyro_sinkhorn.guide.lazy import LazyGuide
from pyro_sinkhorn.guide.make import make_group
from pyro_sinkhorn.guide.observed import Observed, Readings, find_observed, read_observed
from pyro_sinkhorn.guide.posterior_networks import ResidualHead, SetEncoder
from pyro_sinkhorn.guide.posterior_start import (
    check_subsampling,
    check_supports,
    factors,
    find_relative,
    make_reader,
    simulations,
)
from pyro_sinkhorn.guide.produce import Produced, Recipe, plates_around
from pyro_sinkhorn.guide.reading import (
    Covariates,
    KnowsCovariates,
    Reading,
    encoded,
    find_covariates,
    read_covariates,
    resized,
)
from pyro_sinkhorn.guide.states import key_of
from pyro_sinkhorn.runs import check_appeared, run_model, subsamples
from pyro_sinkhorn.structure import Group, Plate, Structure, nesting_of, plates_of, structure_of


class AutoPosterior(KnowsCovariates, LazyGuide):
    r"""Guide for :class:`~pyro_sinkhorn.Trace_EnergyScore`: an implicit posterior of all latents, amortised over data sets.

    Latents are produced from coarse to fine, as the posterior of a program with plates factorises:

    .. math::

        q(g\mid x)\,\prod_i q(z_i\mid x_i, g)\,\prod_j q(w_{ij}\mid x_{ij}, z_i, g),

    globals from an encoder of the whole data set that knows neither the order nor the number of its rows, local latents
    from the data of their slice and all latents above them. Each factor is a residual network of these and of noise,
    with the heads of the supports, so it has no density. Discrete latents get a probability for every state, continuous
    ones beside them may depend on it. A latent on the line whose prior is known from the latents above is produced
    relative to that prior's mean and standard deviation.

    :param model: any Pyro program with an observed site in a plate
    :param encoder: an ``nn.Module`` from observed values ``(rows, *event)`` to codes ``(rows, width)``, one for each slice of
        the data plate, to be trained along; by default robustly standardised values, up to 64 of them as they are, else
        through a perceptron
    :param covariates: what else a slice is read with. ``"auto"`` (default): arguments of the model as long as the data
        plate that are not its data (a design, known measurement errors). A function of the model's arguments that returns
        one row a slice. None: nothing
    :param noise_dim: noise variables of each factor; default twice its raw outputs
    :param hidden: width of the residual networks
    :param depth: residual blocks of each
    :raises ProgramError: at the first call, for a model that the guide cannot serve, naming the site

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(mu, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 0.5), obs=x)
    >>> guide = AutoPosterior(model)
    >>> {name: tuple(value.shape) for name, value in guide(torch.rand(5)).items()}
    {'mu': (), 'z': (5,)}
    """

    made = ("heads", "state_heads", "above", "readers")
    #: Every site is produced given those before it, so each block can be scored given the truth of the others.
    autoregressive = True

    def __init__(
        self,
        model: Callable[..., Any],
        encoder: nn.Module | None = None,
        *,
        covariates: Covariates = "auto",
        noise_dim: int | None = None,
        hidden: int = 128,
        depth: int = 3,
    ) -> None:
        super().__init__(model)
        if encoder is not None and not isinstance(encoder, nn.Module):
            raise ProgramError(
                f"encoder is a {type(encoder).__name__}: expected an nn.Module, whose parameters the guide can train"
            )
        if not (covariates in ("auto", None) or callable(covariates)):
            raise ProgramError(
                f"covariates is {covariates!r}: expected 'auto', None or a function of the model's arguments"
            )
        self.encoder = encoder
        self._covariates: Covariates = covariates
        self._noise_dim, self._hidden, self._depth = noise_dim, hidden, depth
        #: Arguments that make a guide alike, the encoder left out.
        self.options: dict[str, Any] = {
            "covariates": covariates,
            "noise_dim": noise_dim,
            "hidden": hidden,
            "depth": depth,
        }
        self._fitted: tuple[AutoImplicit, ...] = ()
        self._make_empty()
        self._observed: list[Observed] = []
        #: Values of the observed sites that the last call read, for the loss to check against the model's.
        self.last_inputs: dict[str, Tensor] = {}
        #: Sites produced relative to their prior's moments.
        self.relative: frozenset[str] = frozenset()

    def start_from(self, fitted: AutoImplicit) -> None:
        """Start the perceptrons that read wide data from those of a guide that was fitted, where they are alike."""
        self._fitted = (fitted,)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every latent; returns them by name."""
        structure, shown = self._ensure(lambda: self._set_up(args, kwargs)), self._shown
        replayed = {} if shown is None else dict(shown.indices)
        prior = run_model(self.model, args, kwargs, values=replayed, stop_after=structure.latents)
        check_appeared(prior, structure.latents)
        indices = subsamples(prior)
        if shown is None:
            inputs = read_observed(
                self._observed, args, kwargs, indices, lambda: self._run_observed(args, kwargs, indices)
            )
            self.last_inputs = inputs
        else:
            inputs = shown.readings
        reading = self._reading(inputs, () if shown is None else (shown.plate,), indices, args, kwargs)
        plates, contexts = plates_around(prior, structure, indices)
        done = Produced()
        for i, block in enumerate(factors(structure)):
            if block.plates and shown is not None and shown.only_globals:
                break
            if i and (shown is None or shown.moments is None):
                # Again, below the latents of this call: what is left is produced relative to its prior.
                prior = run_model(
                    self.model, args, kwargs, values=done.values | indices, stop_after=structure.latents
                )
            current = tuple(plates[plate.name] for plate in block.plates)
            context = self._read(i, reading, current)
            above = self._embedded(done.values, prior, current, structure)
            if above is not None:
                context = joined(context, self.above[i](above.to(context)))
            self._recipe(i, block).sample(current, context, prior, contexts, done)
        return done.values

    def blocks(self) -> list[tuple[str, ...]]:
        """Sites that are produced together, in the order of production; a discrete site is a block of its own."""
        assert self._structure is not None
        found: list[tuple[str, ...]] = []
        for block in factors(self._structure):
            found += [(name,) for name in block.sites if name in self._discrete]
            rest = tuple(name for name in block.sites if name not in self._discrete)
            found += [rest] if rest else []
        return found

    def _recipe(self, i: int, block: Group) -> Recipe:
        head, made = self.heads[i], cast(nn.ModuleDict, self.state_heads[i])
        return Recipe(
            block,
            head if isinstance(head, ResidualHead) else None,
            {name: made[key_of(name)] for name in block.sites if key_of(name) in made},
            self._noise_dims[i],
            f"{self._pyro_name}_noise_{i}",
            self.relative,
            temperature=0.5,
            below_globals=False,
            known_moments=(self._shown and self._shown.moments) or {},
        )

    # What is read.

    def _reading(
        self, inputs: Readings, lead: tuple[Plate, ...], indices: dict[str, Tensor], args: Any, kwargs: Any
    ) -> Reading:
        observed = resized(self._observed, inputs)
        covariates = read_covariates(
            self._covariates, self._covariate_paths, args, kwargs, observed[0].plates[0], self.model
        )
        code = None
        if self.encoder is not None:
            check_device(self.encoder, next(iter(inputs.values())))
            code = encoded(self.encoder, inputs, observed, lead)
        return Reading(observed, inputs, covariates, indices, lead, code)

    def _read(self, i: int, reading: Reading, plates: tuple[Plate, ...]) -> Tensor:
        """The code of every slice of these plates, or of the whole data set where there are none."""
        reader = self.readers[i]
        if plates:
            rows = reading.rows(plates)
            seen = cast(Standardise, getattr(reader, "standardise", reader)).loc
            self._check_width(rows, len(seen), plates)
            return reader(rows.to(seen))
        codes = []
        for encoder, stack in zip(cast(nn.ModuleList, reader), reading.stacks(), strict=True):
            assert isinstance(encoder, SetEncoder)
            rows = reading.rows(stack)
            self._check_width(rows, len(encoder.standardise.loc), stack)
            # Innermost first. Dimensions do not tell: Pyro gives the rightmost free one to the outermost plate.
            dims = [plate.dim for plate in reversed(stack)]
            code = encoder(rows.to(encoder.standardise.loc), dims, reading.counted(stack))
            sets = [len(code)] + [1] * self._nesting if reading.lead else []
            codes.append(code.reshape(*sets, encoder.width))
        return joined(*codes)

    def _check_width(self, rows: Tensor, made_for: int, plates: tuple[Plate, ...]) -> None:
        if rows.shape[-1] != made_for:
            raise ProgramError(
                f"AutoPosterior was made for {made_for} numbers a slice of the plates {[p.name for p in plates]} and now gets "
                f"{rows.shape[-1]} (observed sites {[site.name for site in self._observed]}, and covariates): the shape of a "
                "datum must stay the same between calls; the number of data may vary"
            )

    def _embedded(
        self, values: dict[str, Tensor], prior: Trace, plates: tuple[Plate, ...], structure: Structure
    ) -> Tensor | None:
        """Continuous latents produced before, as columns: ``(..., plates, c)``. States reach the heads by themselves."""
        around = {plate.name for plate in plates}
        data_plates = {plate.name for plate in structure.data_plates}
        found = []
        for name, value in values.items():
            own = {plate.name for plate in plates_of(prior.nodes[name])}
            if name not in self._discrete and own & data_plates <= around:
                columns = geometry_of(prior.nodes[name]["fn"], name).embed(value)
                # Another plate, of a global vector say, may lie at the same dimension.
                shared = tuple(plate for plate in plates if plate.name in own)
                found.append(columns_along(columns, shared, self._nesting))
        return joined(*found) if found else None

    def _run_observed(self, args: Any, kwargs: Any, indices: dict[str, Tensor]) -> Trace:
        names = [observed.name for observed in self._observed]
        return run_model(self.model, args, kwargs, values=indices, stop_after=names)

    # Set-up, once, at the first call.

    def _make_empty(self) -> None:
        self.heads, self.readers, self.above = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        self.state_heads = nn.ModuleList()  # a dictionary of them for every factor
        self._noise_dims: list[int] = []
        self._discrete: set[str] = set()

    @torch.no_grad()
    def _set_up(self, args: Any, kwargs: Any) -> None:
        self._make_empty()  # an earlier attempt may have failed half-way
        whole = run_model(self.model, args, kwargs)
        structure = structure_of(whole)
        if not structure.latents:
            raise ProgramError("the model has no latent site to guide: all its sample sites are observed")
        check_subsampling(structure)
        indices = subsamples(whole)
        self._nesting = nesting_of(whole)
        self._observed = find_observed(whole, structure, args, kwargs, indices)
        if self._pending_state is None:  # else they are those of the state
            self._covariate_paths = find_covariates(self._covariates, self._observed, args, kwargs)
        draws = simulations(self.model, structure, args, kwargs, indices)
        self.relative = find_relative(self.model, structure, draws, args, kwargs)
        check_supports(structure, draws)
        check_factorises(self.model, structure, draws, args, kwargs)
        present = read_observed(self._observed, args, kwargs, indices, lambda: whole).present
        readings = []
        for draw in draws:
            values = Readings({site.name: draw.nodes[site.name]["value"] for site in self._observed}, present)
            readings.append(self._reading(values, (), indices, args, kwargs))
        done = Produced()
        for block in factors(structure):
            self._make_factor(block, structure, draws, readings, done)
        self._structure = structure
        self.train(self.training)
        self._take_pending()

    def _make_factor(
        self,
        block: Group,
        structure: Structure,
        draws: list[Trace],
        readings: list[Reading],
        done: Produced,
    ) -> None:
        value = next(
            (v for v in (draws[0].nodes[n]["value"] for n in block.sites) if v.is_floating_point()), None
        )
        place = next(iter(readings[0].values.values())) if value is None else value
        factory: dict[str, Any] = {
            "device": place.device,
            "dtype": place.dtype if place.is_floating_point() else torch.get_default_dtype(),
        }
        self.readers.append(
            make_reader(block, readings, self._hidden, self.encoder is not None, self._fitted).to(**factory)
        )
        i = len(self.readers) - 1
        context = self._read(i, readings[0], block.plates)
        seen = [
            self._embedded(
                {name: draw.nodes[name]["value"] for name in done.values}, draw, block.plates, structure
            )
            for draw in draws
        ]
        above: nn.Module = nn.Identity()
        rows = [one.flatten(0, -2) for one in seen if one is not None]
        if rows:
            above = Standardise(rows[0].shape[-1], where_heavy=True).to(**factory)
            above.fit(torch.cat(rows))
            context = joined(context, above(seen[0].to(context)))  # type: ignore[union-attr]
        self.above.append(above)
        state_heads, head, noise_dim = make_group(
            block,
            draws,
            context,
            done,
            self.relative,
            True,
            self._noise_dim,
            self._hidden,
            {},
            functools.partial(ResidualHead, hidden=self._hidden, depth=self._depth),
            noise_per_output=2,
        )
        self.state_heads.append(state_heads)
        self._discrete |= {name for name in block.sites if key_of(name) in state_heads}
        self.heads.append(head)
        self._noise_dims.append(noise_dim)
        done.values |= {name: draws[0].nodes[name]["value"] for name in block.sites}
