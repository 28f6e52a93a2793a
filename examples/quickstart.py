"""Fit a Dirichlet-prior program to images of digits in a minute, and look at what it learned.

    python examples/quickstart.py                # writes quickstart.png
    python examples/quickstart.py --smoke-test   # a few steps, to see that everything runs

The program says that every image is a mixture of ten archetypes. The Dirichlet is kept as it is: no softmax of a
normal in its place, no density asked of the guide.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import pyro
import pyro.distributions as dist
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from pyro_sinkhorn import Trace_Sinkhorn, sinkhorn_infer

matplotlib.use("Agg")
import matplotlib.pyplot as plt

torch.set_num_threads(1)  # clouds of this size gain nothing from two, and lose much beside a busy neighbour
torch.manual_seed(0)
decoder = nn.Sequential(nn.Linear(10, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, 64))


@sinkhorn_infer(loss=Trace_Sinkhorn(prior_weight=100.0))
def digits(x: Tensor) -> None:
    """Ten archetypes, mixed; pixel noise of standard deviation .2."""
    pyro.module("decoder", decoder)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Dirichlet(torch.full((10,), 0.5)))
        pyro.sample("x", dist.Normal(decoder(z).sigmoid(), 0.2).to_event(1), obs=x)


def energy_distance(x: Tensor, y: Tensor) -> float:
    """Unbiased energy distance between two clouds, 2 E|x-y| - E|x-x'| - E|y-y'|; 0 for equal laws."""
    n, m = len(x), len(y)
    within = torch.cdist(x, x).sum() / (n * (n - 1)) + torch.cdist(y, y).sum() / (m * (m - 1))
    return float(2 * torch.cdist(x, y).mean() - within)


def main() -> None:
    """Fit, measure, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-steps", type=int, default=2000)
    parser.add_argument("--output", type=Path, default=Path("quickstart.png"))
    parser.add_argument("--smoke-test", action="store_true")
    options = parser.parse_args()
    num_steps = 5 if options.smoke_test else options.num_steps

    x = torch.tensor(load_digits().data / 16, dtype=torch.get_default_dtype())
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    train, held_out = x[:1497], x[1497:]

    schedule = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 2e-3}, "T_max": num_steps}
    digits.fit(train, num_steps=num_steps, seed=0, optim=pyro.optim.CosineAnnealingLR(schedule))

    trained = digits.modules["decoder"]
    with torch.no_grad():
        z = digits.encode(held_out, seed=1)["z"][0]
        z_prior = digits.generate(1, train[:1000], seed=2)["z"][0]
        reconstructed, generated = trained(z).sigmoid(), trained(z_prior).sigmoid()
        archetypes = trained(torch.eye(10)).sigmoid()
        z_train = digits.encode(train, seed=3)["z"][0]
    print()
    digits.diagnose(train, seed=4)
    print()
    print(
        f"{'held-out reconstruction, mean squared error':<58}{float((reconstructed - held_out).square().mean()):.4f}"
    )
    print(f"{'energy distance, generated to held-out digits':<58}{energy_distance(generated, held_out):.4f}")
    print(
        f"{'energy distance, training to held-out digits (floor)':<58}{energy_distance(train, held_out):.4f}"
    )
    draw(options.output, archetypes, generated, held_out, reconstructed, z_train, z_prior)
    print(f"figure: {options.output}")


def draw(
    path: Path,
    archetypes: Tensor,
    generated: Tensor,
    held_out: Tensor,
    reconstructed: Tensor,
    z: Tensor,
    prior: Tensor,
) -> None:
    """Four panels: archetypes, decoded prior samples, reconstructions, aggregated posterior against prior."""
    figure = plt.figure(figsize=(11, 5.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1.2, 1])
    samples, pairs = left.subplots(2, 1, height_ratios=[6, 4])
    vertices, marginal = right.subplots(2, 1, height_ratios=[1, 1.1])

    samples.imshow(tile(generated[:72], 12), cmap="gray_r", vmin=0, vmax=1)
    samples.set_title("Decoded prior samples", loc="left")
    rows = torch.stack([held_out[:24].reshape(2, 12, 64), reconstructed[:24].reshape(2, 12, 64)], 1)
    pairs.imshow(tile(rows.reshape(-1, 64), 12), cmap="gray_r", vmin=0, vmax=1)
    pairs.set_title("Held-out digits, and below each its reconstruction", loc="left")
    vertices.imshow(tile(archetypes, 5), cmap="gray_r", vmin=0, vmax=1)
    vertices.set_title("The ten archetypes: decoded vertices", loc="left")

    bins = torch.linspace(0, 1, 26).numpy()
    clouds = (("prior", prior, "0.6", 2.0), ("aggregated posterior", z, "tab:blue", 1.3))
    for name, cloud, colour, width in clouds:
        style = {"bins": bins, "density": True, "histtype": "step", "color": colour, "lw": width}
        marginal.hist(cloud.flatten().numpy(), **style, label=name)
        marginal.hist(
            cloud.max(-1).values.numpy(), **style, ls="--", label=f"{name}, largest weight of an image"
        )
    marginal.set(yscale="log", ylim=(3e-3, 300), xlabel="weight of an archetype", ylabel="density")
    marginal.set_title("Weights: aggregated posterior against prior", loc="left")
    marginal.legend(frameon=False, fontsize=8, loc="upper right")
    for axes in (samples, pairs, vertices):
        axes.set_axis_off()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def tile(images: Tensor, columns: int, side: int = 8) -> Tensor:
    """Images ``(n, side * side)`` in a grid with white lines between."""
    padded = nn.functional.pad(images.reshape(-1, columns, side, side), (1, 1, 1, 1))
    return padded.permute(0, 2, 1, 3).reshape(-1, columns * (side + 2))


if __name__ == "__main__":
    main()
