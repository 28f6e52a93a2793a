"""Tables of the study encoder_only."""

from __future__ import annotations

from _interval import interval
from _tables import load, origin, table

_TITLES = {
    "square": "Swiss roll to the square",
    "sphere": "Swiss roll to the sphere",
    "mnist": "MNIST to the 10-d sphere",
}


def maps() -> str:
    """Every method on every space."""
    result = load("papers_encoder_only")
    rows = result["rows"]
    out = []
    for space, title in _TITLES.items():
        mine = [row for row in rows if row["space"] == space and row["method"] != "agreement"]
        (reference,) = (row for row in mine if row["method"] == "reference")
        for method in dict.fromkeys(row["method"] for row in mine if row["method"] != "reference"):
            found = [row for row in mine if row["method"] == method]
            labels = interval(found, "knn_accuracy", 1, 100) if space == "mnist" else "–"
            out.append(
                [
                    title,
                    method,
                    interval(found, "energy", 2, 1000),
                    f"{1000 * reference['floor_95']:.2f}",
                    interval(found, "trustworthiness", 3),
                    interval(found, "continuity", 3),
                    labels,
                    "–" if method == "untrained" else interval(found, "cpu_ms_per_step", 0),
                ]
            )
    head = [
        "map",
        "method",
        "energy distance to the prior × 1000",
        "95% of equal laws below",
        "trustworthiness",
        "continuity",
        "k-NN accuracy, %",
        "CPU ms a step",
    ]
    (pixels,) = (row["knn_pixels"] for row in rows if "knn_pixels" in row)
    return table(head, out) + f"\n\nk-NN on the pixels: {100 * pixels:.1f}%." + origin(result)


def agreement() -> str:
    """Unrolled gradients beside the envelope gradient."""
    rows = load("papers_encoder_only")["rows"]
    (found,) = (row for row in rows if row["method"] == "agreement")
    names = {
        "envelope": "envelope, marginals to 1%",
        "unrolled, 50": "unrolled, L = 50",
        "unrolled, 1%": "unrolled, marginals to 1%",
    }
    return table(
        ["gradient", "iterations", "cosine with exact transport's", "CPU ms"],
        [
            [
                words,
                f"{found[key]['iterations']:.0f}",
                f"{found[key]['cosine']:.2f}",
                f"{1000 * found[key]['seconds']:.0f}",
            ]
            for key, words in names.items()
        ],
    )


SECTIONS = {"encoder_only": maps, "encoder_only_gradients": agreement}
