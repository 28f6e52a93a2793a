"""The training loop, in parts: minibatches, what they stand for, one step, history."""

from pyro_sinkhorn.training.data_scale import Batches, DataScale, data_scale
from pyro_sinkhorn.training.history import History
from pyro_sinkhorn.training.loader import LoadedBatches, is_loader, loader_of
from pyro_sinkhorn.training.minibatches import Batch, Epoch, Minibatches
from pyro_sinkhorn.training.rows import as_tensor, by_rows, is_lazy
from pyro_sinkhorn.training.sharing import common_random_state
from pyro_sinkhorn.training.trainer import Trainer, step

__all__ = [
    "Batch",
    "Batches",
    "DataScale",
    "Epoch",
    "History",
    "LoadedBatches",
    "Minibatches",
    "Trainer",
    "as_tensor",
    "by_rows",
    "common_random_state",
    "data_scale",
    "is_lazy",
    "is_loader",
    "loader_of",
    "step",
]
