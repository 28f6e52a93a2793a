"""Tables of the study wasserstein_vi."""

from __future__ import annotations

from typing import Any

from _interval import interval
from _tables import load, origin, table

FLOOR, TUNING_SEED = "floors", 100
WEIGHTS = {"VAE": "rate", "VAE, then energy score": "rate", "latents": "prior weight"}


def _groups() -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]], dict[str, Any]]:
    """Result, rows by method, floors."""
    result = load("papers_wasserstein_vi")
    fits = [row for row in result["rows"] if row["seed"] != TUNING_SEED and row["method"] != FLOOR]
    (floor,) = (row for row in result["rows"] if row["method"] == FLOOR)
    names = dict.fromkeys(row["method"] for row in fits)
    return result, {name: [row for row in fits if row["method"] == name] for name in names}, floor


def quality() -> str:
    """Images and codes."""
    result, groups, floor = _groups()
    lines = [
        [
            name,
            f"{WEIGHTS.get(name, 'autoencoding weight' if 'auto' in name else 'data weight')} {rows[0]['candidate']:g}",
            interval(rows, "mse", 4),
            interval(rows, "latent", 4),
            interval(rows, "frechet", 1),
            interval(rows, "ms_per_step", 0),
        ]
        for name, rows in groups.items()
    ]
    lines.append(
        [
            "nothing learned, or nothing to be seen",
            "–",
            f"mean image {floor['mean_image_mse']:.4f}; components {floor['components_mse']:.4f}",
            f"{floor['latent']:.4f}",
            f"{floor['frechet']:.1f}",
            "–",
        ]
    )
    head = [
        "method",
        "chosen",
        "squared error a pixel",
        "codes to prior, energy distance",
        "Fréchet distance",
        "CPU ms a step",
    ]
    return table(head, lines) + origin(result)


def posterior() -> str:
    """Is the guide a posterior of the program it was fitted with?"""
    _, groups, _ = _groups()
    lines = [
        [
            name,
            interval(rows, "sbc", 1),
            interval(rows, "coverage", 3),
            interval(rows, "coverage_joint", 3),
            interval(rows, "error_ratio", 2),
            interval(rows, "contraction", 2),
        ]
        for name, rows in groups.items()
    ]
    head = [
        "method",
        "latents that fail calibration, of 10",
        "truths in the central 90%",
        "in the joint 90% region",
        "error over claimed spread",
        "contraction",
    ]
    return table(head, lines)


SECTIONS = {"wasserstein_vi": quality, "wasserstein_vi_posterior": posterior}
