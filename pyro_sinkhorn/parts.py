"""The parts a program is made of: what may be given, and what stands in for what is not."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

from pyro.infer import ELBO
from torch import nn

from pyro_sinkhorn.errors import ProgramError
from pyro_sinkhorn.guide.auto_implicit import AutoImplicit
from pyro_sinkhorn.guide.lazy import LazyGuide
from pyro_sinkhorn.losses.base import SinkhornLoss
from pyro_sinkhorn.losses.trace_sinkhorn import Trace_Sinkhorn
from pyro_sinkhorn.modules import made_guide
from pyro_sinkhorn.rng import undisturbed
from pyro_sinkhorn.runs import run_model
from pyro_sinkhorn.structure import structure_of


def no_guide(*_args: Any, **_kwargs: Any) -> None:
    """The guide of a program that compares data only: it infers nothing."""


def checked_parts(
    model: Any, guide: Any, loss: Any, encoder: nn.Module | None
) -> tuple[Callable[..., Any], Any, Any]:
    """Model, guide (None for the loss's default) and loss, as a program keeps them.

    :raises ProgramError: one of them is something else
    """
    if encoder is not None and guide is not None:
        raise ProgramError("give either a guide or an encoder for the default guide, not both")
    loss = Trace_Sinkhorn() if loss is None else loss
    if isinstance(loss, type) or not hasattr(loss, "loss_and_grads"):
        raise ProgramError(f"the loss is {loss!r}: expected an instance of a loss, such as Trace_Sinkhorn()")
    if encoder is not None and not needs_guide(loss):
        raise ProgramError(
            f"{type(loss).__name__} compares data and infers no latents, so there is nothing to encode: leave encoder= out"
        )
    if encoder is not None:
        guide = functools.partial(getattr(loss, "default_guide", None) or AutoImplicit, encoder=encoder)
    for role, given in (("model", model), ("guide", no_guide if guide is None else guide)):
        if not callable(given) or isinstance(given, ELBO):  # which can be called, too
            raise ProgramError(f"the {role} is a {type(given).__name__}: expected a callable Pyro program")
    return model, guide, loss


def guide_for(guide: Any, loss: Any, model: Callable[..., Any]) -> Any:
    """The guide given, or made of the class or partial given, or the default one of the loss."""
    if guide is None:
        guide = getattr(loss, "default_guide", None) or AutoImplicit
        guide = guide if needs_guide(loss) else no_guide
    return made_guide(guide, model)


def settled_guide(
    guide: Any, given: Any, loss: Any, model: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    """The default guide where the data have shown the model: one for globals, if it has any and the loss wants another.

    :param guide: the program's guide now
    :param given: what the user gave for one
    """
    wanted = getattr(loss, "guide_of_globals", None)
    fresh = isinstance(guide, LazyGuide) and guide._structure is None and guide._pending_state is None
    if wanted is None or given is not None or not fresh or isinstance(guide, wanted):
        return guide
    with undisturbed():
        structure = structure_of(run_model(model, args, kwargs))
    return wanted(model) if structure.globals else guide


def saved_guide(guide: Any, given: Any, loss: Any, model: Callable[..., Any], name: str | None) -> Any:
    """The default guide of the class that a file names: that of :func:`settled_guide`, or the one there is."""
    wanted = getattr(loss, "guide_of_globals", None)
    if wanted is None or given is not None or name != wanted.__name__ or isinstance(guide, wanted):
        return guide
    return wanted(model)


def needs_guide(loss: Any) -> bool:
    """Whether a loss wants latents from a guide; one that is not ours does."""
    return not isinstance(loss, SinkhornLoss) or loss.needs_guide


def loss_for(loss: Any) -> Any:
    """A loss of the program's own, which has seen no other."""
    return loss.fresh() if isinstance(loss, SinkhornLoss) else copy.deepcopy(loss)
