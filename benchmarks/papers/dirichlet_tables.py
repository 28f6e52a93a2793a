"""Tables of the study dirichlet."""

from __future__ import annotations

from typing import Any

from _interval import interval
from _tables import load, origin, table

_PRIORS = ("1/5, 16-d", "1/5, 10-d", "1/2, 10-d")
_METHODS = ("ours", "sae-v3", "wae", "sae-v1", "ae")


def _groups() -> list[tuple[str, str, list[dict[str, Any]], dict[str, Any]]]:
    """Prior, method, its tested rows, and what the prior itself measures."""
    rows = [row for row in load("papers_dirichlet")["rows"] if row["part"] == "test"]
    out = []
    for prior in _PRIORS:
        mine = [row for row in rows if row["prior"] == prior]
        reference = next((row for row in mine if row["method"] == "reference"), {})
        for method in _METHODS:
            found = [row for row in mine if row["method"] == method]
            if found:
                out.append((prior, method, found, reference))
    return out


def vertices() -> str:
    """What vertices and edges decode to."""
    head = [
        "prior",
        "method",
        "digits at vertices, each seed",
        "of them confident",
        "confidence at vertices",
        "at prior draws",
        "confident frames of edges, %",
    ]
    out = []
    for prior, method, rows, _ in _groups():
        out.append(
            [
                f"Dir({prior.replace(', ', '), ')}",
                method,
                ", ".join(str(row["digits"]) for row in rows),
                ", ".join(str(row["digits_sure"]) for row in rows),
                interval(rows, "vertex_confidence", 2),
                interval(rows, "prior_confidence", 2),
                interval(rows, "edges_sure", 0, 100),
            ]
        )
    images = next(reference["image_confidence"] for *_, reference in _groups() if reference)
    return table(head, out) + f"\n\nConfidence at test images: {images:.2f}."


def match() -> str:
    """Codes against the prior, and images."""
    head = [
        "prior",
        "method",
        "weight",
        "energy distance × 1000 (sd at equal laws)",
        "of shares × 1000",
        "largest share (prior's)",
        "reconstruction",
        "Fréchet distance",
        "CPU s a fit",
    ]
    out = []
    for prior, method, rows, reference in _groups():
        out.append(
            [
                f"Dir({prior.replace(', ', '), ')}",
                method,
                f"{rows[0]['weight']:g}",
                f"{interval(rows, 'energy', 1, 1000)} ({1000 * reference['energy_floor_sd']:.2f})",
                interval(rows, "energy_plain", 1, 1000),
                f"{interval(rows, 'largest', 2)} ({reference['largest']:.2f})",
                interval(rows, "reconstruction", 1),
                interval(rows, "frechet", 0),
                interval(rows, "fit_cpu_seconds", 0),
            ]
        )
    return table(head, out) + origin(load("papers_dirichlet"))


def tuning() -> str:
    """Fréchet distance on the validation images, by weight."""
    result = load("papers_dirichlet")
    weights = result["settings"]["weights"]
    rows = [row for row in result["rows"] if row["part"] == "validation"]
    out = []
    for method in dict.fromkeys(row["method"] for row in rows):
        found = {row["weight"]: row["frechet"] for row in rows if row["method"] == method}
        out.append([method, *(f"{found[w]:.0f}" if w in found else "–" for w in weights)])
    return table(["weight", *(f"{w:g}" for w in weights)], out)


SECTIONS = {"dirichlet_vertices": vertices, "dirichlet_match": match, "dirichlet_tuning": tuning}
