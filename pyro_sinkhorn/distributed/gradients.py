r"""Parameters that stay equal on all ranks: brought together once, and moved by the same gradient ever after.

With data :math:`x_r` on rank :math:`r` the loss of all is :math:`L = \sum_r L_r`, of which the gradient of rank :math:`r` holds
what its own rows contribute. The sum over ranks, taken in one buffer a dtype, is the gradient of the whole batch in one
process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from pyro_sinkhorn.distributed.group import Ranks, running
from pyro_sinkhorn.errors import ProgramError


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace every gradient by its sum over ranks, in a loop of one's own around ``differentiable_loss``.

    ``SVI.step`` and ``fit`` do it by themselves. Alone, nothing happens.

    :param parameters: the same on all ranks, in one order
    :raises ProgramError: they differ in number or shape

    >>> p = torch.ones(2, requires_grad=True)
    >>> p.sum().backward()
    >>> sum_gradients([p])
    >>> p.grad
    tensor([1., 1.])
    """
    if not running():
        return
    named = {f"parameter {i}": p for i, p in enumerate(parameters)}
    ranks = Ranks()
    check_layout(ranks, layout(named))
    add_up(ranks, named)


def add_up(ranks: Ranks, parameters: Mapping[str, Tensor]) -> None:
    """The sum over ranks in place of every gradient; one that no rank has stays away."""
    for dtype in dict.fromkeys(p.dtype for p in parameters.values()):
        group = [p for p in parameters.values() if p.dtype == dtype]
        device = group[0].device
        present = torch.tensor([p.grad is not None for p in group], dtype=dtype, device=device)
        held = [torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in group]
        flat = torch.cat([present, *(one.detach().reshape(-1).to(device) for one in held)])
        flat = ranks.summed(flat, "adding up gradients")
        counts, *sums = flat.split([len(group), *(p.numel() for p in group)])
        for p, count, total in zip(group, counts.tolist(), sums, strict=True):
            p.grad = total.view(p.shape).to(p.device) if count else None


@torch.no_grad()
def take_first(ranks: Ranks, tensors: Mapping[str, Tensor]) -> None:
    """Give tensors the values that they have on rank 0."""
    for dtype in dict.fromkeys(t.dtype for t in tensors.values()):
        group = [t for t in tensors.values() if t.dtype == dtype and t.numel()]
        if not group:
            continue
        device = group[0].device
        flat = torch.cat([t.detach().reshape(-1).to(device) for t in group])
        flat = ranks.of_first(flat, "taking over the parameters of rank 0")
        for t, value in zip(group, flat.split([t.numel() for t in group]), strict=True):
            t.copy_(value.view(t.shape))


def layout(tensors: Mapping[str, Tensor]) -> list[str]:
    """What must be alike on all ranks, one line a tensor."""
    return [f"{name} {tuple(t.shape)} {t.dtype}" for name, t in tensors.items()]


def check_layout(ranks: Ranks, lines: list[str]) -> None:
    """All ranks must hold the same.

    :raises ProgramError: on every rank, naming the first line that differs
    """
    digest = hashlib.sha256("\n".join(lines).encode()).digest()
    own = torch.tensor([int.from_bytes(digest[:7], "big"), len(lines)])
    if all(torch.equal(own, other) for other in ranks.gathered(own, "comparing parameters")):
        return
    found = ranks.objects(lines, "comparing parameters")
    first, other = next((i, one) for i, one in enumerate(found) if one != found[0])
    mine, theirs = set(found[0]), set(other)
    only = [
        f"only rank {number} has {sorted(lines)[0]!r}"
        for number, lines in ((0, mine - theirs), (first, theirs - mine))
        if lines
    ]
    said = "; ".join(only) or f"rank {first} has them in another order"
    raise ProgramError(
        f"the ranks train different programs, rank 0 with {len(found[0])} tensors and rank {first} with {len(other)}: {said}. "
        "Model, guide and loss must be the same on all ranks"
    )
