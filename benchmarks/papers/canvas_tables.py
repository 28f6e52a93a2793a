"""Tables of the study canvas."""

from __future__ import annotations

from typing import Any

from _interval import interval
from _tables import load, origin, table

_TITLES = {
    "joint": "`Trace_Sinkhorn`, joint",
    "marginal": "`Trace_Sinkhorn`, sum of two costs",
    "AIR": "AIR, `Trace_ELBO`",
}


def _tested(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows of the test canvases by what the first two columns say."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["part"] == "test":
            found.setdefault(f"{_TITLES[row['method']]} | {row['weight']:g}", []).append(row)
    return dict(sorted(found.items(), key=lambda item: [*_TITLES].index(item[1][0]["method"])))


def where() -> str:
    """Boxes and reconstructions of test canvases."""
    result = load("papers_canvas")
    data = result["settings"]["of_data"]
    lines = [
        [
            name,
            interval(rows, "iou", 3),
            interval(rows, "ink_iou", 3),
            interval(rows, "centre", 2),
            interval(rows, "side_bias", 3),
            interval(rows, "clean_error", 2, 1000),
            interval(rows, "cpu_seconds", 0),
        ]
        for name, rows in _tested(result["rows"]).items()
    ]
    untrained = [f"{data['untrained_iou']:.3f}", "", f"{data['untrained_centre']:.2f}"]
    lines.append(["encoder before training | ", *untrained, "", "", ""])
    lines.append(["the noisy canvas itself | ", "", "", "", "", f"{1000 * data['noisy_error']:.2f}", ""])
    lines.append(["an empty canvas | ", "", "", "", "", f"{1000 * data['black_error']:.2f}", ""])
    head = [
        "method | weight",
        "IoU of boxes",
        "IoU of ink",
        "centre off by, pixels",
        "side, of the true one",
        "squared error to the clean canvas × 1000",
        "CPU s a fit",
    ]
    return _wide(head, lines) + origin(result)


def samples() -> str:
    """Samples of the program, and what is left of dependence."""
    result = load("papers_canvas")
    data = result["settings"]["of_data"]
    lines = []
    for name, rows in _tested(result["rows"]).items():
        p_values = ", ".join(f"{row['p_independent']:.3f}" for row in rows)
        lines.append(
            [
                name,
                interval(rows, "generated_energy", 3),
                interval(rows, "confidence", 1, 100),
                interval(rows, "class_entropy", 2),
                interval(rows, "accuracy", 1, 100),
                interval(rows, "distance_correlation", 3),
                p_values,
            ]
        )
    real = [
        f"{data['generated_energy']:.3f}",
        f"{100 * data['confidence']:.1f}",
        f"{data['class_entropy']:.2f}",
        f"{100 * data['accuracy']:.1f}",
    ]
    lines.append(["real digits, without noise | ", *real, "0", ""])
    head = [
        "method | weight",
        "energy distance of samples",
        "confidence in samples, %",
        "entropy of their classes",
        "reconstructed digits recognised, %",
        "distance correlation of what and where",
        "its p-values",
    ]
    return _wide(head, lines)


def choice() -> str:
    """All weights that were tried, on the validation canvases."""
    result = load("papers_canvas")
    lines = []
    for method, title in _TITLES.items():
        rows = [row for row in result["rows"] if row["method"] == method and row["part"] == "validation"]
        for row in sorted(rows, key=lambda row: row["weight"]):
            lines.append(
                [
                    f"{title} | {row['weight']:g}",
                    f"{row['iou']:.3f}",
                    f"{1000 * row['clean_error']:.2f}",
                    f"{row['generated_energy']:.3f}",
                    f"{100 * row['accuracy']:.1f}",
                    f"{100 * row['confidence']:.1f}",
                ]
            )
    head = [
        "method | weight",
        "IoU of boxes",
        "error to the clean canvas × 1000",
        "energy distance of samples",
        "recognised, %",
        "confidence, %",
    ]
    return _wide(head, lines)


def _wide(head: list[str], lines: list[list[str]]) -> str:
    """A table whose first entry holds two columns."""
    return table(head[0].split(" | ") + head[1:], [[*line[0].split(" | "), *line[1:]] for line in lines])


SECTIONS = {"canvas": where, "canvas_samples": samples, "canvas_choice": choice}
