"""Tables of the benchmarks that range over priors: the zoo, and digits under further priors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from _tables import load, origin, table


def zoo() -> str:
    """Guides fitted to priors alone."""
    result = load("prior_zoo")

    def cell(row: dict[str, Any], key: str, digits: int = 3) -> str:
        value = row.get(key)
        value = value.get("value") if isinstance(value, dict) else value
        return "" if value is None else f"{value:.{digits}f}"

    keys = ("c2st", "null", "control", "c2st_ranks", "control_ranks")
    rows = [
        [
            row["name"],
            str(row["columns"]),
            *(cell(row, key) for key in keys),
            cell(row, "energy_ratio", 2),
            cell(row, "dependence"),
            cell(row, "dependence_floor"),
        ]
        for row in result["rows"]
    ]
    head = [
        "prior", "columns", "C2ST", "prior to prior", "control", "C2ST of ranks", "control of ranks", "energy over floor",
        "dependence", "its floor",
    ]  # fmt: skip
    return table(head, rows) + origin(result)


def zoo_counts() -> str:
    """How many priors reach the goal."""
    values = [row["c2st"] for row in load("prior_zoo")["rows"]]
    within = {bound: sum(value <= bound for value in values) for bound in (0.55, 0.52)}
    return f"{within[0.55]} of {len(values)} at most .55, {within[0.52]} at most .52"


def any_prior() -> str:
    """Digits under six further priors."""
    result = load("digits_any_prior")
    rows = []
    for row in result["summary"]:
        rows.append(
            [
                row["prior"],
                f"{row['weight']:g}",
                f"{row['reconstruction']['mean']:.4f} ± {row['reconstruction']['half_width']:.4f}",
                f"{row['reconstruction_ratio']:.2f}",
                f"{row['match']['mean']:.4f}",
                f"{row['z']['mean']:.1f}",
                f"{row['generated_energy']['mean']:.4f} ± {row['generated_energy']['half_width']:.4f}",
                f"{row['knn_accuracy']['mean']:.3f}",
            ]
        )
    head = [
        "prior",
        "weight",
        "reconstruction",
        "ratio to autoencoder",
        "match",
        "z from the floor",
        "generated energy",
        "k-NN",
    ]
    return (
        table(head, rows)
        + f"\n\nTrain-to-test energy distance {result['train_to_test_energy']:.4f}."
        + origin(result)
    )


SECTIONS: dict[str, Callable[[], str]] = {"zoo": zoo, "zoo counts": zoo_counts, "any prior": any_prior}
