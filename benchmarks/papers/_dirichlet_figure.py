"""Figures of ``dirichlet.py``: decoded vertices of every method, and edges of one."""

from __future__ import annotations

import base64
import zlib
from typing import Any

import _path
import numpy as np
from _dirichlet_choice import GOAL, by_digits, by_frechet, reported

TITLES = {
    "ours": "Trace_Sinkhorn",
    "ours-euclidean": "Trace_Sinkhorn,\nsquared distance",
    "sae-v3": "SAE v3",
    "sae-v3-euclidean": "SAE v3,\nsquared distance",
    "wae": "WAE-MMD",
    "sae-v1": "SAE v1",
    "ae": "AE",
}
#: Rows of sheets: a prior, a rule that chose the weight, and what is said of it.
LINES = (
    (GOAL, by_frechet, "Dir(1/5), 16-d"),
    (GOAL, by_digits, "Dir(1/5), 16-d,\nweight by digits"),
    ("1/5, 10-d", by_frechet, "Dir(1/5), 10-d"),
    ("1/2, 10-d", by_frechet, "Dir(1/2), 10-d"),
)


def draw(rows: list[dict[str, Any]], frames: int) -> None:
    """Write both, as far as rows are there.

    :param frames: images along an edge
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def picture(prior: str, method: str, rule: Any) -> dict[str, Any] | None:
        found = [row for row in reported(rows, prior, method, rule) if "vertex_images" in row]
        return found[0] if found else None

    lines = [line for line in LINES if any(picture(line[0], method, line[1]) for method in TITLES)]
    ratios = [1.0 if prior == GOAL else 0.4 for prior, *_ in lines]
    size = (1.7 * len(TITLES), 1.9 * sum(ratios) + 0.5)
    figure, axes = plt.subplots(
        len(lines), len(TITLES), figsize=size, layout="constrained", height_ratios=ratios, squeeze=False
    )
    for axis, title in zip(axes[0], TITLES.values(), strict=True):
        axis.set_title(title, fontsize=9)
    for sheets, (prior, rule, said) in zip(axes, lines, strict=True):
        for axis, method in zip(sheets, TITLES, strict=True):
            axis.set(xticks=[], yticks=[])
            if method == "ours":
                axis.set_ylabel(said, fontsize=8)
            row = picture(prior, method, rule)
            if row is None:
                axis.set_axis_off()
                continue
            axis.imshow(unpacked(row["vertex_images"], 4 if prior == GOAL else 5), cmap="gray_r")
            axis.set_xlabel(f"{row['digits']} digits", fontsize=8)
    _path.FIGURES.mkdir(parents=True, exist_ok=True)
    figure.savefig(_path.FIGURES / "dirichlet_vertices.png", dpi=130)
    plt.close(figure)
    row = picture(GOAL, "ours-euclidean", by_digits)
    if row is None:
        return
    figure, axis = plt.subplots(figsize=(5.2, 4), layout="constrained")
    axis.imshow(unpacked(row["edge_images"], frames), cmap="gray_r")
    axis.set(xticks=[], yticks=[])
    axis.set_title("along edges: Trace_Sinkhorn, squared distance, Dirichlet(1/5), 16-d", fontsize=8)
    figure.savefig(_path.FIGURES / "dirichlet_edges.png", dpi=150)
    plt.close(figure)


def unpacked(text: str, columns: int) -> np.ndarray:
    """A sheet of square images, ``columns`` in a row, from the text."""
    greys = np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype=np.uint8).reshape(-1, 28, 28)
    rows = [np.concatenate(list(line), 1) for line in greys.reshape(-1, columns, 28, 28)]
    return np.concatenate(rows, 0)
