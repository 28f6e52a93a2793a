"""Programs of digit images, fitted to scikit-learn's."""

from __future__ import annotations

from typing import Any

import pyro
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor
from torch.nn.functional import one_hot

from exhibits.base import NUM_TRAIN, Exhibit, decoded, digits, energy_distance, fitted_by, rms, show_images
from pyro_sinkhorn import Trace_Sinkhorn, TraceEnum_Sinkhorn, models


def semi_supervised_digits() -> Exhibit:
    """1497 digits, the first 100 with their labels."""
    x, y = digits()
    label = torch.where(torch.arange(len(y)) < 100, y, -1)
    program = fitted_by(
        models.semi_supervised_digits(dim=2, label_weight=40.0),
        reads=lambda x, label: x,
        loss=TraceEnum_Sinkhorn(prior_weight=30.0),
    )
    held_out = x[NUM_TRAIN:]

    def check() -> str:
        unknown = torch.full((len(held_out),), -1)
        guess = program.encode(held_out, unknown, num_samples=20, seed=1)["y"].mean(0).argmax(-1)
        right = (guess == y[NUM_TRAIN:]).to(x.dtype).mean()
        alone = LogisticRegression(max_iter=1000).fit(x[:100], y[:100]).score(held_out, y[NUM_TRAIN:])
        return f"held-out digits classified with 100 labels: {right:.1%}; logistic regression on these {alone:.1%}"

    def draw(axes: Any) -> None:
        z = program.generate(1, x[:60], label[:60], seed=1)["z"][0]
        show_images(axes, decoded(program, z, torch.eye(10).repeat(6, 1)), 10)

    return Exhibit(program, (x[:NUM_TRAIN], label[:NUM_TRAIN]), check, draw, num_steps=600, lr=2e-3)


def conditional_digits() -> Exhibit:
    """1497 digits with their labels."""
    x, y = digits()
    program = fitted_by(models.conditional_digits())
    wanted = torch.arange(1000) % 10

    def drawn() -> Tensor:
        z = program.generate(1, torch.empty(1000, 64), wanted, seed=1)["z"][0]
        return decoded(program, z, one_hot(wanted, 10).to(z))

    def check() -> str:
        judge = KNeighborsClassifier(3).fit(x[:NUM_TRAIN], y[:NUM_TRAIN])
        right, real = judge.score(drawn(), wanted), judge.score(x[NUM_TRAIN:], y[NUM_TRAIN:])
        return f"images drawn for a label are classified as it: {right:.1%}; held-out digits {real:.1%}"

    def draw(axes: Any) -> None:
        show_images(axes, drawn()[:60], 10)

    return Exhibit(program, (x[:NUM_TRAIN], y[:NUM_TRAIN]), check, draw, lr=2e-3)


def pseudo_input_digits() -> Exhibit:
    """1497 digits, 16 of which pseudo-inputs start from."""
    x, _ = digits()
    program = fitted_by(models.pseudo_input_digits(start=0.05 + 0.9 * x[:16]))
    held_out = x[NUM_TRAIN:]

    def drawn() -> Tensor:
        return decoded(program, program.generate(1, x[:1000], seed=1)["z"][0])

    def check() -> str:
        return (
            f"energy distance of drawn to held-out digits {energy_distance(drawn(), held_out):.4f}, of training digits "
            f"{energy_distance(x[:NUM_TRAIN], held_out):.4f}"
        )

    def draw(axes: Any) -> None:
        with program.active():
            learned = pyro.param("pseudo_inputs").detach()
        show_images(axes, torch.cat([learned[:16], drawn()[:32]]), 8)

    return Exhibit(program, (x[:NUM_TRAIN],), check, draw, lr=2e-3)


def canvas_digits() -> Exhibit:
    """Digits at random places of a canvas; 1497 to fit, 300 held out."""
    glyphs, _ = digits()
    where = 2 * torch.rand(len(glyphs), 2, generator=torch.Generator().manual_seed(1)) - 1
    x = models.place_on_canvas(glyphs.reshape(-1, 8, 8), where)
    # Noise in z_what teaches the decoder to ignore it, before there is a place to paint at: so there is none.
    program = fitted_by(
        models.canvas_digits(),
        loss=Trace_Sinkhorn(prior_weight=300.0),
        encoder=models.GlimpseEncoder(),
        noise_dim=0,
    )
    held_out = x[NUM_TRAIN:]

    def found() -> tuple[Tensor, Tensor]:
        codes = program.encode(held_out, seed=1)
        with torch.no_grad():
            parts = program.modules["decoder"](codes["z_what"][0]).sigmoid().unflatten(-1, (8, 8))
        return codes["z_where"][0], models.place_on_canvas(parts, codes["z_where"][0])

    def check() -> str:
        place, image = found()
        mean = x[:NUM_TRAIN].mean(0)
        return (
            f"held-out: place off by {6 * rms(place - where[NUM_TRAIN:]):.2f} pixels of 12; squared error of the image "
            f"{float((image - held_out).square().mean()):.4f}, of the mean image "
            f"{float((mean - held_out).square().mean()):.4f}"
        )

    def draw(axes: Any) -> None:
        show_images(axes, torch.cat([held_out[:6], found()[1][:6]]), 6)

    return Exhibit(program, (x[:NUM_TRAIN],), check, draw, num_steps=500, lr=2e-3)
