"""A guide that makes its networks at its first call, when it has seen the shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.nn import PyroModule
from torch import Tensor

from pyro_sinkhorn.guide.shown import Shown
from pyro_sinkhorn.structure import Structure


class LazyGuide(PyroModule):
    """Base class of the automatic guides: one program, networks from its first call on, a state that may wait for it.

    :param model: the program that it is for
    """

    #: Module lists that the first call fills.
    made: tuple[str, ...] = ()

    def __init__(self, model: Callable[..., Any]) -> None:
        super().__init__(name=type(self).__name__)
        # In a tuple, so that a model that is a module does not become a part of its guide.
        self._model = (model,)
        self._structure: Structure | None = None
        self._pending_state: dict[str, Tensor] | None = None
        #: Simulated data that stand in for the observed ones, see :func:`~pyro_sinkhorn.guide.shown.showing`.
        self._shown: Shown | None = None
        #: Whether parameters of the program get no gradient through the latents.
        self._program_fixed = False

    @property
    def model(self) -> Callable[..., Any]:
        """The program that this guide is for."""
        return self._model[0]

    def _ensure(self, set_up: Callable[[], None]) -> Structure:
        """The structure, after a first set-up where there was none."""
        if self._structure is None:
            # Networks about to be overwritten by a loaded state must not shift the random numbers of this call.
            with torch.random.fork_rng(devices=[], enabled=self._pending_state is not None):
                set_up()
        assert self._structure is not None
        return self._structure

    def _take_pending(self) -> None:
        if self._pending_state is not None:
            pending, self._pending_state = self._pending_state, None
            self.load_state_dict(pending)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """As in torch; before the first call, when there are no networks yet, the state waits for them."""
        prefixes = tuple(f"{name}." for name in self.made)
        if self._structure is None and any(name.startswith(prefixes) for name in state_dict):
            self._pending_state = dict(state_dict)
            if "_extra_state" in state_dict:  # which the first call needs
                self.set_extra_state(state_dict["_extra_state"])
            return torch.nn.modules.module._IncompatibleKeys([], [])
        return super().load_state_dict(state_dict, strict, assign)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As in torch; a state that still waits for the first call counts as the guide's."""
        if self._pending_state is not None and not args and not kwargs:
            return dict(self._pending_state)
        return super().state_dict(*args, **kwargs)
