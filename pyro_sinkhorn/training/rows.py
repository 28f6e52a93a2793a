"""Arguments that are read a few rows at a time: memory-mapped arrays, and sparse matrices of scipy.

Both may be larger than memory once they are tensors, so ``fit`` turns only the rows of a minibatch into one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def is_sparse(value: Any) -> bool:
    """Whether this is a sparse matrix or array of scipy, which need not be imported to know."""
    return type(value).__module__.startswith("scipy.sparse") and hasattr(value, "tocsr")


def by_rows(value: Any) -> Any:
    """The argument in a form that hands out rows, or as it is; float data of a map come in the default dtype."""
    return value.tocsr() if is_sparse(value) and value.ndim == 2 else value


def is_lazy(value: Any) -> bool:
    """Whether rows are to be made tensors when they are asked for."""
    return isinstance(value, np.memmap) or is_sparse(value)


def has_rows(value: Any) -> bool:
    """Whether the argument has a first dimension to cut minibatches from."""
    return (isinstance(value, Tensor) and value.dim() > 0) or (is_lazy(value) and len(value.shape) > 0)


def as_tensor(value: Any, device: torch.device | None) -> Any:
    """Arrays and sparse matrices to tensors, floats to the default dtype, everything to the device; others as they are.

    Data are data: a graph behind them, left by whatever simulated them, would be walked a second time at the second step.
    """
    if is_sparse(value):
        value = value.toarray()
    if isinstance(value, np.ndarray):
        # torch cannot share memory that is read-only or runs backwards.
        shareable = value.flags.writeable and all(stride >= 0 for stride in value.strides)
        value = torch.from_numpy(np.asarray(value) if shareable else np.array(value))
        if value.is_floating_point():
            value = value.to(torch.get_default_dtype())
    if isinstance(value, Tensor) and device is not None:
        value = value.to(device)
    return value.detach() if isinstance(value, Tensor) and value.requires_grad else value


def rows_of(value: Any, n: int, index: Tensor, device: torch.device | None) -> Any:
    """These rows of an argument that has ``n``, as a tensor; other arguments as they are."""
    if not has_rows(value) or value.shape[0] != n:
        return as_tensor(value, device)
    if isinstance(value, Tensor):
        return value[index.to(value.device)]
    picked = value[index.numpy()]
    return as_tensor(picked if is_sparse(picked) else np.array(picked), device)
