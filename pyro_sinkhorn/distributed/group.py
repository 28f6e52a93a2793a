"""The processes of a run: joining them, and what one says to the others.

Everything goes through ``torch.distributed``, whose errors say neither which process is meant nor what to do; here they are
turned into a :class:`~pyro_sinkhorn.errors.LostRankError` that does.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pyro_sinkhorn.errors import LostRankError, ProgramError

_ALONE: ContextVar[bool] = ContextVar("alone", default=False)
#: Evaluations that this process has shared with the others of its group.
_SHARED = itertools.count(1)


@contextmanager
def processes(timeout: float = 60.0, backend: str | None = None) -> Iterator[int]:
    """Join the other processes that ``torchrun`` started, and part from them at the end; alone, do nothing.

    Inside, ``fit`` and the losses that can be shared are shared by all processes, see docs/distributed.md.

    :param timeout: seconds after which a process that does not answer is given up; the longest that one waits for another
    :param backend: as of :func:`torch.distributed.init_process_group`; default gloo on CPUs, and NCCL besides on GPUs, of
        which every process takes the one of its ``LOCAL_RANK``
    :returns: a context that gives the rank of this process, 0 when alone
    :raises ProgramError: the environment is not that of ``torchrun``
    :raises LostRankError: the others do not come

    >>> with processes() as rank:
    ...     rank
    0
    """
    if not timeout > 0:
        raise ProgramError(f"timeout is {timeout}: expected a positive number of seconds")
    if dist.is_available() and dist.is_initialized():
        yield dist.get_rank()
        return
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ProgramError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']} but {missing} are not set: start the script with torchrun, which sets "
            "all of them"
        )
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if backend is None:
        backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    if "nccl" in backend:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % max(gpus, 1))
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    except (RuntimeError, dist.DistError) as error:
        raise LostRankError(
            f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} could not join the others at {os.environ['MASTER_ADDR']}"
            f":{os.environ['MASTER_PORT']} within {timeout:g} s ({_first_line(error)}): look whether all were started"
        ) from error
    global _SHARED
    _SHARED = itertools.count(1)
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


@contextmanager
def alone() -> Iterator[None]:
    """Work of this process alone, such as a diagnosis or a calibration on rank 0: nothing inside waits for the others.

    >>> with alone():
    ...     running()
    False
    """
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def running() -> bool:
    """Whether there are other processes to share work with."""
    return size() > 1 and not _ALONE.get()


def rank() -> int:
    """Rank of this process, 0 when alone."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this process is to write files and show progress: rank 0, or one that works alone.

    >>> is_first()
    True
    """
    return rank() == 0 or not running()


def next_evaluation() -> int:
    """Number of the evaluation that is about to be shared."""
    return next(_SHARED)


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class Ranks:
    """All processes, as one of them sees them. Whatever is called here, every process must call.

    :param when: said in errors: ``"at the start of fit"``
    """

    def __init__(self, when: str = "") -> None:
        self.rank, self.size, self.when = rank(), size(), when

    def gathered(self, tensor: Tensor, doing: str) -> list[Tensor]:
        """The tensors of all ranks, which must have one shape; without gradients.

        :param doing: what for, in an error
        """
        sent = _movable(tensor.detach())
        out = [torch.empty_like(sent) for _ in range(self.size)]
        with self._heard(doing):
            dist.all_gather(out, sent)
        return [one.to(tensor.device) for one in out]

    def gathered_rows(self, vector: Tensor, lengths: list[int], doing: str) -> list[Tensor]:
        """The vectors of all ranks, whose lengths may differ; without gradients.

        :param lengths: of all ranks
        """
        longest = max(lengths)
        padded = vector.detach()
        if len(vector) < longest:
            padded = torch.cat([padded, padded.new_zeros(longest - len(vector))])
        found = self.gathered(padded, doing)
        return [one[:length] for one, length in zip(found, lengths, strict=True)]

    def summed(self, tensor: Tensor, doing: str) -> Tensor:
        """The sum over ranks, the same to the bit on all; it may stand in the tensor given."""
        sent = _movable(tensor.detach())
        with self._heard(doing):
            dist.all_reduce(sent)
        return sent.to(tensor.device)

    def of_first(self, tensor: Tensor, doing: str) -> Tensor:
        """The tensor of rank 0, which has one shape on all."""
        sent = _movable(tensor.detach()).clone()
        with self._heard(doing):
            dist.broadcast(sent, 0)
        return sent.to(tensor.device)

    def agreed(self, value: Any, doing: str) -> Any:
        """Rank 0's value, whatever it is; tensors should be on the CPU."""
        held = [value if self.rank == 0 else None]
        with self._heard(doing):
            dist.broadcast_object_list(held, 0)
        return held[0]

    def objects(self, value: Any, doing: str) -> list[Any]:
        """The values of all ranks."""
        held: list[Any] = [None] * self.size
        with self._heard(doing):
            dist.all_gather_object(held, value)
        return held

    def any(self, flag: bool, doing: str) -> bool:
        """Whether it is true on any rank."""
        return bool(self.summed(torch.tensor(float(flag)), doing) > 0)

    @contextmanager
    def _heard(self, doing: str) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, dist.DistError) as error:
            when = f", {self.when}" if self.when else ""
            raise LostRankError(
                f"rank {self.rank} of {self.size}{when}, {doing}: the others cannot be heard ({_first_line(error)}). One of "
                "them has ended, hangs, or makes other calls than this one; its own output says more. End all processes and "
                "start them again"
            ) from error


def _movable(tensor: Tensor) -> Tensor:
    """The tensor where a backend of the group can read it, contiguous."""
    config = str(dist.get_backend_config())
    devices = [part.partition(":")[0] for part in config.split(",")]
    if tensor.device.type not in devices:
        tensor = tensor.to(devices[0])
    return tensor.contiguous()


def _first_line(error: BaseException) -> str:
    return re.sub(r"^\[[^]]*\] *", "", str(error).strip().partition("\n")[0]).partition(". This is")[0][:200]
