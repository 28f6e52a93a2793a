"""The automatic guide without a density."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from pyro.nn import PyroModuleList
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn

from pyro_sinkhorn.errors import ProgramError
from pyro_sinkhorn.guide.encoder import DefaultEncoder, NoiseHead, check_device
from pyro_sinkhorn.guide.global_guide import GLOBAL_GUIDES
from pyro_sinkhorn.guide.layout import features_of, plate_shape, rows_of
from pyro_sinkhorn.guide.lazy import LazyGuide
from pyro_sinkhorn.guide.make import make_group
from pyro_sinkhorn.guide.observed import Observed, Readings, find_observed, read_observed
from pyro_sinkhorn.guide.produce import Produced, Recipe, entered, plates_around
from pyro_sinkhorn.guide.start import has_start, stands_alone
from pyro_sinkhorn.guide.states import DISCRETE, key_of, mass_beyond
from pyro_sinkhorn.runs import check_appeared, preserved_buffers, run_model, subsamples
from pyro_sinkhorn.structure import Group, Plate, plates_of, structure_of

EncoderInput = Callable[..., Tensor]


class AutoImplicit(LazyGuide):
    r"""Guide made of networks that turn observed values and noise into latents; it has no density.

    For every group of local latents (those that share their data plates) one network reads the observed values of a
    slice and standard normal noise and returns all latents of the group, jointly:

    .. math:: z_i = \mathrm{head}\bigl(h_\phi(x_i, \xi_i)\bigr), \qquad \xi_i \sim N(0, I),

    where ``head`` is that of the support (softmax for a simplex, normalisation for a sphere, ...). Global latents get a
    normal guide in unconstrained space, or a point. Networks are made at the first call, from the shapes seen then;
    plate sizes and sub-samples are read again at every call.

    :param model: any Pyro program with an observed site in a plate
    :param encoder: an ``nn.Module`` from the encoder's input to codes ``(..., width)``, one for each slice of the data
        plate; by default a perceptron on robustly standardised values. A module given here is trained and sees the
        values as they are
    :param encoder_input: function of the model's arguments that returns what the encoder reads; by default the values
        of the observed sites (a dict of them if there are several and an ``encoder`` is given)
    :param noise_dim: noise variables of each slice; default as many as the group has raw outputs. 0 makes the guide
        deterministic
    :param hidden: width of the network that mixes code and noise
    :param global_guide: ``"normal"`` or ``"delta"``
    :param discrete: ``"enumerate"`` (default): discrete latents get a probability for every state, and continuous ones of
        the same slice may depend on it; for :class:`~pyro_sinkhorn.TraceEnum_Sinkhorn`. ``"straight_through"``: hard
        values with the gradient of a relaxation, biased, for :class:`~pyro_sinkhorn.Trace_Sinkhorn`; ``Bernoulli``
        and ``OneHotCategorical`` only
    :param temperature: of that relaxation
    :raises ProgramError: at the first call, for a model that the guide cannot serve, naming the site

    ``AutoImplicit`` learned by ``Trace_Sinkhorn`` is an encoder, not a posterior.

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Dirichlet(torch.ones(3)))
    ...         pyro.sample("x", dist.Normal(z, 0.1).to_event(1), obs=x)
    >>> guide = AutoImplicit(model)
    >>> guide(torch.rand(5, 3))["z"].shape
    torch.Size([5, 3])
    """

    made = ("heads", "encoders", "global_guides", "state_heads")

    def __init__(
        self,
        model: Callable[..., Any],
        encoder: nn.Module | None = None,
        *,
        encoder_input: EncoderInput | None = None,
        noise_dim: int | None = None,
        hidden: int = 128,
        global_guide: Literal["normal", "delta"] = "normal",
        discrete: Literal["enumerate", "straight_through"] = "enumerate",
        temperature: float = 0.5,
    ) -> None:
        super().__init__(model)
        if encoder is not None and not isinstance(encoder, nn.Module):
            raise ProgramError(
                f"encoder is a {type(encoder).__name__}: expected an nn.Module, whose parameters the guide can train"
            )
        if global_guide not in GLOBAL_GUIDES:
            raise ProgramError(f"global_guide is {global_guide!r}: expected one of {sorted(GLOBAL_GUIDES)}")
        if discrete not in DISCRETE:
            raise ProgramError(f"discrete is {discrete!r}: expected one of {sorted(DISCRETE)}")
        if not temperature > 0:
            raise ProgramError(f"temperature is {temperature}: expected a positive number")
        self.encoder = encoder
        self._encoder_input = encoder_input
        self._noise_dim = noise_dim
        self._hidden = hidden
        self._global_kind = global_guide
        self._discrete, self._temperature = discrete, temperature
        self._make_empty()
        self._observed: list[Observed] = []
        #: Values of the observed sites that the last call read, for the loss to check against the model's.
        self.last_inputs: dict[str, Tensor] = {}
        #: Prior mass beyond the states of every count, at the last call.
        self.lost_mass: dict[str, float] = {}
        self._warned: set[str] = set()

    @property
    def _encoder_given(self) -> bool:
        # Looked up where modules keep their parts: an access to a network would state its parameters to Pyro again.
        return any(place.get("encoder") is not None for place in (self._modules, self.__dict__))

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every latent; returns them by name."""
        structure, shown = self._ensure(lambda: self._set_up(args, kwargs)), self._shown
        replayed = {} if shown is None else dict(shown.indices)
        fixed = shown is not None or self._program_fixed
        prior = run_model(
            self.model, args, kwargs, values=replayed, stop_after=structure.latents, grad=not fixed
        )
        check_appeared(prior, structure.latents)
        indices = subsamples(prior)
        if shown is not None:
            inputs = shown.readings
        else:
            inputs = read_observed(
                self._observed, args, kwargs, indices, lambda: self._run_observed(args, kwargs, indices)
            )
        self.last_inputs = {} if self._encoder_input is not None else inputs
        plates, contexts = plates_around(prior, structure, indices)

        done = Produced()
        values = done.values
        for name, guide in zip(structure.globals, self.global_guides, strict=True):
            site = prior.nodes[name]
            with entered(contexts, [plate.name for plate in plates_of(site)]):
                values[name] = guide(site["fn"])
        if values and structure.groups:
            # Again, now below the globals of this call: locals are produced relative to their prior.
            prior = run_model(
                self.model, args, kwargs, values=values | indices, stop_after=structure.latents, grad=True
            )
        coarse_code: list[tuple[tuple[Plate, ...], Tensor]] = []
        # Once a call: every access to a network of a PyroModule states all of its parameters to Pyro.
        encoders, heads, state_heads = self._networks() if structure.groups else ([], [], [])
        for i, group in enumerate(structure.groups):
            current = tuple(plates[plate.name] for plate in group.plates)
            laid_out = current if shown is None else (shown.plate, *current)
            code = self._encode(encoders[i], group, laid_out, inputs, coarse_code, args, kwargs)
            coarse_code.append((laid_out, code))
            recipe = self._recipe(i, group, heads[i], state_heads[i], bool(structure.globals))
            recipe.sample(current, code, prior, contexts, done)
            for name, head in recipe.state_heads.items():
                self.lost_mass |= mass_beyond(name, prior.nodes[name]["fn"], head.values, self._warned)
        return values

    def _networks(self) -> tuple[Sequence[nn.Module], Sequence[nn.Module], Sequence[nn.Module]]:
        """Encoders, heads and heads of discrete sites, one of each for every group."""
        encoders = [cast(nn.Module, self.encoder)] if self._encoder_given else self.encoders
        heads, state_heads = list(self.heads), list(self.state_heads)
        return list(encoders) * (len(heads) if self._encoder_given else 1), heads, state_heads

    def _recipe(
        self, i: int, group: Group, head: nn.Module, state_heads: nn.Module, below_globals: bool
    ) -> Recipe:
        made = cast(nn.ModuleDict, state_heads)
        return Recipe(
            group,
            head if isinstance(head, NoiseHead) else None,
            {name: made[key_of(name)] for name in group.sites if key_of(name) in made},
            self._noise_dims[i],
            f"{self._pyro_name}_noise_{i}",
            self._relative,
            self._temperature,
            below_globals,
        )

    def _encode(
        self,
        encoder: nn.Module,
        group: Group,
        plates: tuple[Plate, ...],
        inputs: Readings,
        coarse: list[tuple[tuple[Plate, ...], Tensor]],
        args: Any,
        kwargs: Any,
    ) -> Tensor:
        """Code of every slice of a group, laid out like the plates: ``(*plate_shape, width)``."""
        if self._encoder_given:
            return self._encode_by_user(encoder, group, plates, inputs, args, kwargs)
        if self._encoder_input is not None:
            features = rows_of(self._encoder_input(*args, **kwargs), plates, group.name)
        else:
            features = features_of(self._observed, inputs, plates)
        # A nested group sees what the groups around it saw: the document of the word.
        around = [c for outer, c in coarse if {p.name for p in outer} < {p.name for p in plates}]
        assert isinstance(encoder, DefaultEncoder)
        seen = encoder.standardise.loc
        features = features.to(seen)
        if features.shape[-1] != len(seen):
            raise ProgramError(
                f"latent group ({group.name}): the encoder was made for {len(seen)} observed "
                f"numbers a slice and now gets {features.shape[-1]} (sites {[o.name for o in self._observed]}): the "
                "shape of a datum must stay the same between calls"
            )
        code = encoder(features)
        if around:
            shape = torch.broadcast_shapes(code.shape[:-1], *[c.shape[:-1] for c in around])
            code = torch.cat([c.expand(*shape, c.shape[-1]) for c in (code, *around)], -1)
        return code

    def _encode_by_user(
        self,
        encoder: nn.Module,
        group: Group,
        plates: tuple[Plate, ...],
        inputs: Readings,
        args: Any,
        kwargs: Any,
    ) -> Tensor:
        read = inputs.for_encoder(self._observed)
        if self._encoder_input is not None:
            read = self._encoder_input(*args, **kwargs)
        check_device(encoder, read)
        code = encoder(read)
        sizes = tuple(plate.size for plate in plates)
        if not isinstance(code, Tensor) or code.dim() < 2 or math.prod(code.shape[:-1]) != math.prod(sizes):
            got = tuple(code.shape) if isinstance(code, Tensor) else type(code).__name__
            raise ProgramError(
                f"latent group ({group.name}): the encoder returned {got}; expected a tensor of codes of shape "
                f"({', '.join(map(str, sizes))}, width), one code for each slice of the plates "
                f"{[plate.name for plate in plates]}. Heads and noise are added by AutoImplicit"
            )
        return code.reshape(*plate_shape(plates), -1)

    def _run_observed(self, args: Any, kwargs: Any, indices: dict[str, Tensor]) -> Trace:
        names = [observed.name for observed in self._observed]
        return run_model(self.model, args, kwargs, values=indices, stop_after=names)

    # Set-up, once, at the first call.

    def _make_empty(self) -> None:
        self.heads, self.encoders = nn.ModuleList(), nn.ModuleList()
        self.state_heads = nn.ModuleList()  # a dictionary of them for every group
        self.global_guides = PyroModuleList([])  # a plain list would give parameters of all of them one name

    @torch.no_grad()
    def _set_up(self, args: Any, kwargs: Any) -> None:
        self._make_empty()  # an earlier attempt may have failed half-way
        whole = run_model(self.model, args, kwargs)
        structure = structure_of(whole)
        if not structure.latents:
            raise ProgramError("the model has no latent site to guide: all its sample sites are observed")
        indices = subsamples(whole)
        self._observed = find_observed(whole, structure, args, kwargs, indices)
        self._noise_dims: list[int] = []
        draws = [run_model(self.model, args, kwargs) for _ in range(15)]  # whole: do other latents appear?
        for name in structure.globals:
            stacked = torch.stack([draw.nodes[name]["value"] for draw in draws])
            self.global_guides.append(GLOBAL_GUIDES[self._global_kind](name, whole.nodes[name], stacked))
        shared = {name: draws[0].nodes[name]["value"] for name in structure.globals} | subsamples(draws[0])
        again = run_model(self.model, args, kwargs, values=shared, stop_after=structure.latents)
        for run in (*draws, again):
            check_appeared(run, structure.latents)
        self._relative = frozenset(
            name
            for name in structure.locals
            if stands_alone(draws[0], again, name) and has_start(again.nodes[name]["fn"], name)
        )
        inputs = read_observed(self._observed, args, kwargs, indices, lambda: whole)
        coarse: list[tuple[tuple[Plate, ...], Tensor]] = []
        done = Produced()
        for i, group in enumerate(structure.groups):
            self._make_networks(i, group, inputs, draws, coarse, done, args, kwargs)
        self._structure = structure
        self.train(self.training)
        self._take_pending()

    def _make_networks(
        self,
        i: int,
        group: Group,
        inputs: Any,
        draws: list[Trace],
        coarse: Any,
        done: Produced,
        args: Any,
        kwargs: Any,
    ) -> None:
        if not self._encoder_given:
            if self._encoder_input is not None:
                features = rows_of(self._encoder_input(*args, **kwargs), group.plates, group.name)
            else:
                features = features_of(self._observed, inputs, group.plates)
            value = draws[0].nodes[group.sites[0]]["value"]
            factory = {"device": value.device, "dtype": value.dtype if value.is_floating_point() else None}
            encoder = DefaultEncoder(features.shape[-1]).to(**factory)
            check_device(encoder, features)
            encoder.standardise.fit(features.flatten(0, -2))
            self.encoders.append(encoder)
        with preserved_buffers():
            read_by = cast(nn.Module, self.encoder if self._encoder_given else self.encoders[i])
            code = self._encode(read_by, group, group.plates, inputs, coarse, args, kwargs)
        coarse.append((group.plates, code))
        pending = self._pending_state or {}
        prefix, suffix = f"state_heads.{i}.", ".values"
        states_before = {
            key[len(prefix) : -len(suffix)]: value
            for key, value in pending.items()
            if key.startswith(prefix) and key.endswith(suffix)
        }
        state_heads, head, noise_dim = make_group(
            group,
            draws,
            code,
            done,
            self._relative,
            self._discrete == "enumerate",
            self._noise_dim,
            self._hidden,
            states_before,
        )
        self.state_heads.append(state_heads)
        self.heads.append(head)
        self._noise_dims.append(noise_dim)
