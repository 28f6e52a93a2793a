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


def chosen(rows: list[dict[str, Any]], prior: str, method: str) -> float:
    """The weight of a method, by its validation rows."""
    if method in GIVEN:
        return GIVEN[method]
    tried = [row for row in rows if row["prior"] == prior and row["part"] == "validation"]
    (base,) = (row["reconstruction"] for row in tried if row["method"] == "ae")
    return choose([row for row in tried if row["method"] == method], LIMIT * base)


def tested(rows: list[dict[str, Any]], prior: str, method: str) -> list[dict[str, Any]]:
    """Rows of the test images with the chosen weight; none before anything was tested."""
    found = [r for r in rows if (r["prior"], r["method"], r["part"]) == (prior, method, "test")]
    return [row for row in found if row["weight"] == chosen(rows, prior, method)]
