"""Figures of ``generative_autoencoding.py``: Fréchet distance against reconstruction, and decoded prior draws."""

from __future__ import annotations

import base64
from typing import Any

import _path
import numpy as np
from _choice import reported, weights_tried
from _fits import PRIORS, interval

TITLES = {
    "ae": "AE",
    "vae": "VAE",
    "beta-vae": "β-VAE",
    "wae": "WAE-MMD",
    "swae": "sliced WAE",
    "hae": "Hungarian AE",
    "sae-v1": "SAE, published (v1)",
    "sae-v3": "SAE, same-batch debiasing (v3)",
    "ours": "Trace_Sinkhorn",
}
NAMES = {"gaussian-10": "normal, d = 10", "sphere-10": "sphere, d = 10", "gaussian-64": "normal, d = 64"}
COLOURS = dict(
    zip(
        TITLES,
        ("#999999", "#a6761d", "#e6ab02", "#66a61e", "#1b9e77", "#7570b3", "#d95f02", "#e7298a", "#000000"),
        strict=True,
    )
)


def draw(rows: list[dict[str, Any]]) -> None:
    """Write both figures, as far as rows are there."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    _path.FIGURES.mkdir(parents=True, exist_ok=True)
    priors = [prior for prior in PRIORS if reported(rows, prior, "ours")]
    figure, axes = plt.subplots(
        2, len(priors), figsize=(2.6 + 4.2 * len(priors), 8), squeeze=False, layout="constrained"
    )
    for ax, prior in zip(axes[0], priors, strict=True):
        for method, title in TITLES.items():
            found = reported(rows, prior, method)
            if not found:
                continue
            x, y = (interval(row[name] for row in found) for name in ("reconstruction", "frechet"))
            ax.errorbar(
                x["mean"],
                y["mean"],
                xerr=np.nan_to_num(x["half_width"]),
                yerr=np.nan_to_num(y["half_width"]),
                fmt="*" if method == "ours" else "o",
                markersize=12 if method == "ours" else 6,
                color=COLOURS[method],
                label=title,
                capsize=2,
            )
        ax.set(title=NAMES[prior], xlabel="squared error of a test image", yscale="log")
    for ax, prior in zip(axes[1], priors, strict=True):
        steps = max(row["steps"] for row in rows if (row["prior"], row["part"]) == (prior, "validation"))
        for method in TITLES:
            found = weights_tried(rows, prior, method, steps)
            x, y = ([row[name] for row in found] for name in ("reconstruction", "frechet"))
            style = "*-" if method == "ours" else "o-"
            ax.plot(x, y, style, color=COLOURS[method], linewidth=1, markersize=5)
        ax.set(xlabel=f"squared error of a validation image, {steps} steps", yscale="log")
    for line, what in zip(axes, ("chosen weights", "all weights"), strict=True):
        line[0].set_ylabel(f"Fréchet distance of generated images: {what}")
    for ax in axes.flat:
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        ax.yaxis.set_major_formatter("{x:.0f}")
        ax.yaxis.set_minor_formatter("")
    handles, labels = max((ax.get_legend_handles_labels() for ax in axes[0]), key=lambda pair: len(pair[0]))
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(_path.FIGURES / "generative_autoencoding.png", dpi=110)
    plt.close(figure)
    _draw_samples(rows, plt)


def _draw_samples(rows: list[dict[str, Any]], plt: Any) -> None:
    """Decoded prior draws at d = 64, a row a method."""
    kept = {
        method: row["samples"]
        for method in ("beta-vae", "wae", "hae", "sae-v1", "sae-v3", "ours")
        for row in reported(rows, "gaussian-64", method)
        if "samples" in row
    }
    if not kept:
        return
    figure, axes = plt.subplots(len(kept), 1, figsize=(7.4, 0.78 * len(kept)), squeeze=False)
    for ax, (method, text) in zip(axes[:, 0], kept.items(), strict=True):
        images = np.frombuffer(base64.b64decode(text), np.uint8).reshape(-1, 28, 28)
        ax.imshow(np.hstack(list(images)), cmap="gray_r", vmin=0, vmax=255)
        ax.set(xticks=[], yticks=[])
        ax.set_ylabel(TITLES[method].replace(", ", ",\n"), rotation=0, ha="right", va="center", fontsize=7)
    figure.subplots_adjust(left=0.24, right=0.99, top=0.99, bottom=0.01, hspace=0.08)
    figure.savefig(_path.FIGURES / "generative_autoencoding_samples.png", dpi=110)
    plt.close(figure)
