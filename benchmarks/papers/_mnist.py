r"""MNIST for the studies of the papers, with a small classifier to judge generated images.

The papers' FID network is unspecified. Here its place is taken by the 64 penultimate features of a convolutional
classifier fitted to the training images (98% of the test images right); the Fréchet distance between the normal
laws of two sets of features is

.. math:: |m_1-m_2|^2 + \operatorname{tr}\bigl(C_1 + C_2 - 2 (C_1C_2)^{1/2}\bigr).

Its unit is that of these features: it compares methods, not papers. The classifier is fitted once, from a seed of its own,
and kept in ``build/papers``; every process of a study reads the same one.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import _path  # noqa: F401 (the folder above)
import numpy as np
import torch
from learned_cost import frechet
from sklearn.datasets import load_digits
from torch import Tensor, nn

CACHE = Path(__file__).resolve().parents[2] / "build" / "papers"
CLASSIFIER_SEED = 7


@dataclass(frozen=True)
class Split:
    """Flattened images in [0, 1], float32, with their digits; MNIST: 50,000, 10,000 and 10,000."""

    train: Tensor
    validation: Tensor
    test: Tensor
    y_train: Tensor
    y_validation: Tensor
    y_test: Tensor

    @property
    def side(self) -> int:
        """Pixels in a row."""
        return round(self.train.shape[-1] ** 0.5)


def load(data_dir: str | Path | None) -> Split:
    """MNIST from ``mnist.npz`` in a folder, or without one its stand-in: scikit-learn's 8 x 8 digits.

    :raises SystemExit: the folder holds no ``mnist.npz``
    """
    if data_dir is None:
        digits = load_digits()
        x = torch.tensor(digits.data / 16, dtype=torch.float32)
        y = torch.tensor(digits.target)
        return Split(x[:1200], x[1200:1500], x[1500:], y[:1200], y[1200:1500], y[1500:])
    path = Path(data_dir) / "mnist.npz"
    if not path.exists():
        raise SystemExit(f"{path} does not exist: give the folder of Keras's mnist.npz as --data-dir")
    with np.load(path) as file:
        x, x_test = (torch.tensor(file[f"x_{part}"]).flatten(1) / 255 for part in ("train", "test"))
        y, y_test = (torch.tensor(file[f"y_{part}"]).long() for part in ("train", "test"))
    return Split(x[:50_000], x[50_000:], x_test, y[:50_000], y[50_000:], y_test)


class Classifier(nn.Module):
    """Two convolutions and two linear maps; the last but one gives the features."""

    def __init__(self, side: int, num_features: int = 64) -> None:
        super().__init__()
        last = -(-side // 4)  # two strides of 2, rounded up
        self.side = side
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * last * last, num_features),
            nn.ReLU(),
        )
        self.head = nn.Linear(num_features, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Flattened images to logits of the ten digits."""
        return self.head(self.body(x.unflatten(-1, (1, self.side, self.side))))

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """Penultimate features of images, ``(n, 64)``, in float64."""
        shaped = x.unflatten(-1, (1, self.side, self.side))
        return torch.cat([self.body(rows) for rows in shaped.split(1000)]).double()

    @torch.no_grad()
    def verdicts(self, x: Tensor) -> Tensor:
        """Probabilities of the ten digits, ``(n, 10)``."""
        return torch.cat([self(rows).softmax(-1) for rows in x.split(1000)])

    def accuracy(self, x: Tensor, y: Tensor) -> float:
        """Share of images whose digit is found."""
        return float((self.verdicts(x).argmax(-1) == y).double().mean())

    def frechet(self, x: Tensor, y: Tensor) -> float:
        """Fréchet distance between the features of two sets of images."""
        return frechet(self.features(x), self.features(y))


def fit_classifier(split: Split, epochs: int) -> Classifier:
    """Fit to the training images by Adam with a cosine schedule; leaves the global random state alone."""
    with torch.random.fork_rng():
        torch.manual_seed(CLASSIFIER_SEED)
        net = Classifier(split.side)
        batches = len(split.train) // 128
        optim = torch.optim.Adam(net.parameters(), lr=2e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optim, epochs * batches)
        for _ in range(epochs):
            for index in torch.randperm(len(split.train))[: batches * 128].split(128):
                optim.zero_grad()
                nn.functional.cross_entropy(net(split.train[index]), split.y_train[index]).backward()
                optim.step()
                schedule.step()
    return net.eval().requires_grad_(False)


def classifier(split: Split, epochs: int = 4) -> Classifier:
    """The classifier of these data, fitted at the first call and read from ``build/papers`` afterwards."""
    seen = hashlib.sha256(split.train.numpy().tobytes() + split.y_train.numpy().tobytes()).hexdigest()[:16]
    path = CACHE / f"classifier_{seen}_{epochs}.pt"
    if path.exists():
        net = Classifier(split.side)
        net.load_state_dict(torch.load(path, weights_only=True))
        return net.eval().requires_grad_(False)
    net = fit_classifier(split, epochs)
    CACHE.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    torch.save(net.state_dict(), partial)
    partial.replace(path)  # another process sees all of it or nothing
    return net
