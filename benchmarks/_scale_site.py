"""Weights on single sites, for the peers that have them."""

from __future__ import annotations

from typing import Any

from pyro.poutine.messenger import Messenger


class ScaleSite(Messenger):
    """Scale one latent site, as beta-VAE scales its KL term."""

    def __init__(self, name: str, factor: float) -> None:
        super().__init__()
        self.name, self.factor = name, factor

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == self.name:
            msg["scale"] = msg["scale"] * self.factor
