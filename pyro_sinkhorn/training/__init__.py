"""The training loop, in parts: minibatches, what they stand for, one step, history."""

from pyro_sinkhorn.training.data_scale import DataScale, data_scale
from pyro_sinkhorn.training.history import History
from pyro_sinkhorn.training.minibatches import Epoch, Minibatches, as_tensor
from pyro_sinkhorn.training.trainer import Trainer, step

__all__ = ["DataScale", "Epoch", "History", "Minibatches", "Trainer", "as_tensor", "data_scale", "step"]
