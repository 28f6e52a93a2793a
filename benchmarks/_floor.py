"""The least a divergence and its gradient could cost on this machine, from its parts, each measured alone.

One exp an entry, one product of clouds an entry, the passes that were made, and the products of the gradient. A self
term is symmetric: half its matrix suffices. Its passes are those of a rate of one third (relaxation 2/3) down to the tolerance.
"""

from __future__ import annotations

import math
from statistics import median
from typing import Any

import torch
from _clouds import Cell, clouds
from _worker import time_it

CHUNK = 65_536  # floats: exp is measured in cache


def floor(cell: Cell, passes: int, tolerance: float) -> dict[str, Any]:
    """Milliseconds of each part and in all, in float32 on as many threads as torch has now.

    :param passes: iterations of the cross problem, each two matrix-vector products
    """
    n = cell.n
    x, y = clouds(cell)
    kernel, ones = x @ y.mT, torch.ones(n)
    source = torch.randn(min(CHUNK, n * n))
    target = torch.empty_like(source)

    def ms(run: Any) -> float:
        cpu, wall = time_it(run, 0.1, 200, least=5)
        return median(cpu if torch.get_num_threads() == 1 else wall)

    own_passes = max(1, math.ceil(math.log(1 / tolerance) / math.log(3)))
    parts = {
        "exp": 2 * ms(lambda: torch.exp(source, out=target)) * n * n / source.numel(),
        "products": 2 * ms(lambda: torch.mm(x, y.mT, out=kernel)),
        "passes": (2 * passes + own_passes) * ms(lambda: torch.mv(kernel, ones)),
        "gradient": 2 * ms(lambda: kernel @ y),
    }
    return {"ms": sum(parts.values()), "parts_ms": parts, "passes": passes, "own_passes": own_passes}
