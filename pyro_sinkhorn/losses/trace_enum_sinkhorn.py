r"""Sinkhorn latent matching with discrete latents, whose states are enumerated."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from pyro.infer import config_enumerate
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace

from pyro_sinkhorn.errors import NonFiniteError, ProgramError
from pyro_sinkhorn.losses.states import Enumeration, check_enumeration, joint_counts, read_enumeration
from pyro_sinkhorn.losses.trace_sinkhorn import Trace_Sinkhorn
from pyro_sinkhorn.structure import Structure


class TraceEnum_Sinkhorn(Trace_Sinkhorn):
    r"""``Trace_Sinkhorn`` for programs with discrete latents, as ``TraceEnum_ELBO`` extends ``Trace_ELBO``.

    .. math::

        -\,\sum_k q(k\mid x)\,\mathbb{E}_{q(z\mid x,k)}\log p(x\mid z,k)
        \;+\;N\,w\sum_{\text{groups}}\frac{S(q(k, z), p(k, z))}{\mathbb{E}\,c}
        \;-\;\mathbb{E}_q \log\frac{p(\text{globals})}{q(\text{globals})}

    The guide gives every state :math:`k` of a discrete local latent a probability. The likelihood is averaged over all of
    them, enumerated in parallel; nothing is relaxed. The clouds hold one drawn state a datum, in the guide's and in the
    prior's alike, and the gradient to the probabilities comes from the transport potentials :math:`\psi_n` at all states,

    .. math:: \frac{\partial S}{\partial q(k\mid x_n)} = w_n\,\psi_n(k),

    the first variation of :math:`S` in the mass of datum :math:`n`. It is exact to first order in that mass,
    1/``match_size``. Continuous latents may depend on the state, in the model and in the guide.

    In the guide every site with ``has_enumerate_support`` is enumerated; ``infer={"enumerate": "parallel"}`` and
    ``config_enumerate`` are honoured, ``"sequential"`` is refused. Model and guide must broadcast over dimensions left
    of ``max_plate_nesting``, as in Pyro. ``AutoImplicit`` does, and marks its discrete sites by itself. Vectors of switches
    need :class:`~pyro_sinkhorn.distributions.Finite` in a guide by hand.

    :param args: as of :class:`~pyro_sinkhorn.Trace_Sinkhorn`
    :param max_states: joint states of the discrete latents of one datum at most; the model runs on all of them
    :param options: as of :class:`~pyro_sinkhorn.Trace_Sinkhorn`
    :raises ProgramError: more joint states than that, discrete globals, or states that are shared between plates, naming
        the sites

    References: Patrini et al. 2019, *Sinkhorn AutoEncoders*; Feydy et al. 2019, *Interpolating between optimal transport
    and MMD using Sinkhorn divergences* (the first variation); Obermeyer et al. 2019, *Tensor variable elimination for
    plated factor graphs* (parallel enumeration).

    >>> import pyro, pyro.distributions as dist, torch
    >>> from pyro.infer import SVI
    >>> from pyro_sinkhorn import AutoImplicit
    >>> locs = torch.tensor([-2.0, 0.0, 2.0])
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         k = pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.3, 0.2])))
    ...         pyro.sample("x", dist.Normal(locs[k], 0.5), obs=x)
    >>> guide = AutoImplicit(model)
    >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss=TraceEnum_Sinkhorn(prior_weight=1.0))
    >>> isinstance(svi.step(torch.randn(128)), float)
    True
    >>> guide(torch.randn(5))["k"].shape
    torch.Size([5])
    """

    def __init__(self, *args: Any, max_states: int = 1024, **options: Any) -> None:
        if max_states < 1:
            raise ValueError(f"max_states is {max_states}: expected at least 1")
        super().__init__(*args, **options)
        self.max_states = max_states

    def config(self) -> dict[str, Any]:
        """Arguments that make an equal loss."""
        return super().config() | {"max_states": self.max_states}

    def _defaults(self) -> dict[str, Any]:
        inherited = inspect.signature(Trace_Sinkhorn).parameters
        return {name: p.default for name, p in inherited.items()} | super()._defaults()

    def _get_traces(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Iterator[tuple[Trace, Trace]]:
        if self.max_plate_nesting == float("inf"):
            self._guess_max_plate_nesting(model, guide, args, kwargs)
        if self.vectorize_particles:
            guide, model = self._vectorized_num_particles(guide), self._vectorized_num_particles(model)
        enumerated = EnumMessenger(first_available_dim=-1 - self.max_plate_nesting)(config_enumerate(guide))
        for _ in range(1 if self.vectorize_particles else self.num_particles):
            bounded = _Bounded(self.max_states)
            try:
                traces = self._get_trace(model, bounded(enumerated), args, kwargs)
            except (IndexError, RuntimeError, ValueError) as error:
                if isinstance(error, (ProgramError, NonFiniteError)) or not bounded.seen:
                    raise
                raise ProgramError(
                    _not_broadcast(bounded.seen, int(self.max_plate_nesting), error)
                ) from error
            yield traces

    def _enumeration(self, guide: Trace, scored: Trace, structure: Structure) -> Enumeration | None:
        enumeration = read_enumeration(guide, scored, int(self.max_plate_nesting))
        if not enumeration.sites:
            return None
        check_enumeration(enumeration, structure)
        enumeration.draw()
        return enumeration


def _not_broadcast(seen: list[tuple[str, int, frozenset[str]]], nesting: int, error: Exception) -> str:
    said = ", ".join(f"{name!r} ({size} states)" for name, size, _ in seen)
    return (
        f"model or guide failed while it ran on all states of {said} at once: {str(error).strip()}. Every one of these sites "
        f"has a dimension of its own for its states, left of the {nesting} of the plates, and whatever depends on it has it "
        "too. Write the program so that it takes further dimensions on the left: layers that do not, such as BatchNorm and "
        "Conv2d, want them flattened into one (h.reshape(-1, *h.shape[-k:])) and restored afterwards"
    )


class _Bounded(Messenger):
    """Refuses a guide that enumerates too many joint states, before the model runs on them."""

    def __init__(self, max_states: int) -> None:
        super().__init__()
        self.max_states = max_states
        self.seen: list[tuple[str, int, frozenset[str]]] = []

    def _pyro_sample(self, msg: Any) -> None:
        if msg["infer"].get("enumerate") == "sequential" and not msg["is_observed"]:
            raise ProgramError(
                f"guide site {msg['name']!r} asks to be enumerated sequentially: this loss lays all states out in parallel. "
                "Mark it infer={'enumerate': 'parallel'}, or leave the mark out"
            )

    def _pyro_post_sample(self, msg: Any) -> None:
        dim = msg["infer"].get("_enumerate_dim")
        if dim is None or msg["is_observed"] or any(name == msg["name"] for name, _, _ in self.seen):
            return
        size = msg["value"].shape[dim - msg["fn"].event_dim]
        plates = frozenset(frame.name for frame in msg["cond_indep_stack"] if frame.vectorized)
        self.seen.append((msg["name"], size, plates))
        for names, count in joint_counts(self.seen):
            if count > self.max_states:
                sizes = {name: size for name, size, _ in self.seen}
                said = " x ".join(f"{name} ({sizes[name]})" for name in names)
                raise ProgramError(
                    f"the discrete latents {said} have {count} joint states, more than max_states={self.max_states}: the model "
                    f"would run on all of them. Raise it with TraceEnum_Sinkhorn(max_states={count}), or let the latents "
                    "have fewer states"
                )
