"""Tables of the solver's speed: beside its peers, at equal shrinkage, and how it grows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from _tables import ROOT, load, origin, table

Record = dict[str, Any]
_UNMEASURED = "Not measured yet."
_NAMES = {
    "ours": "**`sinkhorn_divergence`**",
    "ours, log backend": '`backend="log"`',
    "unrolled": "unrolled",
    "log domain, envelope": "log domain, envelope",
    "geomloss": "geomloss",
    "POT": "POT",
    "OTT": "OTT",
    "OTT, tuned": "OTT, tuned",
    "flash-sinkhorn": "flash-sinkhorn",
}

#: Largest batch that the table of shrinkage extrapolates to.
FARTHEST = 10_000


def _measured(name: str) -> bool:
    return (ROOT / "benchmarks" / "results" / f"{name}.json").exists()


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _rows(threads: int | None = None) -> list[Record]:
    rows = [row for row in load("solver_peers")["rows"] if threads in (None, row["threads"])]
    return sorted(rows, key=lambda row: (row["threads"], row["n"], row["d"], -row["kappa"]))


def _attempt(method: Record | None, index: int | None) -> Record | None:
    if method is None or index is None:
        return None
    return next(a for a in method["attempts"] if a["index"] == index)


def _time(method: Record | None, target: str) -> str:
    """Milliseconds where the accuracy was reached; else the nearest that was, or why there is nothing."""
    if method is None:
        return ""
    best = _attempt(method, method["best"].get(target))
    if best is not None:
        return _ms(best["ms"])
    if not method["attempts"]:
        end = method["end"]
        return "–" if end.startswith("skipped") else end
    nearest = min(method["attempts"], key=lambda a: a["gradient_error"])
    why = "" if method["end"] == "done" else f"; {method['end']}"
    return f"not reached ({100 * nearest['gradient_error']:.2g}% at {_ms(nearest['ms'])}{why})"


def _place(row: Record) -> list[str]:
    return [f"{row['n']:,}", str(row["d"]), f"{row['kappa']:g}"]


def peers(target: str, threads: int) -> str:
    """Milliseconds of every method at one accuracy."""
    if not _measured("solver_peers") or not (rows := _rows(threads)):
        return _UNMEASURED
    ran = [
        name for name in _NAMES if any(row["methods"].get(name, {"attempts": []})["attempts"] for row in rows)
    ]
    lines = [[*_place(row), *(_time(row["methods"].get(name), target) for name in ran)] for row in rows]
    reasons = {
        f"{name} ({row['methods'][name]['end'].removeprefix('skipped: ')})": None
        for row in rows
        for name in _NAMES
        if name in row["methods"] and row["methods"][name]["end"].startswith("skipped")
    }
    skipped = f"\n\nSkipped: {'; '.join(reasons)}." if reasons else ""
    head = ["n = m", "d", "kappa", *(_NAMES[name] for name in ran)]
    return table(head, lines) + skipped + origin(load("solver_peers"))


def _with_figure(text: str, name: str, caption: str) -> str:
    """A table and the figure of the same results, where there are any."""
    path = ROOT / "docs" / "figures" / f"{name}.png"
    return f"{text}\n\n![{caption}](figures/{name}.png)" if path.exists() else text


def own() -> str:
    """What there is to know of the library's own solver, at the looser accuracy."""
    if not _measured("solver_peers"):
        return _UNMEASURED
    lines = []
    for row in _rows():
        ours, halves = row["methods"].get("ours"), row["methods"].get("ours, independent halves")
        best = _attempt(ours, ours["best"].get("0.01")) if ours else None
        if ours is None or best is None:
            continue
        default, cold = _attempt(ours, ours["default"]), ours["attempts"][0].get("cold_ms")
        split = _attempt(halves, halves["best"].get("0.01")) if halves else None
        lines.append(
            [
                *_place(row),
                str(row["threads"]),
                best["variant"],
                best["knob"].removeprefix("tolerance "),
                _ms(best["ms"]),
                f"{best['value_error']:.0e}",
                str(best["passes"]),
                f"{row['floor']['fraction']:.0%}" if row["floor"] else "",
                f"{_ms(default['ms'])} ({default['gradient_error']:.0e})" if default else "",
                _ms(cold) if cold else "",
                f"{split['ms'] / best['ms']:.2f}" if split else "",
            ]
        )
    head = [
        "n = m",
        "d",
        "kappa",
        "threads",
        "backend",
        "tolerance",
        "ms",
        "value error",
        "passes",
        "of the floor",
        "ms at the defaults (gradient error)",
        "first call, ms",
        "independent halves, times",
    ]
    return table(head, lines) + origin(load("solver_peers"))


def methods() -> str:
    """Memory, first call, passes and errors of every method on one cell, at 1e-2 and at the defaults."""
    if not _measured("solver_peers"):
        return _UNMEASURED
    rows = [row for row in _rows(1) if (row["n"], row["d"], row["kappa"]) == (1024, 8, 0.2)]
    if not rows:
        return _UNMEASURED
    lines = []
    for name, label in _NAMES.items():
        method = rows[0]["methods"].get(name)
        if method is None or not method["attempts"]:
            continue
        best = _attempt(method, method["best"].get("0.01"))
        default = _attempt(method, method["default"])
        lines.append(
            [
                label,
                " ".join(filter(None, (best["variant"], best["knob"]))) if best else "not reached",
                _ms(best["ms"]) if best else "",
                f"{best['value_error']:.0e}" if best else "",
                str(best["passes"] or "") if best else "",
                f"{best['peak_mb']:.0f}" if best and best["peak_mb"] is not None else "",
                _ms(method["attempts"][0]["cold_ms"]),
                f"{_ms(default['ms'])}; {100 * default['gradient_error']:.2g}%; {100 * default['value_error']:.2g}%"
                if default
                else "",
            ]
        )
    head = [
        "method",
        "setting",
        "ms",
        "value error",
        "passes",
        "peak, MB",
        "first call, ms",
        "as it comes: ms; gradient error; value error",
    ]
    return table(head, lines)


def shrinkage() -> str:
    """Batch and time that same-batch debiasing needs to be as right."""
    if not _measured("solver_shrinkage"):
        return _UNMEASURED
    from _equal_shrinkage import conclusions

    result = load("solver_shrinkage")
    lines = []
    for record in conclusions(result["rows"]):
        # A power law fitted to a factor of eight says nothing of what lies a factor of ten beyond.
        far = record["batch"] is not None and record["batch"] > FARTHEST
        batch = "never" if record["batch"] is None else f"{record['batch']:,.0f}"
        batch = f"above {FARTHEST:,}" if far else batch
        note = " (extrapolated)" if record["extrapolated"] and record["batch"] is not None else ""
        lines.append(
            [
                str(record["d"]),
                f"{record['target']:.3f}" + (" (its own)" if record["name"] == "as independent" else ""),
                f"{record['independent_batch']}",
                f"{record['independent_ms']:.1f}",
                batch + note,
                "" if record["ms"] is None or far else _ms(record["ms"]),
            ]
        )
    head = [
        "d",
        "error of the mean singular value",
        "batch, `independent`",
        "ms a step",
        'batch, `debias="self"`',
        "ms a step",
    ]
    return table(head, lines) + origin(result)


def scaling() -> str:
    """Fitted exponents."""
    if not _measured("solver_scaling"):
        return _UNMEASURED
    from scaling import exponents

    result = load("solver_scaling")
    names = {"n": "n = m", "d": "d", "kappa": "epsilon", "groups": "number of problems"}
    lines = [
        [
            names[e["axis"]],
            f"`{e['backend']}`",
            {"ms": "time", "peak_mb": "peak memory"}[e["quantity"]],
            f"{e['exponent']:.2f} ± {e['half_width']:.2f}",
            f"{e['from']:g} to {e['to']:g} ({e['points']} points)",
        ]
        for e in exponents(result["rows"])
    ]
    return table(["in", "backend", "of", "exponent", "fitted over"], lines) + origin(result)


def streaming() -> str:
    """Time and memory without the matrix, and what is lost by it."""
    if not _measured("streaming"):
        return _UNMEASURED
    result = load("streaming")
    lines = [
        [
            f"{row['n']:,}",
            "to itself" if row["symmetric"] else "to another cloud",
            str(row["passes"]),
            f"{row['solver_seconds']:.1f}",
            f"{row['gradient_seconds']:.1f}",
            f"{row['megabytes']:.0f}",
            f"{row['matrix_megabytes']:,.0f}",
        ]
        for row in result["scale"]
    ]
    head = [
        "n = m",
        "transport",
        "passes",
        "solver, s",
        "gradient, s",
        "memory beyond the clouds, MB",
        "the matrix, MB",
    ]
    return table(head, lines) + origin(result)


SECTIONS: dict[str, Callable[[], str]] = {
    "speed percent": lambda: _with_figure(peers("0.01", 1), "solver_peers", "Time against n"),
    "speed permille": lambda: peers("0.001", 1),
    "speed two threads": lambda: peers("0.01", 2),
    "speed own": own,
    "speed methods": methods,
    "speed shrinkage": shrinkage,
    "speed streaming": streaming,
    "speed scaling": lambda: _with_figure(scaling(), "solver_scaling", "Growth of time and memory"),
}
