"""Auxiliary runs of a model: hidden from every handler outside, stopped early, leaving no mark on module buffers.

Pyro programs are only known by running them. The guide runs one to learn plate sizes, the losses run one to draw
the prior cloud; both stop after the last latent, so that the decoder does not run.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import transform_to
from torch.nn.modules.module import register_module_forward_pre_hook

from pyro_sinkhorn.errors import ProgramError
from pyro_sinkhorn.explain import Recorder, explained
from pyro_sinkhorn.structure import innermost, is_data, is_latent, parameters_of, sample_sites

#: Runs of a model whose prior draws numbers that are none.
_ATTEMPTS = 3


class _Stop(Exception):
    """Raised after the last site of interest to leave the model."""


class _Auxiliary(Recorder):
    """All that makes a run an auxiliary one: hidden from handlers outside, with given values, stopped early.

    :param values: for sample sites and plates' sub-samples. What has no law to draw from gets a feasible value
    :param stop_after: sites after the last of which :class:`_Stop` is raised; none for a run to the end
    """

    def __init__(self, values: dict[str, Tensor], stop_after: Iterable[str]) -> None:
        super().__init__()
        self.values = values
        self.remaining = set(stop_after)

    def _process_message(self, msg: Any) -> None:
        msg["stop"] = True
        if msg["type"] != "sample":
            return
        self.message = msg
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"] = self.values[msg["name"]]
            msg["done"] = True
        elif msg["value"] is None and isinstance(innermost(msg["fn"]), dist.ImproperUniform):
            # For a global; of a local latent with such a prior, structure_of complains.
            to_support = transform_to(msg["fn"].support)
            shape = to_support.inverse_shape(msg["fn"].batch_shape + msg["fn"].event_shape)
            msg["value"] = to_support(torch.zeros(shape))
            msg["done"] = True

    def _postprocess_message(self, msg: Any) -> None:
        super()._postprocess_message(msg)
        if msg["type"] == "sample" and msg["name"] in self.remaining:
            self.remaining.discard(msg["name"])
            if not self.remaining:
                raise _Stop


class Resample(Messenger):
    """Draw observed data sites, keeping what was observed; factors and ``pyro.deterministic`` stay as they are."""

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] or isinstance(msg["fn"], _Subsample) or not is_data(msg):
            return
        msg["infer"] = {**msg["infer"], "was_observed": True, "obs": msg["value"]}
        msg["is_observed"], msg["value"], msg["done"] = False, None, False


@contextmanager
def before_every_module(act: Callable[[torch.nn.Module, Any], None]) -> Iterator[None]:
    """Call a function before the forward of every module inside; compiled networks run uncompiled meanwhile.

    torch.compile would trace the function as a part of the network.
    """
    hook = register_module_forward_pre_hook(act)
    try:
        with ExitStack() as stack:
            if "torch._dynamo" in sys.modules:  # otherwise nothing is compiled, and set_stance would load it
                stack.enter_context(torch.compiler.set_stance("force_eager"))
                # A warning that the function is called twice for a compiled network; none of ours minds.
                stack.enter_context(warnings.catch_warnings())
                warnings.filterwarnings("ignore", message=r"Using `torch.compile\(module\)` when there are")
            yield
    finally:
        hook.remove()


@contextmanager
def preserved_buffers() -> Iterator[None]:
    """Let modules change their buffers (BatchNorm statistics) inside, and put the old ones back on leaving.

    Buffers are swapped for copies when a module first runs, not copied back afterwards: graphs built meanwhile
    keep what they saw.
    """
    originals: dict[torch.nn.Module, dict[str, Tensor | None]] = {}

    def swap(module: torch.nn.Module, _args: Any) -> None:
        if module._buffers and module not in originals:
            originals[module] = dict(module._buffers)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.clone()

    try:
        with before_every_module(swap):
            yield
    finally:
        for module, buffers in originals.items():
            module._buffers.update(buffers)


def run_model(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    values: dict[str, Tensor] | None = None,
    stop_after: Iterable[str] = (),
    grad: bool = False,
) -> Trace:
    """Trace the model out of sight of outer handlers.

    :param values: values for some sample sites and sub-samples
    :param stop_after: leave the model once all these sites were sampled; empty means run to its end. Where one of them
        drew NaN or infinity, the model is run again, twice at most, with a warning: some samplers do so in single
        precision, now and then
    :param grad: whether to keep gradients
    """
    names, values = set(stop_after), values or {}
    for attempt in range(_ATTEMPTS):
        trace = _run_once(model, args, kwargs, values, names, grad)
        drawn = [trace.nodes[name] for name in names - set(values) if name in trace.nodes]
        drawn = [site for site in drawn if not site["is_observed"]]
        bad = [site for site in drawn if not bool(site["value"].isfinite().all()) and _is_sound(site["fn"])]
        if not bad or attempt == _ATTEMPTS - 1:
            break
        _warn_of_redraw(bad[0])
    return trace


#: Priors that were warned of.
_WARNED: set[tuple[str, str]] = set()


def _is_sound(fn: Any) -> bool:
    """Whether the parameters are numbers: what comes of others is no accident."""
    return all(bool(parameter.isfinite().all()) for parameter, _ in parameters_of(fn))


def _warn_of_redraw(site: Any) -> None:
    """Say once of every prior that it draws numbers that are none."""
    name, kind = site["name"], f"{type(innermost(site['fn'])).__name__} in {site['value'].dtype}"
    if (name, kind) in _WARNED:
        return
    _WARNED.add((name, kind))
    warnings.warn(
        f"the prior of {name!r}, a {kind}, drew NaN or infinite values and was drawn again. Some samplers do so in single "
        "precision, now and then; double precision avoids it. This is said once",
        UserWarning,
        stacklevel=3,
    )


def _run_once(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    values: dict[str, Tensor],
    names: set[str],
    grad: bool,
) -> Trace:
    recorder = _Auxiliary(values, names)
    with (
        preserved_buffers(),
        torch.set_grad_enabled(grad and torch.is_grad_enabled()),
        explained("model", args, kwargs, recorder),
        suppress(_Stop),
    ):
        model(*args, **kwargs)
    return recorder.trace


def check_appeared(trace: Trace, names: Iterable[str], known: Iterable[str] = ()) -> None:
    """Latents found in one run must appear in every other, and no others.

    :param known: latents that may appear besides
    :raises ProgramError: naming those that came or went
    """
    names = list(names)
    missing = [name for name in names if name not in trace.nodes]
    new = [name for name, site in sample_sites(trace) if is_latent(site) and name not in {*names, *known}]
    if missing or new:
        what = f"latent sites {missing} did not appear" if missing else f"latent sites {new} were new"
        raise ProgramError(
            f"{what} when the model ran again with free latents: the sites of a model must not depend on its latents or on "
            "how often it ran, since clouds of different latents cannot be compared. Sample all of them always, and choose "
            "with torch.where. A site that is observed for some rows only takes obs= and obs_mask="
        )
    observed = [name for name in names if trace.nodes[name]["is_observed"]]
    if observed:
        raise ProgramError(
            f"sites {observed} were latent in an earlier call and are observed in this one. Data that are there for some rows "
            f"only are said in one call, by pyro.sample({observed[0]!r}, ..., obs=values, obs_mask=present); a guide written "
            "by hand may also sample the site in some calls only"
        )


def subsamples(trace: Trace) -> dict[str, Tensor]:
    """Indices that every plate of a trace drew, by plate name."""
    return {
        name: site["value"]
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and isinstance(site["fn"], _Subsample)
    }
