"""What ``fit`` is around its steps: held-out data, checkpoints, callbacks."""

from pyro_sinkhorn.fitting.callbacks import Callback, log_to
from pyro_sinkhorn.fitting.loop import FitOptions, run

__all__ = ["Callback", "FitOptions", "log_to", "run"]
