"""What ``fit`` is around its steps: held-out data, checkpoints, callbacks."""

from pyro_sinkhorn.fitting.callbacks import Callback, log_to

__all__ = ["Callback", "log_to"]
