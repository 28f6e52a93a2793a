"""Training of a posterior guide on simulated data sets, the program being fixed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_sinkhorn.errors import NonFiniteError, ProgramError, checked_integer
from pyro_sinkhorn.guide.auto_implicit import AutoImplicit
from pyro_sinkhorn.guide.auto_posterior import AutoPosterior
from pyro_sinkhorn.losses.trace_energy_score import Trace_EnergyScore
from pyro_sinkhorn.modules import made_guide
from pyro_sinkhorn.rng import undisturbed
from pyro_sinkhorn.simulations import Chunk, Simulations


@dataclass
class Calibration:
    """A posterior guide and how its training went.

    guide:        the guide
    loss:         what scores it
    energy:       energy score of every step, 1 being that of the prior
    held_out:     ``(step, score)`` on simulations that were kept out, where their number was fixed
    num_steps:    steps so far
    num_simulations: data simulated so far, data sets where there are globals
    """

    guide: Any
    loss: Trace_EnergyScore
    energy: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    num_steps: int = 0
    num_simulations: int = 0

    def __repr__(self) -> str:
        if not self.energy:
            return "Calibration(no steps)"
        last = self.energy[-max(len(self.energy) // 20, 1) :]
        return (
            f"Calibration({self.num_steps} steps, {self.num_simulations} simulations, energy score "
            f"{sum(last) / len(last):.4f} of the prior's)"
        )


def posterior_guide_for(guide: Any, model: Callable[..., Any], fitted: Any) -> Any:
    """The posterior guide given, or made of the class or partial given, or the default one.

    :param fitted: the guide of ``fit``, whose encoder the default one starts from

    :raises ProgramError: it has nothing to train
    """
    if guide is not None:
        made = made_guide(guide, model)
        if not isinstance(made, nn.Module):
            raise ProgramError(
                f"the posterior guide is a {type(made).__name__}: expected a module, such as a PyroModule, whose "
                "parameters can be trained"
            )
        return made
    own = getattr(fitted, "encoder", None) if isinstance(fitted, AutoImplicit) else None
    made = AutoPosterior(model, copy.deepcopy(own))
    if isinstance(fitted, AutoImplicit) and own is None:
        made.start_from(fitted)
    return made


@contextmanager
def undone_on_error(program: Any, before: Calibration | None) -> Iterator[None]:
    """A calibration that failed before its first step leaves none behind."""
    try:
        yield
    except BaseException:
        if program.calibration is not None and not program.calibration.num_steps:
            program.calibration = before
        raise


def calibrate(
    model: Callable[..., Any],
    calibration: Calibration,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    num_steps: int,
    lr: float,
    num_simulations: int | None,
    num_rounds: int,
    prior_share: float,
    sizes: tuple[int, int] | None,
    progress: bool,
) -> None:
    """Train the guide of a calibration; the best state on held-out simulations is kept where there are any.

    The arguments are those of :meth:`pyro_sinkhorn.SinkhornProgram.calibrate`.

    :raises NonFiniteError: a score or gradient is NaN or infinite; the guide keeps the last good state
    """
    num_steps = checked_integer("num_steps", num_steps, 1)
    num_rounds = checked_integer("num_rounds", num_rounds, 1)
    if num_simulations is not None:
        num_simulations = checked_integer("num_simulations", num_simulations, 2)
    simulations = Simulations(model, calibration.loss, args, kwargs, num_simulations, sizes)
    guide = calibration.guide
    with tqdm(total=num_steps, disable=not progress, desc="calibrate", unit="step") as bar:
        for i in range(num_rounds):
            if i:
                simulations.focus(guide, prior_share)
            simulations.prepare(share=1 / num_rounds)
            steps = num_steps * (i + 1) // num_rounds - num_steps * i // num_rounds
            _round(model, calibration, simulations, steps, lr, bar)
    calibration.num_simulations += simulations.drawn


def _round(
    model: Any,
    calibration: Calibration,
    simulations: Simulations,
    num_steps: int,
    lr: float,
    bar: Any,
) -> None:
    """Steps on one set of simulations, the learning rate rising shortly and then falling to 0 along a cosine."""
    guide, loss = calibration.guide, calibration.loss
    chunks = simulations.steps()
    first = next(chunks)
    with torch.no_grad():
        guide(*first.args, **first.kwargs)
    parameters = [p for p in guide.parameters() if p.requires_grad]
    optim = torch.optim.Adam(parameters, lr=lr)
    warm_up = min(200, num_steps // 10 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optim,
        lambda i: min((i + 1) / warm_up, 1.0) * 0.5 * (1 + math.cos(math.pi * min(i / num_steps, 1.0))),
    )
    keeper = _Keeper(guide, _Average(parameters))
    every = max(num_steps // 20, 1)
    for i in range(num_steps):
        chunk = first if i == 0 else next(chunks)
        value = _step(loss, model, guide, chunk, parameters, optim, calibration.num_steps)
        schedule.step()
        keeper.average.update(i)
        calibration.energy.append(value)
        calibration.num_steps += 1
        bar.update()
        if i % 10 == 9 or i == num_steps - 1:
            bar.set_postfix(energy=f"{value:.4g}", refresh=False)
        if simulations.held_out and (i % every == every - 1 or i == num_steps - 1):
            with keeper.average.lent():
                scores = _held_out_scores(loss, model, guide, simulations.held_out)
                keeper.offer(scores)
            calibration.held_out.append((calibration.num_steps, float(scores.mean())))
    keeper.settle()


def _step(
    loss: Trace_EnergyScore,
    model: Any,
    guide: nn.Module,
    chunk: Chunk,
    parameters: list[Tensor],
    optim: torch.optim.Optimizer,
    number: int,
) -> float:
    optim.zero_grad()
    try:
        scores = loss.sleep(model, guide, chunk.args, chunk.kwargs, chunk.pairs)
        value = torch.stack(list(scores.values())).mean()
        value.backward()
        # Heavy-tailed simulations make a rare huge gradient, which would undo many steps.
        norm = nn.utils.clip_grad_norm_(parameters, 5.0)
        if not bool(norm.isfinite()):
            raise NonFiniteError(
                "the gradient of the posterior guide is NaN or infinite though its score is finite"
            )
    except NonFiniteError as error:
        raise NonFiniteError(
            f"calibration step {number}: {error}. The guide keeps the state of the step before"
        ) from error
    optim.step()
    return float(value.detach())


@torch.no_grad()
def _held_out_scores(loss: Trace_EnergyScore, model: Any, guide: Any, chunks: list[Chunk]) -> Tensor:
    """Score of every held-out chunk, with the same noise each time so that differences are the guide's."""
    scores = []
    with undisturbed():
        torch.manual_seed(0)
        for chunk in chunks[:40]:
            found = loss.sleep(model, guide, chunk.args, chunk.kwargs, chunk.pairs)
            scores.append(torch.stack(list(found.values())).mean().double().cpu())
    return torch.stack(scores)


class _Average:
    """Running average of the last thousand states, which is less noisy than any of them (Polyak and Juditsky 1992)."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self.parameters = parameters
        self.values = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        keep = min(0.999, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, [p.detach() for p in self.parameters], 1 - keep)

    @contextmanager
    def lent(self) -> Iterator[None]:
        """The guide has the averages inside."""
        own = [p.detach().clone() for p in self.parameters]
        self._give(self.values)
        try:
            yield
        finally:
            self._give(own)

    @torch.no_grad()
    def _give(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)


class _Keeper:
    """The state to end with: the average at the end, or an earlier one that was clearly better on what was held out.

    Held-out scores are flat and noisy near the end; the best of them is often not the best state. So an earlier one wins only
    where its score is better by two standard errors of the difference: where few simulations were learned by heart.
    """

    def __init__(self, guide: nn.Module, average: _Average) -> None:
        self.guide, self.average = guide, average
        self.best: Tensor | None = None
        self.last: Tensor | None = None
        self.state: dict[str, Any] | None = None

    def offer(self, scores: Tensor) -> None:
        self.last = scores
        if self.best is None or scores.mean() < self.best.mean():
            self.best, self.state = scores, copy.deepcopy(self.guide.state_dict())

    def settle(self) -> None:
        self.average._give(self.average.values)
        if self.state is None or self.best is None or self.last is None:
            return
        worse = self.last - self.best
        error = float(worse.std()) / math.sqrt(len(worse)) if len(worse) > 1 else math.inf
        if float(worse.mean()) > 2 * error:
            self.guide.load_state_dict(self.state)


def state_of(calibration: Calibration, fitted: Any) -> dict[str, Any]:
    """What a calibration has learned, as tensors and numbers.

    :param fitted: the guide of the program, which a calibration may share
    """
    shared = calibration.guide is fitted
    return {
        "guide": {} if shared else dict(calibration.guide.state_dict()),
        "shared": shared,
        "class": type(calibration.guide).__name__,
        "config": calibration.loss.config(),
        "loss": calibration.loss.state(),
        "energy": torch.tensor(calibration.energy, dtype=torch.float64),
        "held_out": torch.tensor(calibration.held_out, dtype=torch.float64).reshape(-1, 2),
        "num_steps": calibration.num_steps,
        "num_simulations": calibration.num_simulations,
    }


def restored(saved: dict[str, Any], model: Callable[..., Any], fitted: Any, loss: Any) -> Calibration:
    """The inverse of :func:`state_of`.

    :raises ValueError: the posterior guide was one of the user's, which only its code can make
    """
    if not saved["shared"] and saved["class"] != AutoPosterior.__name__:
        raise ValueError(
            f"the program was calibrated with a guide of its own, a {saved['class']}: calibrate again after loading, or keep "
            "the guide as the guide of a program with Trace_EnergyScore"
        )
    guide = fitted if saved["shared"] else posterior_guide_for(None, model, fitted)
    if not saved["shared"]:
        guide.load_state_dict(saved["guide"])
    mine = loss if isinstance(loss, Trace_EnergyScore) else Trace_EnergyScore(**saved["config"])
    if mine is not loss:
        mine.load_state(saved["loss"])
    held_out = [(int(step), score) for step, score in saved["held_out"].tolist()]
    return Calibration(
        guide, mine, saved["energy"].tolist(), held_out, saved["num_steps"], saved["num_simulations"]
    )
