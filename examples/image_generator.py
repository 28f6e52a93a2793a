"""Learn to draw digits from the unit square: no likelihood, no encoder, no discriminator; about a minute.

    python examples/image_generator.py                        # digits of scikit-learn; writes image_generator.png
    python examples/image_generator.py --data-dir folder      # MNIST, from folder/mnist.npz (Keras's file)
    python examples/image_generator.py --smoke-test           # a few steps, to see that everything runs

The program says: draw a point of the square, decode it. Such images fill a surface of two dimensions and have no
density. ``Trace_DataSinkhorn`` compares what the program draws with what there is, and the square becomes a map of the
digits (Genevay, Peyré, Cuturi 2017).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import pyro
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from pyro_sinkhorn import SinkhornProgram, Trace_DataSinkhorn
from pyro_sinkhorn.models.image_generator import image_generator, latent_grid

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SIDE = 20  # of the map, in images


def images(folder: Path | None) -> tuple[Tensor, Tensor]:
    """Images with values in [0, 1], for training and held out."""
    if folder is not None:
        with np.load(folder / "mnist.npz") as file:
            train, test = (torch.tensor(file[name]).flatten(1) / 255 for name in ("x_train", "x_test"))
        return train, test[:2000]
    x = torch.tensor(load_digits().data / 16, dtype=torch.get_default_dtype())
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    return x[:1297], x[1297:]


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
    parser.add_argument("--data-dir", type=Path, help="folder with mnist.npz, for MNIST instead of digits")
    parser.add_argument("--num-steps", type=int, default=3000)
    parser.add_argument("--output", type=Path, default=Path("image_generator.png"))
    parser.add_argument("--smoke-test", action="store_true")
    options = parser.parse_args()
    num_steps = 3 if options.smoke_test else options.num_steps

    torch.set_num_threads(
        1
    )  # clouds of this size gain nothing from two, and lose much beside a busy neighbour
    torch.manual_seed(0)
    train, held_out = images(options.data_dir)
    program = SinkhornProgram(
        image_generator(train.shape[1], hidden=256), loss=Trace_DataSinkhorn(match_size=100)
    )
    # Batches of 200 as in the paper, far fewer than there are images: the halves are then nearly independent draws.
    schedule = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 2e-3}, "T_max": num_steps}
    optim = pyro.optim.CosineAnnealingLR(schedule)
    program.fit(train, num_steps=num_steps, batch_size=200, seed=0, optim=optim)

    generated = program.generate(1, train[:1000], seed=1)["x"][0]
    reference = train[:1000]
    with torch.no_grad():
        grid = program.modules["decoder"](latent_grid(SIDE)).sigmoid()
    print(f"{'energy distance, generated to held-out images':<58}{energy_distance(generated, held_out):.4f}")
    print(
        f"{'energy distance, training to held-out images (floor)':<58}{energy_distance(reference, held_out):.4f}"
    )
    mean_image = train.mean(0).expand(1000, -1)
    print(
        f"{'energy distance, the mean image to held-out images':<58}{energy_distance(mean_image, held_out):.4f}"
    )
    draw(options.output, grid, generated, held_out)
    print(f"figure: {options.output}")


def draw(path: Path, grid: Tensor, generated: Tensor, held_out: Tensor) -> None:
    """The decoded square; beside it samples of the program, and held-out images."""
    figure = plt.figure(figsize=(11, 6.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1.5, 1])
    manifold = left.subplots()
    samples, data = right.subplots(2, 1)
    manifold.imshow(tile(grid, SIDE), cmap="gray_r", vmin=0, vmax=1)
    manifold.set_title("The unit square, decoded", loc="left")
    samples.imshow(tile(generated[:70], 10), cmap="gray_r", vmin=0, vmax=1)
    samples.set_title("Samples of the program", loc="left")
    data.imshow(tile(held_out[:70], 10), cmap="gray_r", vmin=0, vmax=1)
    data.set_title("Held-out images", loc="left")
    for axes in (manifold, samples, data):
        axes.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def tile(images: Tensor, columns: int) -> Tensor:
    """Square images, flattened, in a grid with white lines between."""
    side = round(images.shape[-1] ** 0.5)
    padded = nn.functional.pad(images.reshape(-1, columns, side, side), (1, 1, 1, 1))
    return padded.permute(0, 2, 1, 3).reshape(-1, columns * (side + 2))


if __name__ == "__main__":
    main()
