"""Classifier two-sample test: can a network tell two clouds apart?"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_sinkhorn.errors import NonFiniteError, ProgramError, checked_integer

Sample = Tensor | Mapping[str, Tensor]


@dataclass(frozen=True)
class C2STResult:
    """What :func:`c2st` measured.

    value:      cross-validated accuracy, .5 for clouds that cannot be told apart and 1 for those that do not overlap
    folds:      accuracy of every fold
    null_sd:    standard deviation of ``value`` between equal laws: that of as many tosses of a coin as there are points
    """

    value: float
    folds: tuple[float, ...]
    null_sd: float

    @property
    def null_band(self) -> tuple[float, float]:
        """Where ``value`` lies in 95 of 100 comparisons of equal laws."""
        return 0.5 - 1.96 * self.null_sd, 0.5 + 1.96 * self.null_sd

    def __str__(self) -> str:
        low, high = self.null_band
        return f"C2ST {self.value:.3f} (equal laws: {low:.3f} to {high:.3f})"


def c2st(x: Sample, y: Sample, seed: int = 0, num_folds: int = 5) -> C2STResult:
    r"""Accuracy of a classifier between two samples (Lopez-Paz and Oquab 2017; Friedman 2003).

    The classifier and its defaults are those of the sbibm benchmark (Lueckmann et al. 2021, its ``metrics/c2st.py``): both
    samples z-scored by mean and standard deviation of the first, scikit-learn's ``MLPClassifier`` with two hidden layers
    of :math:`10\,d` rectified units, Adam, at most 10000 epochs, shuffled 5-fold cross-validation, the mean accuracy. For its
    very number give the reference draws first and ``seed=1``. Two things differ: the arithmetic is that of float64, and a
    column that is constant in ``x`` stays in instead of making NaN.

    A weak classifier says .5 of anything: read the value beside one between clouds that you know to differ.

    :param x: the reference, ``(n, *event)``, or a dictionary of those by site, which is compared jointly
    :param y: as many columns as ``x``. Of unequal numbers of rows the longer sample is cut, at random: always guessing it
        would be right more than half of the time
    :param seed: of the folds and the networks; sbibm's is 1
    :param num_folds: parts of the cross-validation
    :raises ProgramError: samples that do not go together, or too small
    :raises NonFiniteError: NaN or infinity among them
    :raises ImportError: scikit-learn is not installed

    >>> rng = torch.Generator().manual_seed(0)
    >>> near, far = torch.randn(2, 200, 1, generator=rng)
    >>> c2st(near, far + 6).value > 0.95
    True
    """
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.model_selection import KFold, cross_val_score
        from sklearn.neural_network import MLPClassifier
    except ImportError as error:
        raise ImportError(
            "c2st needs scikit-learn: pip install scikit-learn, or 'pyro-sinkhorn[examples]'"
        ) from error
    num_folds = checked_integer("num_folds", num_folds, 2)
    left, right = _rows(x, "x"), _rows(y, "y")
    rng = torch.Generator().manual_seed(seed)
    if left.shape[1] != right.shape[1]:
        raise ProgramError(
            f"x has {left.shape[1]} columns and y {right.shape[1]}: both must be of the same sites"
        )
    if min(len(left), len(right)) < num_folds:
        raise ProgramError(f"samples of {len(left)} and {len(right)} cannot be cut into {num_folds} folds")
    rows = min(len(left), len(right))
    left, right = (
        part if len(part) == rows else part[torch.randperm(len(part), generator=rng)[:rows]]
        for part in (left, right)
    )
    centre, scale = left.mean(0), left.std(0)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    points = ((torch.cat([left, right]) - centre) / scale).numpy()
    labels = torch.cat([torch.zeros(len(left)), torch.ones(len(right))]).numpy()
    width = 10 * left.shape[1]
    network: Any = MLPClassifier(
        hidden_layer_sizes=(width, width),
        activation="relu",
        solver="adam",
        max_iter=10_000,
        random_state=seed,
    )
    folds = KFold(num_folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        scores = cross_val_score(network, points, labels, cv=folds, scoring="accuracy")
    return C2STResult(float(scores.mean()), tuple(map(float, scores)), 0.5 / math.sqrt(len(points)))


def _rows(sample: Sample, name: str) -> Tensor:
    """``(n, columns)`` in float64, on the processor."""
    parts = [sample[key] for key in sorted(sample)] if isinstance(sample, Mapping) else [sample]
    if not parts or any(not isinstance(part, Tensor) or part.dim() == 0 for part in parts):
        raise ProgramError(
            f"{name} is no sample: expected a tensor (n, *event), or a dictionary of such by site"
        )
    if len({len(part) for part in parts}) > 1:
        raise ProgramError(
            f"the sites of {name} have {[len(part) for part in parts]} rows: expected as many in each"
        )
    rows = torch.cat(
        [part.detach().cpu().double().reshape(len(part), math.prod(part.shape[1:])) for part in parts], -1
    )
    if not bool(rows.isfinite().all()):
        raise NonFiniteError(f"{name}, shape {tuple(rows.shape)}, has NaN or infinite values")
    return rows
