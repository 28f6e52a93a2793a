"""Tables of the study dirichlet."""

from __future__ import annotations

from _dirichlet_choice import GOAL, Row, by_digits, by_frechet, reported
from _interval import interval
from _tables import load, origin, table

_PRIORS = (GOAL, "1/5, 10-d", "1/2, 10-d")
_TITLES = {
    "ours": "`Trace_Sinkhorn`",
    "ours-euclidean": "`Trace_Sinkhorn`, squared distance",
    "sae-v3": "SAE, debiased on one batch (v3)",
    "sae-v3-euclidean": "SAE v3, squared distance",
    "wae": "WAE-MMD",
    "sae-v1": "SAE as published (v1)",
    "ae": "AE",
}


def _groups() -> list[tuple[str, str, list[Row], Row]]:
    """Prior, method, its tested rows, and what the prior itself measures."""
    rows = load("papers_dirichlet")["rows"]
    out = []
    for prior in _PRIORS:
        reference = next((r for r in rows if (r["prior"], r["method"]) == (prior, "reference")), {})
        for method in _TITLES:
            found = reported(rows, prior, method, by_frechet)
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
                _TITLES[method],
                ", ".join(str(row["digits"]) for row in rows),
                ", ".join(str(row["digits_sure"]) for row in rows),
                interval(rows, "vertex_confidence", 2),
                interval(rows, "prior_confidence", 2),
                interval(rows, "edges_sure", 0, 100),
            ]
        )
    references = {prior.split(", ")[1]: reference for prior, _, _, reference in _groups() if reference}
    for dim, reference in references.items():
        digits = ", ".join(map(str, reference["kmeans_digits"]))
        out.append([dim, "centroids of k-means, as many", digits, *[""] * 4])
    images = next(iter(references.values()))["image_confidence"]
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
                _TITLES[method],
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
    """Fréchet distance on the validation images and digits at vertices, by weight."""
    result = load("papers_dirichlet")
    weights = result["settings"]["weights"]
    rows = [row for row in result["rows"] if row["part"] == "validation"]
    out = []
    for method, title in _TITLES.items():
        found = {row["weight"]: row for row in rows if row["method"] == method}
        if found:
            tried = [found[w] for w in weights]
            out.append([title, *(f"{r['frechet']:.0f} / {r['digits']} ({r['digits_sure']})" for r in tried)])
    return table(["weight", *(f"{w:g}" for w in weights)], out)


def digits() -> str:
    """Sixteen dimensions, the weight chosen by the digits at vertices."""
    rows = load("papers_dirichlet")["rows"]
    head = [
        "method",
        "weight",
        "digits at vertices, each seed",
        "of them confident",
        "confidence at vertices",
        "largest share",
        "reconstruction",
        "Fréchet distance",
    ]
    out = []
    for method, title in _TITLES.items():
        found = reported(rows, GOAL, method, by_digits)
        if found and method != "ae":
            out.append(
                [
                    title,
                    f"{found[0]['weight']:g}",
                    ", ".join(str(row["digits"]) for row in found),
                    ", ".join(str(row["digits_sure"]) for row in found),
                    interval(found, "vertex_confidence", 2),
                    interval(found, "largest", 2),
                    interval(found, "reconstruction", 1),
                    interval(found, "frechet", 0),
                ]
            )
    return table(head, out)


SECTIONS = {
    "dirichlet_vertices": vertices,
    "dirichlet_digits": digits,
    "dirichlet_match": match,
    "dirichlet_tuning": tuning,
}
