"""What a failed run must not leave behind, and what can be said of it that torch does not say."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from pyro_sinkhorn.errors import ProgramError
from pyro_sinkhorn.explain import spoken, tensors_of
from pyro_sinkhorn.modules import shared_copy


@contextmanager
def kept_on_error(modules: list[nn.Module]) -> Iterator[None]:
    """Buffers go back to what they were if an error leaves: one NaN spoils BatchNorm's statistics for good."""
    before = [
        (module, name, buffer, buffer.clone())
        for root in modules
        for module in root.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    except BaseException:
        for module, name, buffer, value in before:
            buffer.data.copy_(value)
            module._buffers[name] = buffer
        raise


@contextmanager
def explained_dtypes(
    modules: dict[str, nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[None]:
    """Say which arguments and modules do not go together, where torch names two dtypes and no owner."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if "dtype" not in text and "scalar type" not in text:
            raise
        given = [f"{spoken(path)} is {value.dtype}" for path, value in tensors_of(args, kwargs)]
        for name, module in modules.items():
            dtypes = sorted({str(p.dtype) for p in module.parameters()})
            given += [f"{name} is {' and '.join(dtypes)}"] if dtypes else []
        raise ProgramError(
            f"{text.splitlines()[0]}: {', '.join(given)}. Bring data and networks to one dtype, for example with "
            "x.float() or network.double()"
        ) from error


@contextmanager
def unmade_on_error(program: Any) -> Iterator[None]:
    """An automatic guide makes its networks at its first call; an error in that call leaves none behind.

    Otherwise networks for data of the wrong shape, or half of those that a file holds, would serve all later calls.

    :param program: a :class:`~pyro_sinkhorn.SinkhornProgram`
    :raises ProgramError: the guide of a file does not fit the model
    """
    if getattr(program.guide, "_structure", ...) is not None:
        yield
        return
    own = [module for root in program.modules.values() for module in root.modules()]
    guide = shared_copy(program.guide, program.model, *own)
    loss, steps = copy.deepcopy(program.loss), program.num_steps
    # Their names too: new networks would be taken for the old ones.
    store = {key: dict(values) for key, values in program.owned.store.items()}
    try:
        yield
    except BaseException as error:
        if program.num_steps == steps:
            program.guide, program.loss, program.owned.store = guide, loss, store
        if isinstance(error, RuntimeError) and "loading state_dict" in str(error):
            raise ProgramError(
                f"the saved guide does not fit this model, guide or encoder: {' '.join(str(error).split())}"
            ) from error
        raise
