"""Tables of docs/distributed.md: what a second process brings, and the reckoning for eight GPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from _tables import ROOT, load, origin, table

Record = dict[str, Any]

#: Seconds; operations and bytes a second. docs/distributed.md says why.
HOST, MATCH, MESSAGES, COMPUTE, BANDWIDTH = 8e-3, 0.3e-3, 0.55e-3, 200e12, 350e9
RANKS = 8


def scaling() -> str:
    """CPU and wall time of a step with one process and with two."""
    if not (ROOT / "benchmarks" / "results" / "distributed_scaling.json").exists():
        return "Not measured yet."
    result = load("distributed_scaling")
    cells = {(row["width"], row["batch"], row["processes"]): row for row in result["rows"]}
    rows = []
    for width, batch in sorted({(row["width"], row["batch"]) for row in result["rows"]}):
        if (width, batch, 1) not in cells or (width, batch, 2) not in cells:
            continue
        one, two = cells[width, batch, 1], cells[width, batch, 2]
        sent = two["bytes"]
        rows.append(
            [
                f"{one['parameters'] / 1e6:.2g} M",
                str(batch),
                f"{one['cpu_ms']:.1f}",
                f"{two['cpu_ms']:.1f}",
                f"{one['cpu_ms'] / two['cpu_ms']:.2f}",
                f"{one['match_cpu_ms']:.1f} / {two['match_cpu_ms']:.1f}",
                f"{one['wall_ms']:.0f} / {two['wall_ms']:.0f}",
                f"{sent['all_gather'] / 1e3:.0f} kB",
                f"{sent['all_reduce'] / 1e6:.1f} MB",
            ]
        )
    head = [
        "parameters",
        "data a step",
        "CPU ms, one process",
        "CPU ms, each of two",
        "ratio",
        "of it the match, one / two",
        "wall ms, one / two",
        "gathered from each",
        "gradients of each",
    ]
    settings = result["settings"]
    note = (
        f"`benchmarks/distributed_scaling.py`: `SVI` steps on made-up images, float32, medians of {settings['steps']}; "
        f"{settings['backend']}. The cores were shared with other work, which is in the wall times and not in the CPU times; "
        "2 would be a perfect ratio."
    )
    return f"{table(head, rows)}\n\n{note}{origin(result)}"


def step(parameters: float, batch: float, ranks: int) -> tuple[float, float]:
    """Seconds of a step, and those of its all-reduce."""
    gradients = 2 * (ranks - 1) / ranks * 4 * parameters / BANDWIDTH
    messages = 0.0 if ranks == 1 else MESSAGES
    return HOST + 6 * parameters * batch / COMPUTE / ranks + MATCH + messages + gradients, gradients


def reckoning() -> str:
    """Step times that follow from the assumptions."""
    rows = []
    for parameters in (4e6, 1e8, 1e9):
        for batch in (2048, 16384, 131072):
            (one, _), (all_, gradients) = step(parameters, batch, 1), step(parameters, batch, RANKS)
            rows.append(
                [
                    f"{parameters / 1e6:,.0f} M",
                    f"{batch:,}",
                    f"{1e3 * one:,.0f}",
                    f"{1e3 * all_:,.0f}",
                    f"{1e3 * gradients:.1f}",
                    f"{one / all_:.1f}",
                ]
            )
    head = [
        "parameters",
        "data a step",
        "one GPU, ms",
        "eight GPUs, ms",
        "of it gradients, ms",
        "times as fast",
    ]
    return table(head, rows)


SECTIONS: dict[str, Callable[[], str]] = {"distributed": scaling, "distributed reckoning": reckoning}
