"""Two rules by which ``dirichlet.py`` chooses weights, and the rows that they leave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

#: The prior that weights are chosen for, and the paper's claim is about.
GOAL = "1/5, 16-d"

Row = dict[str, Any]
Rule = Callable[[list[Row]], float]


def by_frechet(tried: list[Row]) -> float:
    """The weight whose generated digits are nearest to the validation images."""
    return min(tried, key=lambda row: row["frechet"])["weight"]


def by_digits(tried: list[Row]) -> float:
    """The weight with the most digits at vertices, then the most confident ones, then by Fréchet distance."""
    return max(tried, key=lambda row: (row["digits"], row["digits_sure"], -row["frechet"]))["weight"]


def chosen(rows: list[Row], method: str, rule: Rule) -> float:
    """The weight of a method; the autoencoder has none."""
    tried = [row for row in rows if (row["method"], row["part"]) == (method, "validation")]
    return rule(tried) if tried else 0.0


def reported(rows: list[Row], prior: str, method: str, rule: Rule) -> list[Row]:
    """Rows of the test images with the weight chosen."""
    weight = chosen(rows, method, rule)
    key = (prior, method, "test", weight)
    return [row for row in rows if (row["prior"], row["method"], row["part"], row["weight"]) == key]
