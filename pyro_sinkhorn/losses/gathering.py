r"""Gather: rows of latents or data, of which every process holds some, become the rows of all processes.

The second of the three steps *clouds*, *gather*, *match*. A process lays out its own slices; here they are put one behind the
other, in the order of the ranks, as one process would have laid out the concatenated data. Weights, units and halves are
made of the rows of all, so nothing after this step knows of processes.

Every rank then makes the same match :math:`S` of the same rows. Rows of others are constants, so that the gradient of rank
:math:`r` is

.. math:: \sum_{i \in r} \frac{\partial S}{\partial x_i} \frac{\partial x_i}{\partial\theta},

and the sum over ranks is the gradient of :math:`S`: nothing is sent on the way back. Shards of unlike length are padded.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_sinkhorn.distributed import SharedStep, active
from pyro_sinkhorn.errors import ProgramError
from pyro_sinkhorn.losses.clouds import CloudStates
from pyro_sinkhorn.structure import Group


@dataclass(frozen=True)
class Rows:
    """Slices of a group before they become clouds.

    points:  of the clouds that are compared, each ``(particles, n, e)``
    weights: ``(n,)``, 0 where a slice is masked
    n_data:  what they stand for
    group:   whose outermost plate has as many slices as there are here
    beside:  columns ``(particles, n, c)`` that are appended to all clouds
    states:  of the first of the clouds
    ragged:  whether a mask hides some sites in slices that count
    """

    points: list[Tensor]
    weights: Tensor
    n_data: float
    group: Group
    beside: Tensor | None = None
    states: CloudStates | None = None
    ragged: bool = False

    def tensors(self) -> list[Tensor]:
        """All that has rows, rows first."""
        held = [points.transpose(0, 1) for points in self.points]
        held += [] if self.beside is None else [self.beside.transpose(0, 1)]
        if self.states is not None:
            held += [self.states.points.transpose(0, 1), self.states.probabilities.transpose(0, 1)]
        return [*held, self.weights.unsqueeze(-1)]

    def with_tensors(self, tensors: list[Tensor], n_data: float, group: Group, ragged: bool) -> Rows:
        """The same with other rows, laid out as :meth:`tensors` does."""
        *held, weights = tensors
        points, rest = held[: len(self.points)], held[len(self.points) :]
        beside = None if self.beside is None else rest.pop(0).transpose(0, 1)
        states = None if self.states is None else CloudStates(*(one.transpose(0, 1) for one in rest))
        return Rows(
            [one.transpose(0, 1) for one in points],
            weights.squeeze(-1),
            n_data,
            group,
            beside,
            states,
            ragged,
        )


def gather(rows: Sequence[Rows]) -> list[Rows]:
    """The rows of all processes; alone, those given.

    :raises ProgramError: on all ranks, where theirs do not fit together
    """
    ranks = active()
    if ranks is None or not rows:
        return list(rows)
    mine = [torch.cat([one.flatten(1) for one in part.tensors()], 1) for part in rows]
    shapes = _shapes_of_all(ranks, rows, mine)
    flat = torch.cat([one.flatten() for one in mine])
    lengths = [sum(n * width for n, width, *_ in shape) for shape in shapes]
    vectors = ranks.gathered_rows(flat, lengths, "gathering latents")
    parts = [
        vector.split([n * width for n, width, *_ in shape])
        for vector, shape in zip(vectors, shapes, strict=True)
    ]
    found = []
    for i, (part, own) in enumerate(zip(rows, mine, strict=True)):
        # Our own rows as they are, with their graph.
        tables = [own if r == ranks.rank else parts[r][i].view(-1, own.shape[1]) for r in range(ranks.size)]
        table = torch.cat(tables)
        kinds = part.tensors()
        columns = table.split([math.prod(one.shape[1:]) for one in kinds], 1)
        tensors = [
            one.reshape(-1, *kind.shape[1:]).to(kind.dtype) for one, kind in zip(columns, kinds, strict=True)
        ]
        outer, *inner = part.group.plates
        total = int(sum(shape[i][2] for shape in shapes))
        plates = (dataclasses.replace(outer, size=total, full_size=max(total, outer.full_size)), *inner)
        group = dataclasses.replace(part.group, plates=plates)
        n_data = float(sum(shape[i][4] for shape in shapes))
        found.append(part.with_tensors(tensors, n_data, group, any(shape[i][5] for shape in shapes)))
    return found


def _shapes_of_all(
    ranks: SharedStep, rows: Sequence[Rows], mine: list[Tensor]
) -> list[list[tuple[int, int, int, int, float, bool]]]:
    """Of every rank and group: rows, columns, slices of the outermost plate, rows in each, data, whether it is ragged."""
    own = torch.zeros(len(rows), 6, dtype=torch.float64)
    for i, (part, table) in enumerate(zip(rows, mine, strict=True)):
        outer, *inner = part.group.plates
        within = math.prod(plate.size for plate in inner)
        own[i] = torch.tensor([*table.shape, outer.size, within, part.n_data, part.ragged])
    found = ranks.gathered(own, "comparing the shapes of clouds")
    for i, part in enumerate(rows):
        columns, slices, inside = ([int(table[i, j]) for table in found] for j in (1, 2, 3))
        if len(set(columns)) > 1:
            raise ProgramError(
                f"group ({part.group.name}): the clouds of the ranks have {columns} columns: the programs, or what "
                "they take for covariates, differ"
            )
        if len(set(inside)) > 1:
            raise ProgramError(
                f"group ({part.group.name}): inside one slice of plate {part.group.plates[0].name!r} the ranks have {inside} "
                "rows. Only the outermost plate may be shared out between ranks, the others must be equally long"
            )
        if min(slices) < 2:
            raise ProgramError(
                f"group ({part.group.name}): the ranks have {slices} data: give every rank at least 2 a step"
            )
    return [
        [(int(a), int(b), int(c), int(d), e, bool(f)) for a, b, c, d, e, f in table.tolist()]
        for table in found
    ]
