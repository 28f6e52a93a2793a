"""Simulations for the steps of a calibration: fresh ones, or a fixed number of them, near the data where asked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_sinkhorn.errors import ProgramError, checked_integer
from pyro_sinkhorn.losses.pairs import Pairs, follows_rows
from pyro_sinkhorn.losses.trace_energy_score import Trace_EnergyScore
from pyro_sinkhorn.proposal import Proposal
from pyro_sinkhorn.scoring import run_guide
from pyro_sinkhorn.structure import Structure, nesting_of, plates_of
from pyro_sinkhorn.training import Minibatches

#: Rows simulated a step by a program without globals.
_ROWS = 128
#: Of a fixed number of simulations, the share that is kept out of training to choose the best state by.
_HELD_OUT = 0.1
#: Chunks that these are cut into, at least.
_HELD_CHUNKS = 10
#: Rows that priors are drawn for at once, at most, and the name that these go by among latents.
_PRIOR_ROWS, _ROW = 4096, "row of the data"
#: Draws of the guide that say where the posterior is.
_ANCHORS = 1000


@dataclass(frozen=True)
class Chunk:
    """Pairs simulated for some rows of the data, or data sets of all."""

    pairs: Pairs
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Simulations:
    """Pairs for the steps of a calibration.

    A program without globals whose data plate follows its arguments is simulated in rows: 128 a chunk, drawn from those
    of the data, so that all covariates come up. Any other is simulated as data sets, several a chunk.

    :param num: simulations in all, None for fresh ones at every step
    :param sizes: bounds of the number of rows of a data set; by default all rows of the data
    """

    def __init__(
        self,
        model: Callable[..., Any],
        loss: Trace_EnergyScore,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        num: int | None,
        sizes: tuple[int, int] | None,
    ) -> None:
        self.model, self.loss = model, loss
        self.batches = Minibatches(args, kwargs, None)
        self.seen, self.structure, _ = loss.simulator.look(model, args, kwargs)
        follows = bool(self.batches.n) and follows_rows(model, args, kwargs, self.batches.n)
        self.in_rows = follows and not self.structure.globals
        if sizes is not None:
            _check_sizes(sizes, self.structure, follows)
        self.sizes, self.num = sizes, num
        self.drawn = 0
        self.chunks: list[Chunk] = []
        self.held_out: list[Chunk] = []
        self.proposal: Proposal | None = None

    def simulate(self, num: int) -> Chunk:
        """A fresh chunk of so many rows or data sets."""
        given, weights = None, None
        if self.proposal is None:
            args, kwargs = self._arguments(num)
        else:
            values, weights = self.proposal.draw(num, self._prior)
            if self.in_rows:
                args, kwargs = self.batches.pick(values.pop(_ROW))
                weights = weights.unsqueeze(0)
            else:
                args, kwargs = self._arguments(num)
            given = {name: self._as_given(name, value) for name, value in values.items()}
        sets = 1 if self.in_rows else num
        pairs = self.loss.simulator(self.model, args, kwargs, sets, given)
        self.drawn += num
        return Chunk(dataclasses.replace(pairs, weights=weights), args, kwargs)

    def prepare(self, share: float) -> None:
        """Make this share of all simulations now, where their number is fixed."""
        if self.num is None:
            return
        number = max(round(share * self.num), 2)
        n_held = max(1, round(_HELD_OUT * number))
        # In several, however few they are: what differs between chunks tells how exact their mean is.
        self.held_out += self._chunks(n_held, max(math.ceil(n_held / _HELD_CHUNKS), 2))
        self.chunks += self._chunks(number - n_held, self._per_chunk())

    def steps(self) -> Iterator[Chunk]:
        """Chunks without end."""
        while True:
            if self.num is None:
                yield self.simulate(self._per_chunk())
                continue
            for i in torch.randperm(len(self.chunks)).tolist():
                yield self.chunks[i]

    @torch.no_grad()
    def focus(self, guide: Any, prior_share: float) -> None:
        """Simulate near the observed data from now on, by what the guide takes for their posterior.

        :raises ProgramError: latents that cannot be proposed
        """
        names = self._roots()
        if self.proposal is None:
            self.proposal = Proposal(names, prior_share, carried=(_ROW,) if self.in_rows else ())
        args, kwargs = self.batches.args, self.batches.kwargs
        rows = self.batches.n if self.in_rows else 1
        draws: dict[str, list[Tensor]] = {name: [] for name in names}
        for _ in range(max(-(-_ANCHORS // rows), 1)):
            drawn = run_guide(guide, args, kwargs)
            for name in names:
                draws[name].append(self._flat(name, drawn.nodes[name]["value"].unsqueeze(0)))
        anchors = {name: torch.cat(found) for name, found in draws.items()}
        keep = torch.randperm(len(anchors[names[0]]))[:_ANCHORS]
        self.proposal.update(
            {name: value[keep] for name, value in anchors.items()}, self._prior, self.seen.nodes
        )

    def _chunks(self, left: int, size: int) -> list[Chunk]:
        most = min(size, self._per_chunk())
        return [self.simulate(min(most, left - done)) for done in range(0, left, most)]

    def _per_chunk(self) -> int:
        return _ROWS if self.in_rows else self.loss.number_of_data_sets(self.structure)

    def _arguments(self, num: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        n = self.batches.n
        if self.in_rows:
            return self.batches.pick(torch.randint(n, (num,)))
        if self.sizes is not None:
            low, high = self.sizes
            size = int(torch.randint(low, high + 1, ()))
            return self.batches.pick(torch.randperm(n)[:size] if size <= n else torch.randint(n, (size,)))
        return self.batches.args, self.batches.kwargs

    # Latents that may be proposed, flat: one row a datum, or a data set.

    def _roots(self) -> tuple[str, ...]:
        if self.structure.globals:
            return self.structure.globals
        group = self.structure.groups[0]
        for name in group.sites if self.in_rows else ():
            inner = [p.name for p in plates_of(self.seen.nodes[name]) if p not in group.plates]
            if inner or len(group.plates) > 1:
                plates = [p.name for p in plates_of(self.seen.nodes[name])]
                raise ProgramError(
                    f"latent site {name!r} lies in the plates {plates}: simulations near the data are drawn for latents of one "
                    "data plate, or globals; use num_rounds=1"
                )
        return group.sites

    def _prior(self, num: int) -> Mapping[str, Tensor]:
        names = self._roots()
        if not self.in_rows:
            args, kwargs = self._arguments(num)
            return dict(self.loss.simulator(self.model, args, kwargs, num, stop_after=names).values)
        # Each with the row that it was drawn for: its prior may depend on covariates.
        index = torch.randint(self.batches.n, (min(num, _PRIOR_ROWS),))
        sets = math.ceil(num / len(index))
        args, kwargs = self.batches.pick(index)
        pairs = self.loss.simulator(self.model, args, kwargs, sets, stop_after=names)
        return {name: self._flat(name, pairs.values[name]) for name in names} | {_ROW: index.repeat(sets)}

    def _flat(self, name: str, value: Tensor) -> Tensor:
        """``(P, *batch, *event)`` as rows ``(P * n, *event)``, or data sets ``(P, *batch, *event)``."""
        if not self.in_rows:
            return value
        event = tuple(self.seen.nodes[name]["fn"].event_shape)
        return value.reshape(-1, *event)

    def _as_given(self, name: str, value: Tensor) -> Tensor:
        if not self.in_rows:
            return value
        batch = [1] * nesting_of(self.seen)
        batch[self.structure.groups[0].plates[0].dim] = len(value)
        return value.reshape(1, *batch, *value.shape[1:])


def _check_sizes(sizes: tuple[int, int], structure: Structure, rows_follow: bool) -> None:
    if not (isinstance(sizes, tuple | list) and len(sizes) == 2):
        raise ProgramError(
            f"sizes is {sizes!r}: expected two integers, the smallest and the largest number of data in a data set"
        )
    low, high = sizes
    checked_integer("sizes[0]", low, 1)
    checked_integer("sizes[1]", high, low)
    if not structure.globals:
        raise ProgramError(
            "sizes= is for programs with globals, whose posterior depends on the number of data; here every datum stands by "
            "itself"
        )
    if not rows_follow:
        raise ProgramError(
            "sizes= needs a data plate as long as the data: write its size as that of the argument, pyro.plate('data', len(x))"
        )
