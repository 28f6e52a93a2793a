"""Tables of the study positivity."""

from __future__ import annotations

from typing import Any

from _tables import load, origin, table

_COSTS = {1.0: "distance", 1.5: "distance^1.5", 2.0: "squared distance", "arc": "squared arc"}


def _rows(*parts: str) -> list[dict[str, Any]]:
    return [row for row in load("papers_positivity")["rows"] if row["part"] in parts]


def perturbations() -> str:
    """Negative values among ten thousand pairs of measures."""
    lines = []
    for row in _rows("perturbations"):
        line = [_COSTS[row["power"]], row["name"].replace("epsilon ", "ε = "), f"{row['pairs']:,}"]
        for value in ("entropic", "sharp"):
            line += [str(row[value]["negative"]), f"{row[value]['smallest_over_cost']:.1e}"]
        lines.append(line)
    head = [
        "cost",
        "solver",
        "pairs",
        "negative, entropic",
        "smallest, of the cost",
        "negative, sharp",
        "smallest",
    ]
    return table(head, lines) + origin(load("papers_positivity"))


def expectations() -> str:
    """Of independent halves between two laws on a few atoms, in per cent of their cost."""
    found: dict[str, dict[int, str]] = {}
    costs: dict[str, Any] = {}
    for row in _rows("exact", "sampled"):
        share = 100 * row["mean"] / row["cross"]
        text = f"{share:.2f}"
        if row["part"] == "sampled":
            text += f" ± {100 * row['se'] / row['cross']:.2f}"
        found.setdefault(row["name"], {})[row["size"]] = text
        costs[row["name"]] = row["power"]
    sizes = sorted({size for cells in found.values() for size in cells})
    order = sorted(
        found, key=lambda name: (costs[name] == "arc", -float(costs[name] != "arc" and costs[name]))
    )
    lines = [
        [
            f"{_COSTS[costs[name]]}; found with {name.split(', ')[-1]}",
            *(found[name].get(k, "") for k in sizes),
        ]
        for name in order
    ]
    return table(["cost, laws", *(f"k = {k}" for k in sizes)], lines)


def curvature() -> str:
    """Of the squared arc, at each size."""
    rows = _rows("curvature")
    head = ["points a half", *(str(row["size"]) for row in rows)]
    return table(head, [["expectation over squared mass", *(f"{row['curvature']:.2f}" for row in rows)]])


def laws() -> str:
    """Mean and share below zero between laws as they meet in fits."""
    found: dict[str, dict[tuple[int, str], str]] = {}
    for row in _rows("laws, epsilon 0", "laws, epsilon 0.1"):
        text = f"{row['mean']:.4f} ± {row['se']:.4f}; {100 * row['below_zero']:.0f}%"
        found.setdefault(row["name"], {})[row["size"], row["part"]] = text
    keys = [(k, "laws, epsilon 0") for k in (2, 8, 32, 128)] + [(32, "laws, epsilon 0.1")]
    head = ["laws", *(f"k = {k}" for k, _ in keys[:-1]), "k = 32, ε a tenth of the mean cost"]
    return table(head, [[name, *(cells.get(key, "") for key in keys)] for name, cells in found.items()])


SECTIONS = {
    "positivity perturbations": perturbations,
    "positivity expectations": expectations,
    "positivity curvature": curvature,
    "positivity laws": laws,
}
