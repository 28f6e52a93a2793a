"""What a minibatch stands for: the scale of its plates, and when data may be drawn with replacement."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace

from pyro_sinkhorn.errors import ProgramError
from pyro_sinkhorn.rng import undisturbed
from pyro_sinkhorn.runs import run_model
from pyro_sinkhorn.structure import Plate, Structure, plates_of, sample_sites, structure_of
from pyro_sinkhorn.training.loader import LoadedBatches
from pyro_sinkhorn.training.minibatches import Minibatches

Batches = Minibatches | LoadedBatches


class DataScale(Messenger):
    """Multiply the scale of sites in some plates: a minibatch of B passed to a model stands for all N data."""

    def __init__(self, plates: set[str], factor: float) -> None:
        super().__init__()
        self.plates, self.factor = plates, factor

    def _process_message(self, msg: Any) -> None:
        if msg["type"] == "sample" and any(frame.name in self.plates for frame in msg["cond_indep_stack"]):
            msg["scale"] = msg["scale"] * self.factor


def data_scale(model: Callable[..., Any], batches: Batches) -> DataScale | None:
    """What scales minibatched plates up to all data, where something outside them makes the scale matter.

    That is a global latent, a ``pyro.factor``, or a plate that is whole in every minibatch (features, say).

    :raises ProgramError: no plate follows the minibatch
    """
    if batches.whole:
        return None
    trace, structure = _look(model, batches, batches.batch_size)
    plates = _minibatched(model, batches, structure)
    outside = [
        name
        for name, site in sample_sites(trace)
        if plates.isdisjoint(plate.name for plate in plates_of(site))
        and not site["infer"].get("_deterministic")
    ]
    if not outside:
        return None
    if not batches.n:
        raise ProgramError(
            f"{outside[0]!r} lies outside the data, so the loss must know how many there are in all, but the loader's data "
            "set does not say: give it a __len__"
        )
    return DataScale(plates, batches.n / batches.batch_size)


def may_replace(model: Callable[..., Any], batches: Batches, whole_data_sets: bool) -> bool:
    """Whether data can be drawn with replacement: rows of the arguments must be slices of a data plate.

    :param whole_data_sets: whether a data set with globals is to stay as it is
    """
    if not batches.whole:
        return True  # which data_scale has checked
    if not batches.n or batches.everything:
        return False
    _, structure = _look(model, batches, batches.n)
    if whole_data_sets and structure.globals:
        return False
    return any(plate.size == plate.full_size == batches.n for plate in structure.data_plates)


def _minibatched(model: Callable[..., Any], batches: Batches, structure: Structure) -> set[str]:
    """Names of the data plates that are as long as a minibatch and would change with it."""
    plates = structure.data_plates
    for plate in plates:
        if plate.size != plate.full_size:
            raise ProgramError(
                f"plate {plate.name!r} sub-samples {plate.size} of {plate.full_size} by itself: pass the whole data "
                "with batch_size=None"
            )
    found = {plate.name for plate in plates if plate.size == batches.batch_size}
    if len(found) != 1:
        # None, or several of which some may be so long by chance: a batch one longer tells them apart.
        _, other = _look(model, batches, batches.batch_size + 1)
        sizes = {plate.name: plate.size for plate in other.data_plates}
        found = {plate.name for plate in plates if sizes.get(plate.name, plate.size) != plate.size}
    if not found:
        raise ProgramError(
            f"no data plate follows the minibatch of {batches.batch_size} out of {batches.n}: {_sizes(plates)} all the "
            "same. Write the plate's size as that of the argument, pyro.plate('data', len(x)), or pass "
            "batch_size=None"
        )
    return found


def _sizes(plates: tuple[Plate, ...]) -> str:
    return " and ".join(f"plate {plate.name!r} has size {plate.size}" for plate in plates)


def _look(model: Callable[..., Any], batches: Batches, size: int) -> tuple[Trace, Structure]:
    args, kwargs = batches.look(size)
    with undisturbed():  # a look at the model must not shift what follows
        trace = run_model(model, args, kwargs)
    return trace, structure_of(trace)


def refuse_minibatches(model: Callable[..., Any], batches: Batches, loss: Any) -> None:
    _, structure = _look(model, batches, batches.batch_size)
    if structure.globals:
        raise ProgramError(
            f"{type(loss).__name__} reads the globals {list(structure.globals)} off whole data sets, but batch_size="
            f"{batches.batch_size} shows {batches.batch_size} of {batches.n} data at a time: pass batch_size=None"
        )
