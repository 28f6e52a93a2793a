"""Draws of a guide and of a program, in the shapes of :class:`pyro.infer.Predictive`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import Predictive
from pyro.poutine.trace_struct import Trace
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from torch import Tensor

from pyro_sinkhorn.errors import NonFiniteError, ProgramError, checked_integer
from pyro_sinkhorn.explain import Recorder, bad_rows, explained, spoken, tensors_of
from pyro_sinkhorn.guide.lazy import LazyGuide
from pyro_sinkhorn.losses.side_by_side import DRAWS_OF_GUIDE, ROWS_AT_ONCE, draws_in_plate, vectorises
from pyro_sinkhorn.runs import run_model
from pyro_sinkhorn.scoring import run_guide
from pyro_sinkhorn.structure import is_data, is_latent, nesting_of, plates_of, sample_sites, structure_of


def encoder_draws(guide: Callable[..., Any], num_samples: Any, args: Any, kwargs: Any) -> dict[str, Tensor]:
    """Latents by name, ``(num_samples, *plates, *event)``, noise left out."""
    num_samples = checked_integer("num_samples", num_samples, 1)
    draws = [_latents(run_guide(guide, args, kwargs)) for _ in range(num_samples)]
    if not draws[0]:
        raise ProgramError(
            "the guide samples no latents, so there is nothing to encode. A program fitted by Trace_DataSinkhorn compares "
            "data and infers no latents; generate() simulates from it"
        )
    stacked = {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}
    for name, value in stacked.items():
        if not bool(value.isfinite().all()):
            sources = [(spoken(path), given) for path, given in tensors_of(args, kwargs)]
            bad = [
                f"{path}: {bad_rows(given)}" for path, given in sources if not bool(given.isfinite().all())
            ]
            raise NonFiniteError(
                f"latent site {name!r}: the guide produced NaN or infinite values (shape {tuple(value.shape)}). "
                + (
                    f"They come from {'; '.join(bad)}"
                    if bad
                    else "Its arguments are finite: the encoder diverged"
                )
            )
    return stacked


def as_matrix(model: Callable[..., Any], draws: dict[str, Tensor], args: Any, kwargs: Any) -> np.ndarray:
    """The first draw of every local latent, a row for each slice of its outermost plate, side by side."""
    trace = run_model(model, args, kwargs)
    structure = structure_of(trace)
    columns = []
    for name, value in draws.items():
        if name not in structure.locals:
            continue
        site = trace.nodes[name]
        outermost = plates_of(site)[0]
        rows = value[0].movedim(outermost.dim - site["fn"].event_dim, 0)
        columns.append(rows.reshape(len(rows), -1))
    if not columns or len({len(part) for part in columns}) > 1:
        sizes = {name: tuple(value.shape[1:]) for name, value in draws.items()}
        raise ProgramError(
            f"the latents {sizes} make no matrix with a row a datum: "
            + ("none of them lies in a data plate" if not columns else "they lie in plates of unlike sizes")
            + ". Take them from encode()"
        )
    return torch.cat([part.to(torch.get_default_dtype()) for part in columns], -1).cpu().numpy()


def posterior_draws(
    model: Callable[..., Any], guide: Any, num_samples: Any, args: Any, kwargs: Any
) -> dict[str, Tensor]:
    """As :func:`encoder_draws`; many at once, where model and guide allow it."""
    num_samples = checked_integer("num_samples", num_samples, 1)
    if not isinstance(guide, LazyGuide):
        return encoder_draws(guide, num_samples, args, kwargs)
    encoder_draws(guide, 1, args, kwargs)  # errors are said here
    seen = run_model(model, args, kwargs)
    nesting = nesting_of(seen)
    structure = structure_of(seen)
    if not (draws_in_plate(structure) or vectorises(model, args, kwargs, {}, nesting)):
        return encoder_draws(guide, num_samples, args, kwargs)
    rows = math.prod(plate.size for plate in structure.data_plates)
    parts, left = [], num_samples
    while left > 0:
        size = min(left, max(ROWS_AT_ONCE // max(rows, 1), 1))
        with pyro.plate(DRAWS_OF_GUIDE, size, dim=-(nesting + 1)):
            trace = run_guide(guide, args, kwargs)
        parts.append(_latents(trace, size))
        left -= size
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def program_draws(
    model: Callable[..., Any],
    num_samples: Any,
    args: Any,
    kwargs: Any,
    given: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """All sites by name, ``(num_samples, *plates, *event)``, observed ones sampled like the others.

    :param given: draws of some latents, which are then used and left out of the result
    """
    num_samples = checked_integer("num_samples", num_samples, 1)
    unconditioned = poutine.block(_FreeData()(model), hide_fn=_is_factor)
    with explained("model", args, kwargs, Recorder(keep=False)):
        return dict(Predictive(unconditioned, given, num_samples=num_samples)(*args, **kwargs))


class _FreeData(UnconditionMessenger):
    """As ``poutine.uncondition``, which would also draw ``pyro.deterministic`` sites again, in every slice of their plates."""

    def _pyro_sample(self, msg: Any) -> None:
        if is_data(msg):
            super()._pyro_sample(msg)


def _latents(trace: Trace, num: int | None = None) -> dict[str, Tensor]:
    """Values of latents, padded to one number of batch dimensions.

    :param num: size of a plate of draws, which then comes first
    """
    sites = dict(sample_sites(trace))
    frames = [frame for site in sites.values() for frame in site["cond_indep_stack"] if frame.vectorized]
    nesting = -min((frame.dim for frame in frames if frame.name != DRAWS_OF_GUIDE), default=0)
    latents = {name: site for name, site in sites.items() if is_latent(site)}
    if num is not None:
        found = {}
        for name, site in latents.items():
            value, event = site["value"], tuple(site["fn"].event_shape)
            batch = value.shape[1 : value.dim() - len(event)]
            # Of the model's dimensions those stay that the guide's plates take.
            found[name] = value.reshape(num, *batch[len(batch) - nesting :], *event)
        return found
    return {
        # A site outside of plates gets their dimensions, of size 1, so that it broadcasts with sites inside.
        name: site["value"].reshape((1,) * (nesting - len(site["fn"].batch_shape)) + site["value"].shape)
        for name, site in latents.items()
    }


def _is_factor(msg: Any) -> bool:
    return msg["type"] == "sample" and isinstance(msg["fn"], dist.Unit)
