"""Tables of the study canvas."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from _tables import load, origin, table
from scipy.stats import t as student

_TITLES = {
    "joint": "`Trace_Sinkhorn`, joint",
    "marginal": "`Trace_Sinkhorn`, sum of two costs",
    "AIR": "AIR, `Trace_ELBO`",
}


def _interval(rows: list[dict[str, Any]], name: str, scale: float, digits: int) -> str:
    """Mean and 95% half-width (Student) over seeds."""
    values = scale * np.array([row[name] for row in rows])
    if len(values) < 2:
        return f"{values.mean():.{digits}f}"
    half = student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return f"{values.mean():.{digits}f} ± {half:.{digits}f}"


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
            _interval(rows, "iou", 1, 3),
            _interval(rows, "ink_iou", 1, 3),
            _interval(rows, "centre", 1, 2),
            _interval(rows, "side_bias", 1, 3),
            _interval(rows, "clean_error", 1000, 2),
            _interval(rows, "cpu_seconds", 1, 0),
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
                _interval(rows, "generated_energy", 1, 3),
                _interval(rows, "confidence", 100, 1),
                _interval(rows, "class_entropy", 1, 2),
                _interval(rows, "accuracy", 100, 1),
                _interval(rows, "distance_correlation", 1, 3),
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
