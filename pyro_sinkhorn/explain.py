"""What went wrong inside a program, said with the name of the site, what it was given and what to do.

Pyro and torch report an empty plate as a division by zero and a diverged decoder as an invalid parameter of an unnamed
distribution. Here such errors are caught around every run of a model or guide and traced to their cause: causes
before effects, data before latents before networks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pyro.poutine.trace_messenger import TraceMessenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_sinkhorn.errors import NonFiniteError, ProgramError
from pyro_sinkhorn.structure import innermost, sample_sites

Path = tuple[Any, ...]


class Recorder(TraceMessenger):
    """Traces a run, and knows the sample statement that is being executed.

    One handler does both, and looks at the type of a message itself: every handler is asked twice at every statement, of
    which ``pyro.module`` makes one a parameter.

    :param keep: whether to trace
    """

    message: Any = None

    def __init__(self, keep: bool = True) -> None:
        super().__init__()
        self.keep = keep

    def _process_message(self, msg: Any) -> None:
        if msg["type"] == "sample":
            self.message = msg

    def _postprocess_message(self, msg: Any) -> None:
        kind = msg["type"]
        if self.keep and kind == "sample":
            self._pyro_post_sample(msg)
        elif self.keep and kind == "param":
            self._pyro_post_param(msg)
        if kind == "sample":
            self.message = None


@contextmanager
def explained(
    owner: str, args: tuple[Any, ...], kwargs: dict[str, Any], recorder: Recorder | None = None
) -> Iterator[Recorder]:
    """Trace a program, and say of an error inside it where it came from and what to do; what is not understood passes
    unchanged.

    :param owner: ``"model"`` or ``"guide"``
    :param recorder: of what runs; by default a new one
    """
    with Recorder() if recorder is None else recorder as active:
        try:
            yield active
        except (ZeroDivisionError, RuntimeError, ValueError) as error:
            reason = _explain(owner, error, active.message, active.trace, args, kwargs)
            if reason is None:
                raise
            raise reason from error


def _explain(
    owner: str, error: Exception, current: Any, trace: Trace, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Exception | None:
    text = str(error).partition("\n")[0]
    sites = {name: site["value"] for name, site in sample_sites(trace)}
    if isinstance(error, ZeroDivisionError):
        if "size cannot be zero" not in text:
            return None
        shapes = ", ".join(f"{spoken(path)} {tuple(value.shape)}" for path, value in tensors_of(args, kwargs))
        return ProgramError(f"a plate of the {owner} has size 0: the batch is empty. Shapes given: {shapes}")
    if isinstance(error, NotImplementedError):
        if current is None or current["is_observed"]:
            return None
        name, kind = current["name"], type(innermost(current["fn"])).__name__
        return ProgramError(
            f"latent site {name!r}: its {kind} cannot be sampled{f' ({text})' if text else ''}. A prior needs no density, but "
            "its sample() must work"
        )
    if isinstance(error, RuntimeError) and "device" in text:
        places = {spoken(path): value.device for path, value in tensors_of(args, kwargs)}
        places |= {
            f"site {name!r}": value.device for name, value in sites.items() if isinstance(value, Tensor)
        }
        where = ", ".join(f"{name} on {device}" for name, device in places.items())
        return ProgramError(
            f"the {owner} mixes devices ({text}). It has seen {where}: move data, modules and constants to one device, "
            "for example with x.to(device) and decoder.to(device)"
        )
    if isinstance(error, ValueError) and text.startswith("Expected parameter"):
        is_nan = "nan" in str(error) or "Real()" in text
        return _explain_parameter(owner, text, is_nan, sites, _not_finite(trace), args, kwargs)
    return None


def _not_finite(trace: Trace) -> list[str]:
    """Names of the parameters, of networks too, that are NaN or infinite."""
    params = {name: node["value"] for name, node in trace.nodes.items() if node["type"] == "param"}
    return [name for name, value in params.items() if not bool(value.isfinite().all())]


def _explain_parameter(
    owner: str,
    text: str,
    is_nan: bool,
    sites: dict[str, Any],
    bad: list[str],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Exception:
    """A distribution refused its parameters: because of the data, of a latent, or of the network in between?"""
    what = text.replace(", but found invalid values:", "").replace("Expected parameter", "parameter")
    what = what.replace(" to satisfy the constraint ", " does not satisfy ")
    for path, value in tensors_of(args, kwargs):
        if not bool(value.isfinite().all()):
            return NonFiniteError(
                f"{spoken(path)} of the {owner}: {bad_rows(value)}; remove or mask them ({what})"
            )
    for name, value in sites.items():
        if isinstance(value, Tensor) and not bool(value.isfinite().all()):
            return NonFiniteError(
                f"site {name!r} of the {owner}: {bad_rows(value)}; the network that makes them (for a latent, the encoder) "
                f"has diverged ({what})"
            )
    after = f"after its sites {list(sites)}" if sites else "before its first site"
    if is_nan and bad:
        return NonFiniteError(
            f"the {owner} made NaN {after}, of finite arguments and latents: {len(bad)} of the parameters it read are NaN or "
            f"infinite, the first is {bad[0]!r}; a network such as the decoder that holds it has diverged ({what})"
        )
    if is_nan:
        return NonFiniteError(
            f"the {owner} made NaN {after}, of finite arguments and latents: the network that makes this parameter, mostly "
            f"the decoder, has diverged or divides by zero ({what})"
        )
    return ProgramError(f"the {owner} made a distribution {after} that is not valid: {what}")


def bad_rows(value: Tensor) -> str:
    """Where a tensor is not finite, in words."""
    bad = ~value.isfinite()
    rows = bad.reshape(len(bad), -1).any(-1) if bad.dim() else bad.reshape(1)
    return (
        f"the values of shape {tuple(value.shape)} are NaN or infinite in {int(rows.sum())} rows "
        f"(first: {int(rows.nonzero()[0])})"
    )


def spoken(path: Path) -> str:
    """The name of an argument in an error: ``argument 0``, ``argument 'x'``, ``argument 0['x']``."""
    return f"argument {path[0]!r}" + "".join(f"[{key!r}]" for key in path[1:])


def tensors_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Path, Tensor]]:
    """Tensors among the arguments of a program with their paths, one level of containers deep."""
    for key, value in [*enumerate(args), *kwargs.items()]:
        if isinstance(value, Tensor):
            yield (key,), value
        elif isinstance(value, (tuple, list)):
            yield from (((key, i), v) for i, v in enumerate(value) if isinstance(v, Tensor))
        elif isinstance(value, dict):
            yield from (((key, k), v) for k, v in value.items() if isinstance(v, Tensor))
