"""What ``fit`` tells others after every step."""

from __future__ import annotations

from typing import Any, Protocol

from pyro_sinkhorn.errors import ProgramError, checked_integer


class Callback(Protocol):
    """Anything that can be called with the program and the figures of a step.

    The figures are ``step`` (of all fits), ``loss``, and, where there are such, ``reconstruction``, ``match``,
    ``match/<group>`` for every group, and ``validation`` in the steps that measured it.
    """

    def __call__(self, program: Any, values: dict[str, float]) -> bool | None:
        """Return True to stop the fit after this step."""


def log_to(writer: Any, every: int = 1, prefix: str = "") -> Callback:
    """A callback that writes figures to TensorBoard or Weights & Biases.

    :param writer: with ``add_scalar(name, value, step)``, as ``torch.utils.tensorboard.SummaryWriter``, or with
        ``log(values, step=step)``, as a run of ``wandb``
    :param every: steps between two entries; a step that measured held-out data is always written
    :param prefix: put before every name, ``"digits/"`` say
    :raises ProgramError: the writer has neither method

    >>> class Writer:
    ...     def add_scalar(self, name, value, step):
    ...         print(step, name, value)
    >>> log_to(Writer(), prefix="fit/")(None, {"step": 3, "loss": 0.5})
    3 fit/loss 0.5
    """
    every = checked_integer("every", every, 1)
    add, log = getattr(writer, "add_scalar", None), getattr(writer, "log", None)
    if add is None and log is None:
        raise ProgramError(
            f"a {type(writer).__name__} has neither add_scalar(name, value, step) nor log(values, step=): pass a "
            "SummaryWriter of TensorBoard, a run of wandb, or write a callback of your own"
        )

    def write(program: Any, values: dict[str, float]) -> None:
        step = int(values["step"])
        if step % every and "validation" not in values:
            return
        named = {prefix + name: value for name, value in values.items() if name != "step"}
        if add is None:
            log(named, step=step)  # type: ignore[misc]
            return
        for name, value in named.items():
            add(name, value, step)

    return write
