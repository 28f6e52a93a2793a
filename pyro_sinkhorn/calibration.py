"""Training of a posterior guide on simulated data sets, the program being fixed."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_sinkhorn.averaging import Average, Keeper
from pyro_sinkhorn.errors import NonFiniteError, ProgramError, checked_integer, is_number
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
    program_steps: steps that the program had been fitted for: what the guide is the posterior of
    given:        whether the guide is one of the user's
    """

    guide: Any
    loss: Trace_EnergyScore
    energy: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    num_steps: int = 0
    num_simulations: int = 0
    program_steps: int = 0
    given: bool = False

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

    """
    if guide is not None:
        return made_guide(guide, model)
    own = getattr(fitted, "encoder", None) if isinstance(fitted, AutoImplicit) else None
    made = AutoPosterior(model, copy.deepcopy(own))
    if isinstance(fitted, AutoImplicit) and own is None:
        made.start_from(fitted)
    return made


def calibration_for(before: Calibration | None, guide: Any, loss: Any, program: Any) -> Calibration:
    """What a call of ``calibrate`` goes on with: the calibration before, or one of a guide that was given.

    :param loss: as given; None for that of before, the program's own, or a new one
    :raises ProgramError: the loss or the guide is none that can be calibrated with
    """
    if loss is not None and not isinstance(loss, Trace_EnergyScore):
        raise ProgramError(
            f"the loss of a calibration is {loss!r}: expected an instance of Trace_EnergyScore, which scores draws on "
            "simulated pairs"
        )
    own = isinstance(program.loss, Trace_EnergyScore)
    if guide is not None or before is None:
        shared = own and guide is None
        made = program.guide if shared else posterior_guide_for(guide, program.model, program.guide)
        _check_trainable(made)
        # Its units are those of the guide that it scores: another guide may be scored in other coordinates.
        loss_of_own = (
            program.loss if shared else program.loss.fresh() if own else Trace_EnergyScore(wake=False)
        )
        before = Calibration(made, loss_of_own, given=guide is not None)
    # A loss given may belong to others, too.
    return before if loss is None else dataclasses.replace(before, loss=loss.fresh())


def _check_trainable(guide: Any) -> None:
    if not isinstance(guide, nn.Module):
        raise ProgramError(
            f"the posterior guide is a {type(guide).__name__}: expected a module, such as a PyroModule, whose parameters can "
            "be trained; fit() with Trace_EnergyScore trains guides of any kind"
        )


@contextmanager
def undone_on_error(program: Any, before: Calibration | None) -> Iterator[None]:
    """A calibration that failed before its first step leaves none behind; later its guide is that of the program now."""
    calibration, done = program.calibration, program.calibration.num_steps
    try:
        yield
    except BaseException:
        if not calibration.num_steps:
            program.calibration = before
        raise
    finally:
        if calibration.num_steps > done:
            calibration.program_steps = program.num_steps


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
    fixed: Iterable[nn.Module],
    progress: bool,
) -> None:
    """Train the guide of a calibration; the best state on held-out simulations is kept where there are any.

    The arguments are those of :meth:`pyro_sinkhorn.SinkhornProgram.calibrate`.

    :param fixed: modules of the program, which a guide may hold too but must not train
    :raises NonFiniteError: a score or gradient is NaN or infinite; the guide keeps the last good state
    """
    num_rounds = checked_integer("num_rounds", num_rounds, 1)
    num_steps = checked_integer("num_steps", num_steps, num_rounds)
    if num_simulations is not None:
        num_simulations = checked_integer("num_simulations", num_simulations, 2 * num_rounds)
    if not (is_number(prior_share) and 0 < prior_share <= 1):
        raise ProgramError(f"prior_share is {prior_share!r}: expected a number above 0 and at most 1")
    if not (is_number(lr) and lr > 0):
        raise ProgramError(f"lr is {lr!r}: expected a positive number")
    if num_rounds > 1 and sizes is not None:
        raise ProgramError("num_rounds looks at one data set, sizes= at many: give one of the two")
    simulations = Simulations(model, calibration.loss, args, kwargs, num_simulations, sizes)
    guide = calibration.guide
    held = {id(parameter) for module in fixed for parameter in module.parameters()}
    with tqdm(total=num_steps, disable=not progress, desc="calibrate", unit="step") as bar:
        for i in range(num_rounds):
            if i:
                simulations.focus(guide, prior_share)
            simulations.prepare(share=1 / num_rounds)
            steps = num_steps * (i + 1) // num_rounds - num_steps * i // num_rounds
            _round(model, calibration, simulations, steps, lr, held, bar)
    calibration.num_simulations += simulations.drawn


def _round(
    model: Any,
    calibration: Calibration,
    simulations: Simulations,
    num_steps: int,
    lr: float,
    fixed: set[int],
    bar: Any,
) -> None:
    """Steps on one set of simulations, the learning rate rising shortly and then falling to 0 along a cosine."""
    guide, loss = calibration.guide, calibration.loss
    chunks = simulations.steps()
    first = next(chunks)
    with torch.no_grad():
        guide(*first.args, **first.kwargs)
    parameters = [p for p in guide.parameters() if p.requires_grad and id(p) not in fixed]
    if not parameters:
        raise ProgramError(
            f"the posterior guide, a {type(guide).__name__}, has no parameters besides those of the program: nothing to train"
        )
    optim = torch.optim.Adam(parameters, lr=lr)
    warm_up = min(200, num_steps // 10 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optim,
        lambda i: min((i + 1) / warm_up, 1.0) * 0.5 * (1 + math.cos(math.pi * min(i / num_steps, 1.0))),
    )
    keeper = Keeper(guide, Average(parameters))
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


def state_of(calibration: Calibration, fitted: Any, loss: Any) -> dict[str, Any]:
    """What a calibration has learned, as tensors and numbers.

    :param fitted: the guide of the program, which a calibration may share
    :param loss: of the program, likewise
    """
    guide = calibration.guide
    shared = guide is fitted
    options: dict[str, Any] | None = dict(guide.options) if type(guide) is AutoPosterior else None
    if options and (callable(options["covariates"]) or (calibration.given and guide.encoder is not None)):
        options = None
    return {
        "guide": {} if shared else dict(guide.state_dict()),
        "shared": shared,
        "class": type(guide).__name__,
        "options": options,
        "given": calibration.given,
        "shares_loss": calibration.loss is loss,
        "config": calibration.loss.config(),
        "loss": calibration.loss.state(),
        "energy": torch.tensor(calibration.energy, dtype=torch.float64),
        "held_out": torch.tensor(calibration.held_out, dtype=torch.float64).reshape(-1, 2),
        "num_steps": calibration.num_steps,
        "num_simulations": calibration.num_simulations,
        "program_steps": calibration.program_steps,
    }


def copied(calibration: Calibration, guide: Any, loss: Trace_EnergyScore) -> Calibration:
    """One that goes on by itself with another guide and loss."""
    energy, held_out = list(calibration.energy), list(calibration.held_out)
    return dataclasses.replace(calibration, guide=guide, loss=loss, energy=energy, held_out=held_out)


def restored(saved: dict[str, Any], model: Callable[..., Any], fitted: Any, loss: Any) -> Calibration:
    """The inverse of :func:`state_of`.

    :raises ValueError: the posterior guide was one of the user's, which only its code can make
    """
    if not saved["shared"] and saved["options"] is None:
        raise ValueError(
            f"the program was calibrated with a guide of its own, a {saved['class']} made by the user's code: "
            "calibrate again after loading, or keep the guide as the guide of a program with Trace_EnergyScore"
        )
    like = (
        functools.partial(AutoPosterior, **saved["options"]) if saved["given"] and saved["options"] else None
    )
    guide = fitted if saved["shared"] else posterior_guide_for(like, model, fitted)
    if not saved["shared"]:
        guide.load_state_dict(saved["guide"])
    mine = loss if saved["shares_loss"] else Trace_EnergyScore(**saved["config"])
    if mine is not loss:
        mine.load_state(saved["loss"])
    held_out = [(int(step), score) for step, score in saved["held_out"].tolist()]
    return Calibration(
        guide,
        mine,
        saved["energy"].tolist(),
        held_out,
        saved["num_steps"],
        saved["num_simulations"],
        saved["program_steps"],
        saved["given"],
    )
