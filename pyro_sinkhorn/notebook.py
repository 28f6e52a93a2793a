"""What Jupyter shows of a program and of its reports."""

from __future__ import annotations

from html import escape
from typing import Any

import torch
from torch import nn

#: Points of a curve, and its size in pixels.
_POINTS, _WIDTH, _HEIGHT = 120, 360, 60


class Printed:
    """A report whose text is its table: a notebook shows it in fixed width."""

    def _repr_html_(self) -> str:
        return f'<pre style="line-height: 1.2">{escape(str(self))}</pre>'


def program_html(program: Any) -> str:
    """A table of what a program is made of and where its training stands, with the curve of its loss."""
    guide = getattr(program.guide, "__name__", type(program.guide).__name__)
    networks = {**program.modules, "guide": program.guide}
    sizes = {
        name: sum(p.numel() for p in module.parameters() if not _unmade(p))
        for name, module in networks.items()
        if isinstance(module, nn.Module)
    }
    rows = {
        "model": program._name(),
        "guide": guide,
        "loss": repr(program.loss) if hasattr(program.loss, "config") else type(program.loss).__name__,
        "parameters": ", ".join(f"{name} {size:,}" for name, size in sizes.items()) or "none in networks",
        "steps": f"{program.num_steps:,}",
    }
    rows |= {f"last {name}": f"{value:.5g}" for name, value in program.history.last().items()}
    calibrated = "by calibrate()" if program.calibration is not None else "by fit()"
    rows["posterior"] = f"yes, {calibrated}" if program.has_posterior else "no: encode() gives encoder draws"
    body = "".join(
        f"<tr><th style='text-align:left'>{escape(name)}</th><td style='text-align:left'>{escape(value)}</td></tr>"
        for name, value in rows.items()
    )
    return f"<b>SinkhornProgram</b><table>{body}</table>{_curve(program.history.loss)}"


def _unmade(parameter: Any) -> bool:
    return isinstance(parameter, nn.parameter.UninitializedParameter)


def _curve(values: list[float]) -> str:
    """The loss against steps, smoothed to as many points as can be told apart."""
    if len(values) < 3:
        return ""
    parts = torch.tensor(values, dtype=torch.float64).tensor_split(min(_POINTS, len(values)))
    means = torch.stack([part.mean() for part in parts])
    # The first steps are so much larger that they would flatten all that follows.
    low, high = float(means.min()), float(means.quantile(0.95))
    heights = ((means - low) / max(high - low, 1e-12)).clamp(0, 1)
    points = " ".join(
        f"{i * _WIDTH / (len(means) - 1):.1f},{(1 - float(h)) * (_HEIGHT - 4) + 2:.1f}"
        for i, h in enumerate(heights)
    )
    return (
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" role="img" aria-label="loss against steps">'
        f'<polyline fill="none" stroke="#4c72b0" stroke-width="1.5" points="{points}"/></svg>'
    )
