"""The decorator that makes a program of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyro_sinkhorn.program import SinkhornProgram


def sinkhorn_infer(model: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Make a :class:`SinkhornProgram` of a model in place; adds nothing to the class.

    :param options: arguments of :class:`SinkhornProgram`

    >>> import pyro, pyro.distributions as dist
    >>> from pyro_sinkhorn import Trace_Sinkhorn
    >>> @sinkhorn_infer(loss=Trace_Sinkhorn(prior_weight=30.0))
    ... def program(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 0.1), obs=x)
    >>> program
    SinkhornProgram(program, AutoImplicit, Trace_Sinkhorn, 0 steps)
    """
    if model is None:
        return lambda function: SinkhornProgram(function, **options)
    return SinkhornProgram(model, **options)
