"""Table of the study mnist_manifold."""

from __future__ import annotations

from typing import Any

from _interval import interval
from _tables import load, origin, table

FLOOR, TUNING_SEED = "training images", 100


def manifold() -> str:
    """Every method, and what as many training images get."""
    result = load("papers_mnist_manifold")
    rows = [row for row in result["rows"] if row["seed"] != TUNING_SEED]
    names = dict.fromkeys(row["method"] for row in sorted(rows, key=lambda row: row["method"] == FLOOR))

    def line(name: str) -> list[str]:
        mine = [row for row in rows if row["method"] == name]
        fitted = name != FLOOR
        return [
            name,
            str(mine[0]["steps"]) if fitted else "–",
            f"{mine[0]['rate']:g}" if fitted else "–",
            interval(mine, "frechet", 1),
            interval(mine, "present", 1),
            interval(mine, "unsure", 0, 100),
            interval(mine, "energy", 3),
            interval(mine, "ms_per_step", 0) if fitted else "–",
            str(len(mine)) if fitted else "–",
        ]

    head = [
        "method",
        "steps",
        "rate",
        "Fréchet distance",
        "digits present, of 10",
        "unsure, %",
        "energy distance of pixels",
        "CPU ms a step",
        "seeds",
    ]
    return table(head, [line(name) for name in names]) + accuracy(result["rows"]) + origin(result)


def accuracy(rows: list[dict[str, Any]]) -> str:
    """How good the judge is."""
    (row,) = (row for row in rows if row["method"] == FLOOR)
    return f"\n\nThe classifier is right about {100 * row['accuracy']:.1f}% of the test images."


SECTIONS = {"mnist_manifold": manifold}
