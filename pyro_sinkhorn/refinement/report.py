"""What refinement did, as a record and as a table."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockReport:
    """One block of latents that moved together, after adaptation unless said otherwise.

    name:        its sites
    plates:      names of the plates whose slices accept their own moves; empty where a chain moves as one
    acceptance:  mean acceptance probability, one number for each slice of the plates
    step_size:   in units of the draws' spread, one for each slice
    unmoved:     share of chains, over slices, in which no move was ever accepted, adaptation included
    memory:      correlation over chains between the state when adaptation ended and the last one, mean over coordinates: 1
                 means nothing was forgotten. None with fewer than 10 chains
    shift:       root mean square over coordinates of (mean of the last - mean of the first state) in standard deviations
                 of the last. About sqrt(2 / chains) is noise. None with fewer than 10 chains
    spread:      geometric mean over coordinates of the last standard deviation over the first. None as above
    """

    name: str
    plates: tuple[str, ...]
    acceptance: Tensor
    step_size: Tensor
    unmoved: float
    memory: float | None
    shift: float | None
    spread: float | None


@dataclass(frozen=True)
class Refined:
    """What :func:`refine` returns; prints as a table.

    draws:      refined draws, ``{site: (num_samples, *plates, *event)}``, shaped like those given
    kernel:     "mala", "hmc" or "nuts"
    blocks:     how each block of latents moved
    num_steps:  steps of every chain; for "nuts", warm-up steps of every run
    num_chains: chains side by side; for "nuts", runs one after the other
    gradient_evaluations: runs of the model with its gradient. One run serves all chains where ``parallel``
    parallel:   whether chains ran as one, in an outer plate
    restarted:  starts of zero density or on a support's boundary, which were replaced by other draws of the same data
    divergences: of "nuts"
    failed:     gradient evaluations that torch gave up for a singular matrix; all chains then stay where they are
    seconds:    wall clock
    """

    draws: dict[str, Tensor]
    kernel: str
    blocks: tuple[BlockReport, ...]
    num_steps: int
    num_chains: int
    gradient_evaluations: int
    parallel: bool
    restarted: int
    divergences: int
    failed: int
    seconds: float

    @property
    def acceptance(self) -> float:
        """Mean acceptance probability over blocks and slices."""
        return float(torch.stack([block.acceptance.mean() for block in self.blocks]).mean())

    def __str__(self) -> str:
        chains = f"{self.num_chains} chain{'s' if self.num_chains > 1 else ''} of {self.num_steps} steps"
        if self.kernel == "nuts":
            chains = f"{self.num_chains} run{'s' if self.num_chains > 1 else ''}, warmed up for {self.num_steps} steps"
        width = max([8, *(len(block.name) for block in self.blocks)])
        lines = [
            f"{self.kernel}, {chains}, {self.gradient_evaluations} gradient evaluations"
            + ("" if self.parallel else " of one chain each")
            + f", {self.seconds:.1f} s",
            f"{'latents':<{width}} {'accepted by':>14} {'rate':>6} {'min':>6} {'unmoved':>8} {'memory':>7} {'shift':>6} "
            f"{'spread':>7}",
        ]
        for block in self.blocks:
            by = ", ".join(block.plates) or "chain"
            lines.append(
                f"{block.name:<{width}} {by:>14} {float(block.acceptance.mean()):>6.2f} {float(block.acceptance.min()):>6.2f} "
                f"{block.unmoved:>8.1%} {_number(block.memory):>7} {_number(block.shift):>6} {_number(block.spread):>7}"
            )
        lines += [f"{'':<{width}} {note}" for note in self.notes()]
        return "\n".join(lines)

    def notes(self) -> list[str]:
        """What a reader should conclude."""
        notes = []
        if self.restarted:
            notes.append(f"{self.restarted} draws of zero density were replaced by others of the same data")
        if self.divergences:
            notes.append(
                f"{self.divergences} divergent transitions: the posterior is not explored everywhere"
            )
        if self.failed:
            notes.append(
                f"{self.failed} gradient evaluations met a singular matrix, and all chains stayed where they were"
            )
        for block in self.blocks:
            if block.memory is not None and block.memory > 0.5:
                notes.append(
                    f"{block.name}: chains remember where they were (correlation {block.memory:.2f}), and with it the errors "
                    "of their starts; more steps, or kernel='hmc'"
                )
            if block.unmoved > 0.01:
                notes.append(
                    f"{block.name}: {block.unmoved:.1%} of chains never moved and are the guide's draws still"
                )
        return notes


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
