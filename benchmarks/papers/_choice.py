"""The rule by which the autoencoding studies choose weights, and the rows that it leaves."""

from __future__ import annotations

from typing import Any

#: How much worse than the plain autoencoder's a reconstruction may be, on the validation images.
LIMIT = 1.15
#: Methods without a choice.
GIVEN = {"ae": 0.0, "vae": 1.0}


def choose(rows: list[dict[str, Any]], limit: float) -> float:
    """The weight of the nearest generated images among those that reconstruct well enough, else of the best reconstruction."""
    good = [row for row in rows if row["reconstruction"] <= limit]
    if good:
        return min(good, key=lambda row: row["frechet"])["weight"]
    return min(rows, key=lambda row: row["reconstruction"])["weight"]


def chosen(rows: list[dict[str, Any]], prior: str, method: str, steps: int) -> float:
    """The weight of a method for so many steps, by its validation rows of half as many."""
    if method in GIVEN:
        return GIVEN[method]
    tried = _of(rows, prior, "validation", steps // 2)
    (base,) = (row["reconstruction"] for row in tried if row["method"] == "ae")
    return choose([row for row in tried if row["method"] == method], LIMIT * base)


def reported(
    rows: list[dict[str, Any]], prior: str, method: str, steps: int | None = None, also: bool = False
) -> list[dict[str, Any]]:
    """Rows of the test images with the chosen weight; none before anything was tested.

    :param steps: of the fits; by default the most that were run
    :param also: instead those with a weight that was not chosen
    """
    steps = steps or max((row["steps"] for row in rows if row["prior"] == prior), default=0)
    found = [row for row in _of(rows, prior, "test", steps) if row["method"] == method]
    return [row for row in found if (row["weight"] == chosen(rows, prior, method, steps)) != also]


def weights_tried(rows: list[dict[str, Any]], prior: str, method: str, steps: int) -> list[dict[str, Any]]:
    """Rows of the validation images, by weight."""
    found = [row for row in _of(rows, prior, "validation", steps) if row["method"] == method]
    return sorted(found, key=lambda row: row["weight"])


def _of(rows: list[dict[str, Any]], prior: str, part: str, steps: int) -> list[dict[str, Any]]:
    return [row for row in rows if (row["prior"], row["part"], row["steps"]) == (prior, part, steps)]
