"""Draws of a guide and of a program, in the shapes of :class:`pyro.infer.Predictive`."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import Predictive
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_sinkhorn.errors import ProgramError
from pyro_sinkhorn.losses.scoring import run_guide
from pyro_sinkhorn.structure import is_latent, sample_sites


def encoder_draws(guide: Callable[..., Any], num_samples: Any, args: Any, kwargs: Any) -> dict[str, Tensor]:
    """Latents by name, ``(num_samples, *plates, *event)``, noise left out."""
    _check_number(num_samples)
    draws = [_latents(run_guide(guide, args, kwargs)) for _ in range(num_samples)]
    return {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}


def program_draws(model: Callable[..., Any], num_samples: Any, args: Any, kwargs: Any) -> dict[str, Tensor]:
    """All sites by name, ``(num_samples, *plates, *event)``, observed ones sampled like the others."""
    _check_number(num_samples)
    unconditioned = poutine.block(poutine.uncondition(model), hide_fn=_is_factor)
    return dict(Predictive(unconditioned, num_samples=num_samples)(*args, **kwargs))


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


def _check_number(num_samples: Any) -> None:
    if not (isinstance(num_samples, numbers.Integral) and int(num_samples) >= 1):
        given = (
            f"a tensor of shape {tuple(num_samples.shape)}"
            if isinstance(num_samples, Tensor)
            else num_samples
        )
        raise ProgramError(f"num_samples is {given}: expected a positive integer")
