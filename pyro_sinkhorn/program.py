"""A model with its guide, its loss and its fitted state."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, Predictive
from pyro.optim.lr_scheduler import PyroLRScheduler
from pyro.optim.optim import PyroOptim
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_sinkhorn import snapshot, state
from pyro_sinkhorn.diagnostics.matching import MatchReport, match_report
from pyro_sinkhorn.errors import NonFiniteError, ProgramError
from pyro_sinkhorn.guide.auto_implicit import AutoImplicit
from pyro_sinkhorn.losses.trace_sinkhorn import Trace_Sinkhorn
from pyro_sinkhorn.modules import OwnedModules, find_modules, shared_copy
from pyro_sinkhorn.rng import RandomStream
from pyro_sinkhorn.runs import run_model
from pyro_sinkhorn.structure import is_latent, sample_sites, structure_of
from pyro_sinkhorn.training import DataScale, History, Minibatches, as_tensor, step


class SinkhornProgram:
    """A Pyro model together with the guide, the loss and the state that belong to it.

    The program owns copies of the modules that the model refers to (``program.modules``), a parameter store and a
    random stream: two programs in one process share nothing, even when made from one function, and the modules in the
    user's hands keep the weights they had. It is still callable as the model.

    :param model: a Pyro program, function or module, with an observed site in a plate
    :param guide: a guide; default ``AutoImplicit(model)``. A module is copied; the class ``AutoImplicit``, or a
        ``functools.partial`` of it, is called with the model
    :param loss: default ``Trace_Sinkhorn()``
    :param encoder: for the default guide, see :class:`~pyro_sinkhorn.AutoImplicit`
    :raises ProgramError: where these do not fit together

    >>> import pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Dirichlet(torch.ones(3)))
    ...         pyro.sample("x", dist.Normal(z, 0.1).to_event(1), obs=x)
    >>> program = SinkhornProgram(model)
    >>> x = dist.Dirichlet(torch.ones(3)).sample((200,))
    >>> program.fit(x, num_steps=3, batch_size=128, seed=0, progress=False)
    SinkhornProgram(model, AutoImplicit, Trace_Sinkhorn, 3 steps)
    >>> program.encode(x)["z"].shape
    torch.Size([1, 200, 3])
    >>> program.generate(5, x[:1])["x"].shape
    torch.Size([5, 1, 3])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Any = None,
        loss: ELBO | None = None,
        *,
        encoder: nn.Module | None = None,
    ) -> None:
        if isinstance(model, SinkhornProgram):
            model = model.model
        if not callable(model):
            raise ProgramError(f"the model is a {type(model).__name__}: expected a callable Pyro program")
        if encoder is not None and guide is not None:
            raise ProgramError("give either a guide or an encoder for the default guide, not both")
        self.model = model
        self._guide_given = functools.partial(AutoImplicit, encoder=encoder) if guide is None else guide
        self._loss_given = Trace_Sinkhorn() if loss is None else loss
        functools.update_wrapper(self, model, updated=())
        self.reset()

    def reset(self) -> SinkhornProgram:
        """Back to the state before any ``fit``: modules copied anew from the user's, parameters and history gone."""
        guide = self._guide_given
        if _is_factory(guide):
            guide = guide(self.model)
        self.guide: Any = shared_copy(guide, self.model) if isinstance(guide, nn.Module) else guide
        given = self._loss_given
        self.loss: Any = given.fresh() if isinstance(given, Trace_Sinkhorn) else copy.deepcopy(given)
        found = find_modules(self.model)
        if not isinstance(self.guide, nn.Module):
            known = {id(module) for module in found.values()}
            found |= {f"guide.{n}": m for n, m in find_modules(self.guide).items() if id(m) not in known}
        self._owned = OwnedModules(found)
        self.store: dict[str, Any] = {"params": {}, "constraints": {}}
        self.optim: PyroOptim | None = None
        self.pending_optim: dict[str, Any] = {}
        self.stream: RandomStream | None = None
        self.history = History()
        self.order: Tensor | None = None
        self.num_steps = 0
        self.device: torch.device | None = None
        self._depth = 0
        return self

    @property
    def modules(self) -> dict[str, nn.Module]:
        """This program's own copies of the modules that the model refers to, trained weights included."""
        return self._owned.copies

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model, with this program's parameters."""
        with self.active():
            return self.model(*args, **kwargs)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make this program's modules and parameter store the current ones inside."""
        self._depth += 1
        try:
            if self._depth > 1:
                yield
                return
            with self._owned.lent(), pyro.get_param_store().scope(self.store) as store:
                try:
                    yield
                finally:
                    # scope() saves only on a clean exit: a fit that ends in an error keeps what it learned.
                    store.update(pyro.get_param_store().get_state())
        finally:
            self._depth -= 1

    def fit(
        self,
        *args: Any,
        num_steps: int = 2000,
        batch_size: int | None = 256,
        lr: float = 1e-3,
        optim: PyroOptim | None = None,
        seed: int | None = None,
        device: torch.device | str | None = None,
        progress: bool = True,
        **kwargs: Any,
    ) -> SinkhornProgram:
        """Minimise the loss on minibatches of the model's arguments; a second call continues.

        :param args: arguments of the model, arrays or tensors; those as long as the first one are cut into minibatches
        :param num_steps: optimiser steps
        :param batch_size: data a step; None passes everything, as models that sub-sample by themselves need
        :param lr: learning rate of the default optimiser, Adam
        :param optim: a Pyro optimiser instead; schedulers are stepped every step
        :param seed: seed of the program's random stream; by default it continues, or at first follows torch's
        :param device: move modules and data there
        :param progress: show a bar with the per-datum loss, reconstruction and match
        :returns: the program
        :raises ProgramError: model, guide and data do not fit together
        :raises NonFiniteError: NaN or infinity; the program keeps the state of the last good step
        """
        if device is not None:
            self.to(device)
        if seed is not None or self.stream is None:
            self.stream = RandomStream(seed)
        self._choose_optim(optim, lr)
        args, kwargs = self._inputs(args, kwargs)
        batches = Minibatches(args, kwargs, batch_size, self.order)
        with self.stream.active(), self.active():
            model = self._scaled(batches)
            with tqdm(total=num_steps, disable=not progress, desc=self._name(), unit="step") as bar:
                for _ in range(num_steps):
                    batch_args, batch_kwargs = batches.draw()
                    self.order = batches.order
                    try:
                        step(self.loss, model, self.guide, self.optim, batch_args, batch_kwargs)
                    except NonFiniteError as error:
                        raise NonFiniteError(
                            f"step {self.num_steps}: {error}. The program keeps the state of the step before"
                        ) from error
                    if isinstance(self.optim, PyroLRScheduler):
                        self.optim.step()
                    self.num_steps += 1
                    self._record(bar)
        return self

    def encode(self, *args: Any, num_samples: int = 1, seed: int | None = None, **kwargs: Any) -> dict[str, Tensor]:
        """Latents that the guide makes of data: ``{site: (num_samples, *plates, *event)}``, Predictive's shapes.

        These are draws of the encoder, which matching the prior does not make a posterior.
        """
        if num_samples < 1:
            raise ProgramError(f"num_samples is {num_samples}: expected at least 1")
        args, kwargs = self._inputs(args, kwargs)
        draws: list[dict[str, Tensor]] = []
        with self._evaluating(seed):
            for _ in range(num_samples):
                trace = poutine.trace(self.guide).get_trace(*args, **kwargs)
                draws.append({name: s["value"] for name, s in sample_sites(trace) if is_latent(s)})
        return {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}

    def generate(self, num_samples: int, *args: Any, seed: int | None = None, **kwargs: Any) -> dict[str, Tensor]:
        """Draws from the program with its learned parameters: ``{site: (num_samples, *plates, *event)}``.

        The arguments give plate sizes and covariates; observed sites are sampled like all others.
        """
        args, kwargs = self._inputs(args, kwargs)
        with self._evaluating(seed):
            predictive = Predictive(poutine.uncondition(self.model), num_samples=num_samples)
            return dict(predictive(*args, **kwargs))

    def diagnose(self, *args: Any, num_floor: int = 20, seed: int | None = None, **kwargs: Any) -> MatchReport:
        """Print and return a table: reconstruction, match of each group against its noise floor, encoder variance."""
        args, kwargs = self._inputs(args, kwargs)
        with self._evaluating(seed):
            report = match_report(self.model, self.guide, *args, loss=self.loss, num_floor=num_floor, **kwargs)
        print(report)
        return report

    def to(self, device: torch.device | str) -> SinkhornProgram:
        """Move modules, parameters and the data of later calls to a device."""
        self.device = torch.device(device)
        for module in self._all_modules():
            module.to(self.device)
        for parameter in self.store["params"].values():
            parameter.data = parameter.data.to(self.device)
        return self

    def clone(self) -> SinkhornProgram:
        """An independent program with equal state."""
        other = SinkhornProgram(self.model, self._guide_given, self._loss_given)
        if isinstance(self.guide, nn.Module):
            other.guide = shared_copy(self.guide, self.model)
        snapshot.restore(other, state.detached(snapshot.take(self)))
        return other

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything learned to a file of tensors and numbers, atomically; the model's code is not in it."""
        state.write(snapshot.take(self), path)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: Callable[..., Any],
        guide: Any = None,
        loss: ELBO | None = None,
        *,
        encoder: nn.Module | None = None,
        device: torch.device | str | None = None,
    ) -> SinkhornProgram:
        """Read a saved program back, given the code of its model; needs no data and no training step.

        :param guide: as given when the program was made, if it was
        :param loss: as given when the program was made; a ``Trace_Sinkhorn`` is made again from the file
        :raises ValueError: a damaged or foreign file, or modules that differ from the saved ones
        """
        saved = state.read(path)
        program = cls(model, guide, loss or snapshot.make_loss(saved), encoder=encoder)
        snapshot.restore(program, saved)
        return program if device is None else program.to(device)

    def __reduce__(self) -> Any:
        return snapshot.reduce(self)

    def __repr__(self) -> str:
        guide = getattr(self.guide, "__name__", type(self.guide).__name__)
        return f"SinkhornProgram({self._name()}, {guide}, {type(self.loss).__name__}, {self.num_steps} steps)"

    def _name(self) -> str:
        return getattr(self.model, "__name__", type(self.model).__name__)

    def _choose_optim(self, optim: PyroOptim | None, lr: float) -> None:
        if optim is not None:
            self.optim = copy.deepcopy(optim)
        elif self.optim is None:
            self.optim = pyro.optim.Adam({"lr": lr})
        if self.pending_optim and self.optim is not None:
            saved, self.pending_optim = self.pending_optim, {}
            if saved["class"] == snapshot.optim_class(self.optim):
                self.optim.set_state(saved["state"])
            elif optim is None:
                raise ProgramError(
                    f"the saved state continues a {saved['class']}, not the default Adam: pass one as optim="
                )

    def _all_modules(self) -> list[nn.Module]:
        return [*self._owned.copies.values(), *([self.guide] if isinstance(self.guide, nn.Module) else [])]

    def _inputs(self, args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (
            tuple(as_tensor(value, self.device) for value in args),
            {name: as_tensor(value, self.device) for name, value in kwargs.items()},
        )

    @contextmanager
    def _evaluating(self, seed: int | None) -> Iterator[None]:
        with ExitStack() as stack:
            if seed is not None:
                stack.enter_context(RandomStream(seed).active())
            # Before the modules are lent, so that the originals borrow the mode as well.
            stack.enter_context(_mode(self._all_modules(), training=False))
            stack.enter_context(self.active())
            stack.enter_context(torch.no_grad())
            yield

    def _scaled(self, batches: Minibatches) -> Callable[..., Any]:
        """The model, its data scaled up to the whole data set where globals make the scale matter."""
        with torch.random.fork_rng(devices=[]):  # a look at the model must not shift what follows
            structure = structure_of(run_model(self.model, *batches.at(torch.arange(batches.batch_size))))
        sub_sampled = [plate for plate in structure.data_plates if plate.size != plate.full_size]
        if batches.whole or not structure.globals:
            if sub_sampled and not batches.whole:
                plate = sub_sampled[0]
                raise ProgramError(
                    f"plate {plate.name!r} sub-samples {plate.size} of {plate.full_size} by itself: pass the whole "
                    "data with batch_size=None"
                )
            return self.model
        scale = DataScale({plate.name for plate in structure.data_plates}, batches.n / batches.batch_size)
        return scale(self.model)

    def _record(self, bar: Any) -> None:
        terms = getattr(self.loss, "terms", None)
        if terms is None:
            bar.update()
            return
        self.history.append(terms)
        bar.update()
        if self.num_steps % 10 == 0 or bar.n == bar.total:
            bar.set_postfix(
                loss=f"{terms.loss:.3f}",
                reconstruction=f"{terms.reconstruction:.3f}",
                match=f"{sum(terms.match.values()):.4f}",
                refresh=False,
            )


def sinkhorn_infer(model: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Make a :class:`SinkhornProgram` of a model in place; adds nothing to the class.

    :param options: arguments of :class:`SinkhornProgram`

    >>> import pyro.distributions as dist
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


def _is_factory(guide: Any) -> bool:
    function = guide.func if isinstance(guide, functools.partial) else guide
    return isinstance(function, type) and issubclass(function, nn.Module)


@contextmanager
def _mode(modules: list[nn.Module], training: bool) -> Iterator[None]:
    """Train or eval mode inside, every submodule's own mode restored after."""
    before = {module: module.training for root in modules for module in root.modules()}
    for root in modules:
        root.train(training)
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode
