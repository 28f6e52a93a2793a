"""Checkpoints: a fit that is killed at any moment goes on from the last one, to the same end.

A checkpoint is a saved program (:mod:`pyro_sinkhorn.state`) that also says where its fit was. ``SinkhornProgram.load`` reads
it like any other.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pyro_sinkhorn import snapshot, state
from pyro_sinkhorn.errors import ProgramError, checked_integer
from pyro_sinkhorn.fitting.validation import Best, Validation
from pyro_sinkhorn.training import Batches

KEY = "fit"


class Checkpoints:
    """Writes a program's state every so many steps of a fit.

    :param path: the file, replaced as a whole each time
    :param every: steps between two
    """

    def __init__(self, path: str | os.PathLike[str], every: int) -> None:
        if not isinstance(path, (str, os.PathLike)):
            raise ProgramError(f"checkpoint is a {type(path).__name__}: expected the path of a file")
        self.path, self.every = Path(path), checked_integer("every", every, 1)
        if self.path.is_dir():
            raise ProgramError(
                f"checkpoint={os.fspath(path)!r} is a folder: expected the path of a file in it"
            )
        if not self.path.parent.is_dir():
            raise ProgramError(
                f"checkpoint={os.fspath(path)!r}: there is no folder {str(self.path.parent)!r}"
            )
        for left in self.path.parent.glob(f"{self.path.name}.*.part"):
            left.unlink(missing_ok=True)  # of a process that died while it wrote

    def write(self, program: Any, progress: dict[str, Any], validation: Validation | None) -> None:
        """Write the state now."""
        best = {} if validation is None else vars(validation.best)
        state.write(snapshot.take(program) | {KEY: progress | {"best": state.detached(best)}}, self.path)


def conditions(batches: Batches) -> dict[str, Any]:
    """What must be as it was for the rest of a fit to be the same."""
    return {
        "n": batches.n,
        "batch_size": batches.batch_size,
        "everything": batches.everything,
    }


def read(path: str | os.PathLike[str], program: Any) -> dict[str, Any]:
    """Put a checkpoint into a program; its optimiser's state waits for :func:`pyro_sinkhorn.optimiser.choose`.

    :returns: where the fit was
    :raises ProgramError: a saved program that is no checkpoint
    :raises ValueError: a damaged or foreign file, or one of another program
    """
    saved = state.read(path)
    found = saved.get(KEY)
    if not isinstance(found, dict):
        raise ProgramError(
            f"resume={os.fspath(path)!r} is a saved program, not the checkpoint of a fit: read it with "
            "SinkhornProgram.load, then call fit()"
        )
    snapshot.check_loss(program, saved)
    snapshot.restore(program, saved)
    return found


def check_same(found: dict[str, Any], batches: Batches) -> None:
    """The data of a fit that goes on are those it began with, as far as can be seen.

    :raises ProgramError: their number or the batch size differs
    """
    for name, now in conditions(batches).items():
        if found[name] != now:
            what = {"n": "data", "batch_size": "data a batch", "everything": "for batch_size=None"}[name]
            raise ProgramError(
                f"the fit to resume had {found[name]} {what}, this one has {now}: pass the same data and the same "
                "batch_size, or start a new fit"
            )


def best_of(found: dict[str, Any] | None) -> Best:
    """The best state that a checkpoint holds."""
    held = {} if found is None else found.get("best") or {}
    return Best(**{name: value for name, value in held.items()}) if held else Best()
