"""Several processes that share one fit: see docs/distributed.md.

>>> from pyro_sinkhorn import distributed
>>> with distributed.processes() as rank:  # joins the others under torchrun; alone it does nothing
...     print(rank, distributed.size())
0 1
"""

from pyro_sinkhorn.distributed.gradients import sum_gradients
from pyro_sinkhorn.distributed.group import Ranks, alone, is_first, processes, rank, running, size
from pyro_sinkhorn.distributed.shared_step import SharedStep, active, shared_step

__all__ = [
    "Ranks",
    "SharedStep",
    "active",
    "alone",
    "is_first",
    "processes",
    "rank",
    "running",
    "shared_step",
    "size",
    "sum_gradients",
]
