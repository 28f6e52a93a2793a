"""A program in a LightningModule: the loss is a function of model, guide and batch, and Lightning does the rest.

    pip install lightning
    python examples/lightning_fit.py
    python examples/lightning_fit.py --smoke-test    # without Lightning: its hooks are called by hand

Data are scikit-learn's digits; the prior is a Dirichlet.
"""

from __future__ import annotations

import argparse
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_sinkhorn import AutoImplicit, Trace_Sinkhorn

try:
    from lightning import LightningModule, Trainer
except ImportError:  # the hooks below are plain methods
    LightningModule, Trainer = nn.Module, None


class Digits(LightningModule):  # type: ignore[misc]
    """Decoder and guide as modules of Lightning, the Sinkhorn loss in its training step."""

    def __init__(self, example: Tensor, dim: int = 10) -> None:
        super().__init__()
        self.dim = dim
        self.decoder = nn.Sequential(nn.Linear(dim, 128), nn.SiLU(), nn.Linear(128, example.shape[-1]))
        self.loss = Trace_Sinkhorn(prior_weight=100.0)
        self.guide = AutoImplicit(self.model)
        self.guide(example)  # makes its networks, before the optimiser asks for their parameters

    def model(self, x: Tensor) -> None:
        """Images as mixtures of archetypes."""
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Dirichlet(x.new_full((self.dim,), 0.5)))
            pyro.sample("x", dist.Normal(self.decoder(z).sigmoid(), 0.2).to_event(1), obs=x)

    def training_step(self, batch: list[Tensor], index: int = 0) -> Tensor:
        """The loss per datum."""
        value = self.loss.differentiable_loss(self.model, self.guide, batch[0]) / len(batch[0])
        if Trainer is not None:
            terms = self.loss.terms
            self.log_dict({"loss": terms.loss, "match": terms.total_match}, prog_bar=True)
        return value

    def configure_optimizers(self) -> Any:
        """Decoder and guide together."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def main() -> None:
    """Fit, and say how well codes reconstruct."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--smoke-test", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    x = torch.tensor(load_digits().data / 16, dtype=torch.float32)
    loader = DataLoader(TensorDataset(x), batch_size=256, shuffle=True, drop_last=True)
    digits = Digits(x[:256])
    if options.smoke_test:
        optim = digits.configure_optimizers()
        for batch in loader:
            optim.zero_grad()
            digits.training_step(batch).backward()
            optim.step()
    elif Trainer is None:
        raise SystemExit("this example needs Lightning: pip install lightning")
    else:
        Trainer(max_epochs=options.epochs, logger=False, enable_checkpointing=False).fit(digits, loader)
    with torch.no_grad():
        error = (digits.decoder(digits.guide(x)["z"]).sigmoid() - x).square().mean()
    print(f"loss {digits.loss.terms.loss:.2f} per datum, match {digits.loss.terms.total_match:.4f}")
    print(f"reconstruction, mean squared error {error:.4f}")


if __name__ == "__main__":
    main()
