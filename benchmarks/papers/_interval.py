"""Mean and 95% interval over seeds, as the tables of the papers' studies show them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.stats import t as student


def interval(rows: list[dict[str, Any]], name: str, digits: int, scale: float = 1.0) -> str:
    """``mean ± half-width`` by Student's t; the number alone for one seed."""
    values = scale * np.array([row[name] for row in rows], dtype=float)
    if len(values) < 2:
        return f"{values.mean():.{digits}f}"
    half = student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return f"{values.mean():.{digits}f} ± {half:.{digits}f}"
