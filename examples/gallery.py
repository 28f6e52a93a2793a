"""Fit every program of the gallery, print a row for each, and draw them; about five minutes in all.

    python examples/gallery.py                                     # all, writes gallery.png
    python examples/gallery.py --only canvas_digits sun_sensors
    python examples/gallery.py --smoke-test                        # a few steps, to see that everything runs

A row: the latents and their supports; the loss per datum at the first step and at the end; the match of each group of
latents with its prior, beside the same number between two clouds of that prior; and something that a person would look
at to believe the fit. The data are scikit-learn's or drawn from the program itself.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import textwrap
import time
import warnings
from pathlib import Path

import matplotlib
import pyro
import torch
from exhibits import EXHIBITS, Exhibit
from pyro import poutine

from pyro_sinkhorn.diagnostics.matching import MatchReport
from pyro_sinkhorn.geometry import geometry_of
from pyro_sinkhorn.ot import ConvergenceWarning
from pyro_sinkhorn.structure import structure_of

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main() -> None:
    """Fit, print, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=sorted(EXHIBITS), metavar="NAME", help=", ".join(EXHIBITS)
    )
    parser.add_argument("--figure", type=Path, default=Path("gallery.png"))
    parser.add_argument("--smoke-test", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(
        1
    )  # clouds of this size gain nothing from two, and lose much beside a busy neighbour
    warnings.simplefilter("ignore", ConvergenceWarning)  # gradients a little further off in single steps

    shown: dict[str, Exhibit] = {}
    for name in options.only or EXHIBITS:
        torch.manual_seed(0)  # decoders start from torch's global state
        exhibit = shown[name] = EXHIBITS[name]()
        start = time.perf_counter()
        report = fit(exhibit, smoke=options.smoke_test)
        print(row(name, exhibit, report, time.perf_counter() - start), flush=True)
    draw(shown, options.figure)
    print(f"figure: {options.figure}")


def fit(exhibit: Exhibit, smoke: bool) -> MatchReport:
    """Train with a cosine schedule and measure the match."""
    num_steps = 2 if smoke else exhibit.num_steps
    schedule = {"optimizer": torch.optim.Adam, "optim_args": {"lr": exhibit.lr}, "T_max": num_steps}
    optim = pyro.optim.CosineAnnealingLR(schedule)
    exhibit.program.fit(*exhibit.data, num_steps=num_steps, optim=optim, seed=0, progress=False)
    with contextlib.redirect_stdout(io.StringIO()):  # the row says the same
        return exhibit.program.diagnose(*exhibit.data, num_floor=2 if smoke else 10, seed=0).match


def row(name: str, exhibit: Exhibit, report: MatchReport, seconds: float) -> str:
    """What a person wants to know of a fit."""
    history = exhibit.program.history.loss
    last = history[-20:]
    lines = [
        f"latents  {latents(exhibit)}",
        f"loss     {history[0]:.2f} at first, {sum(last) / len(last):.2f} after {len(history)} steps",
        *(
            f"match    {g.match:.4f}, floor {g.floor:.4f} ± {g.floor_sd:.4f}, z = {g.z:.1f}"
            + (f" ({numbered(g.name)})" if len(report.groups) > 1 else "")
            for g in report.groups
        ),
        *textwrap.wrap(f"check    {exhibit.check()}", 110, subsequent_indent=" " * 9),
    ]
    return f"{name} ({seconds:.0f} s)\n" + textwrap.indent("\n".join(lines), "  ")


def latents(exhibit: Exhibit) -> str:
    """Latents with the supports that their law has, sites of a series as one."""
    with torch.no_grad():
        trace = poutine.trace(exhibit.program).get_trace(*exhibit.data)
    found: dict[str, list[str]] = {}
    for name in structure_of(trace).latents:
        fn = trace.nodes[name]["fn"]
        support = fn.support
        while hasattr(support, "base_constraint"):
            support = support.base_constraint
        kind = type(support) if support.is_discrete else type(geometry_of(fn, name))
        size = "×".join(map(str, fn.event_shape))
        words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", kind.__name__.strip("_")).lower().replace("_", " ")
        found.setdefault(f"{words} {size}".strip(), []).append(name)
    return "; ".join(f"{numbered(', '.join(names))}: {kind}" for kind, names in found.items())


def numbered(names: str) -> str:
    """``z_0, z_1, z_2`` as ``z_0 ... z_2``."""
    every = names.split(", ")
    series = len(every) > 2 and all(re.fullmatch(r"\w+_\d+", name) for name in every)
    return f"{every[0]} ... {every[-1]}" if series else names


def draw(shown: dict[str, Exhibit], path: Path) -> None:
    """A panel a program."""
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(3.4 * columns, 3.1 * rows), layout="constrained", squeeze=False
    )
    for axes in grid.flat[len(shown) :]:
        axes.set_axis_off()
    for axes, (name, exhibit) in zip(grid.flat, shown.items(), strict=False):
        axes.set_title(name, fontsize=10)
        axes.tick_params(labelsize=7)
        exhibit.draw(axes)
        axes.xaxis.label.set_size(8)
        axes.yaxis.label.set_size(8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
