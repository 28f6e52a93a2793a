"""Draws of a guide and of a program, in the shapes of :class:`pyro.infer.Predictive`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import Predictive
from pyro.poutine.trace_struct import Trace
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from torch import Tensor

from pyro_sinkhorn.errors import NonFiniteError, ProgramError, checked_integer
from pyro_sinkhorn.explain import bad_rows, explained, spoken, tensors_of
from pyro_sinkhorn.losses.scoring import run_guide
from pyro_sinkhorn.structure import is_data, is_latent, sample_sites


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


def program_draws(model: Callable[..., Any], num_samples: Any, args: Any, kwargs: Any) -> dict[str, Tensor]:
    """All sites by name, ``(num_samples, *plates, *event)``, observed ones sampled like the others."""
    num_samples = checked_integer("num_samples", num_samples, 1)
    unconditioned = poutine.block(_FreeData()(model), hide_fn=_is_factor)
    with explained("model", Trace(), args, kwargs):
        return dict(Predictive(unconditioned, num_samples=num_samples)(*args, **kwargs))


class _FreeData(UnconditionMessenger):
    """As ``poutine.uncondition``, which would also draw ``pyro.deterministic`` sites again, in every slice of their plates."""

    def _pyro_sample(self, msg: Any) -> None:
        if is_data(msg):
            super()._pyro_sample(msg)


def _latents(trace: Trace) -> dict[str, Tensor]:
    sites = dict(sample_sites(trace))
    plates = [frame.dim for site in sites.values() for frame in site["cond_indep_stack"] if frame.vectorized]
    nesting = -min(plates, default=0)
    latents = {name: site for name, site in sites.items() if is_latent(site)}
    return {
        # A site outside of plates gets their dimensions, of size 1, so that it broadcasts with sites inside.
        name: site["value"].reshape((1,) * (nesting - len(site["fn"].batch_shape)) + site["value"].shape)
        for name, site in latents.items()
    }


def _is_factor(msg: Any) -> bool:
    return msg["type"] == "sample" and isinstance(msg["fn"], dist.Unit)
