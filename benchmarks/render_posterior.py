"""Tables of the posterior guide: exact answers, calibration by support, learning beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import fmean
from typing import Any

from _tables import load, origin, table

#: Targets in words, by what the rows call them.
_TARGETS = {
    "mean_in_prior_sds": "mean error {} prior sd",
    "sd": "sd within {:.0%}",
    "covariance": "covariance error {}",
    "responsibility": "largest error {}",
    "mean": "mean within {}",
}


def _by(rows: list[dict[str, Any]], *keys: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return {key: sorted(rows, key=lambda row: row["seed"]) for key, rows in found.items()}


def _each(values: Iterable[float], digits: int = 3) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values)


def _seeds_reached(rows: list[dict[str, Any]]) -> str:
    return f"{sum(all(row['reached'].values()) for row in rows)} of {len(rows)}"


def _cpu(rows: list[dict[str, Any]]) -> str:
    return f"{fmean(row['cpu_seconds'] for row in rows):.0f}"


def exact() -> str:
    """The guide's moments against exact ones, seed by seed."""
    result = load("posterior_exact")
    columns = ("mean_in_posterior_sds", "mean_in_prior_sds", "sd_ratio", "sd_rms", "covariance")
    lines = []
    for (problem, steps), rows in _by(result["rows"], "problem", "steps").items():
        if "responsibility" in rows[0]["reached"]:
            continue
        wanted = "; ".join(
            _TARGETS[name].format(result["settings"]["targets"][name]) for name in rows[0]["reached"]
        )
        parts = [(f"{problem}, {steps} steps", rows)]
        if "refined" in rows[0]:
            refined = [row["refined"] for row in rows]
            parts.append((f"the same, refined by {refined[0]['steps']} steps", refined))
        for name, found in parts:
            values = [_each(row[column] for row in found) for column in columns]
            lines.append([name, *values, wanted, _seeds_reached(found), _cpu(found)])
    head = [
        "program", "mean error, posterior sds", "prior sds", "sd ratio", "its rms from 1", "covariance error", "target",
        "seeds that reach it", "CPU seconds",
    ]  # fmt: skip
    return table(head, lines) + origin(result)


def responsibilities() -> str:
    """Probabilities of the discrete latent."""
    result = load("posterior_exact")
    keys = ("mean_responsibility_error", "99%_responsibility_error", "responsibility")
    lines = []
    for (problem, steps), rows in _by(result["rows"], "problem", "steps").items():
        if "responsibility" in rows[0]["reached"]:
            values = [_each((row[key] for row in rows), 4) for key in keys]
            lines.append([f"{problem}, {steps} steps", *values, _seeds_reached(rows), _cpu(rows)])
    head = ["program", "mean error", "99% quantile", "largest", "seeds below .02", "CPU seconds"]
    return table(head, lines) + origin(result)


def calibration() -> str:
    """Simulation-based calibration, support by support."""
    result = load("posterior_calibration")

    def passed(found: list[dict[str, Any]], key: str) -> str:
        return f"{sum(row[key] for row in found)} of {len(found)}"

    lines = []
    for (program, guide, steps), rows in _by(result["rows"], "program", "guide", "steps").items():
        again = [row["repeated"] for row in rows if "repeated" in row]
        lines.append(
            [
                program,
                guide,
                str(steps),
                passed([*rows, *again], "passed"),
                ", ".join(f"{row['p_value']:.2g}" for row in (*rows, *again)),
                ", ".join(sorted({f"{n}: {v}" for row in (*rows, *again) for n, v in row["failed"].items()})),
                passed([*rows, *again], "coverage_passed"),
                passed([*rows, *again], "tarp_passed"),
                _cpu(rows),
            ]
        )
    order = {name: i for i, name in enumerate(("AutoPosterior", "AutoImplicit"))}
    lines.sort(key=lambda line: (order[line[1]], int(line[2])))
    head = [
        "program", "guide", "steps", "SBC passed", "p-values", "what failed", "coverage passed", "TARP passed",
        "CPU seconds",
    ]  # fmt: skip
    return table(head, lines) + origin(result)


def learning() -> str:
    """What was learned beside the guide, and whether it is calibrated."""
    result = load("learning_and_calibration")
    lines = []
    for (case,), rows in _by(result["rows"], "case").items():
        truth, start = ("theta {:g}, s {:g}".format(*pair) for pair in result["settings"]["cases"][case])
        lines.append([f"**{case}**: truth {truth}; start {start}", *[""] * 5])
        best = {row["seed"]: row["likelihood_estimate"] for row in rows}
        found = [_each(best[seed][name] for seed in sorted(best)) for name in ("theta", "s")]
        lines.append(["maximum likelihood", *found, "", "", ""])
        for (method, steps), own in _by(rows, "method", "steps").items():
            learned = [_each(row["learned"][name] for row in own) for name in ("theta", "s")]
            p_values = ", ".join(f"{row['p_value']:.2g}" for row in own)
            passed = f"{sum(row['passed'] for row in own)} of {len(own)}"
            lines.append([f"{method}, {steps} steps", *learned, passed, p_values, _cpu(own)])
    head = ["method", "theta", "s", "SBC passed", "p-values", "CPU seconds"]
    return table(head, lines) + origin(result)


SECTIONS: dict[str, Callable[[], str]] = {
    "posterior exact": exact,
    "posterior responsibilities": responsibilities,
    "posterior calibration": calibration,
    "posterior learning": learning,
}
