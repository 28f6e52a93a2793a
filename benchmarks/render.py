"""Write the tables of README.md and docs/ from the result files, so that no number is typed by hand.

python benchmarks/render.py           # rewrite what stands between `<!-- name -->` and `<!-- end -->`
python benchmarks/render.py --check   # fail where the documents differ from the results
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from typing import Any

import render_dependable
import render_distributed
import render_papers
import render_posterior
import render_priors
import render_references
import render_simulators
import render_speed
import render_structure
from _tables import ROOT, load, origin, table

DOCUMENTS = [
    ROOT / "README.md",
    *(
        ROOT / "docs" / f"{name}.md"
        for name in ("benchmarks", "concepts", "distributed", "papers", "simulators")
    ),
]


def shrinkage(short: bool = False) -> str:
    """Mean singular value and spread of an affine map fitted to N(0, I)."""
    result = load("no_shrinkage")
    cells = {(row["method"], row["d"], row["batch"]): row for row in result["table"]}
    sizes = sorted({(row["d"], row["batch"]) for row in result["table"]})
    if short:
        rows = [
            [
                str(d),
                f"{cells['same-batch', d, 128]['mean']:.3f}",
                f"{cells['transport', d, 128]['mean']:.3f}",
            ]
            for d, batch in sizes
            if batch == 128
        ]
        return table(["dimension", "same-batch debiasing", "independent halves (default)"], rows)

    def cell(method: str, d: int, batch: int) -> str:
        row = cells[method, d, batch]
        return f"{row['mean']:.3f} ({row['min']:.3f} to {row['max']:.3f}; {row['rms']:.3f})"

    rows = [
        [str(d), str(batch), *(cell(m, d, batch) for m in ("transport", "reverse KL", "same-batch"))]
        for d, batch in sizes
    ]
    head = ["d", "batch", "`Trace_Sinkhorn`, defaults", "no transport: reverse KL", '`debias="self"`']
    return table(head, rows) + origin(result)


def sweep() -> str:
    """The choice of relative_epsilon and of match_size."""
    result = load("epsilon_sweep")

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    lines = []
    for name in ("relative_epsilon", "match_size"):
        for row in result[name]["rows"]:
            line = [f"{name} {row[name]}, batch {result[name]['batch']}"]
            for d in ("2", "8", "64"):
                fits = row["gaussian"].get(d)
                line.append(
                    f"{mean([f['mean'] for f in fits]):.3f}; {mean([f['rms'] for f in fits]):.3f}"
                    if fits
                    else ""
                )
            line.append(f"{mean([f['energy_over_floor'] for f in row['dirichlet']]):.2f}")
            line.append(f"{mean([f['cpu_ms_per_step'] for f in row['dirichlet']]):.1f}")
            lines.append(line)
    head = ["setting", "d = 2", "d = 8", "d = 64", "Dirichlet(.2), floors", "ms a step (Dirichlet)"]
    return table(head, lines) + origin(result)


def equal_laws() -> str:
    """Mean divergence between clouds of one law."""
    result = load("ot_accuracy")
    rows: dict[tuple[int, int], dict[str, str]] = {}
    for row in result["equal_laws"]:
        text = f"{row['mean']:.3f} ± {row['standard_error']:.3f}"
        rows.setdefault((row["d"], row["n"]), {})[str(row["debias"])] = text
    lines = [[str(d), str(n), r["independent"], r["self"], r["None"]] for (d, n), r in rows.items()]
    return table(["d", "n", "`independent`", "`self`", "`None`"], lines) + origin(result)


def accuracy() -> str:
    """Largest differences to other libraries and closed forms."""
    result = load("ot_accuracy")
    rows = [[name, f"{value:.1e}"] for name, value in result["closed_forms"].items()]
    worst: dict[str, float] = {}
    for row in result["peers"]:
        if row["peer"] == "POT":
            worst["POT, value"] = max(worst.get("POT, value", 0.0), row["difference"])
            worst["POT, plan"] = max(worst.get("POT, plan", 0.0), row["plan_difference"])
    return table(["compared with", "largest difference"], [[k, f"{v:.1e}"] for k, v in worst.items()] + rows)


def digits() -> str:
    """Four priors on digit images."""
    result = load("digits")
    names = {
        "sinkhorn": "**`Trace_Sinkhorn`**",
        "self": '`debias="self"`',
        "mmd": "WAE-MMD",
        "elbo": "`TraceMeanField_ELBO`",
        "autoencoder": "autoencoder",
    }
    rows = []
    for row in result["summary"]:

        def number(key: str, row: dict[str, Any] = row) -> str:
            return f"{row[key]['mean']:.4f} ± {row[key]['half_width']:.4f}"

        rows.append(
            [
                row["prior"],
                names[row["method"]],
                f"{row['weight']:g}",
                number("reconstruction"),
                f"{row['reconstruction_ratio']:.2f}",
                number("latent_energy"),
                number("generated_energy"),
                f"{row['knn_accuracy']['mean']:.3f}",
            ]
        )
    head = [
        "prior",
        "method",
        "weight",
        "reconstruction",
        "ratio to autoencoder",
        "latent energy",
        "generated energy",
        "k-NN",
    ]
    floors = "; ".join(f"{p} {f['mean']:.4f} ± {f['sd']:.4f}" for p, f in result["latent_floor"].items())
    notes = (
        f"\n\nFloor of the latent energy (mean ± sd between independent prior clouds): {floors}. "
        f"Train-to-test floor of the generated energy: {result['train_to_test_energy']:.4f}. "
        f"{result['settings']['steps']} steps, batch {result['settings']['batch_size']}; weights chosen with seed "
        f"{result['seeds'][0]}, on validation digits."
    )
    return table(head, rows) + notes + origin(result)


def global_means() -> str:
    """Posterior of a global at several weights."""
    result = load("globals_and_dependence")
    weights = sorted({row["prior_weight"] for row in result["global"]})
    lines = []
    for weight in weights:
        rows = [row for row in result["global"] if row["prior_weight"] == weight]
        lines.append(
            [f"{weight:g}", *(", ".join(f"{row[key]:.3f}" for row in rows) for key in ("mean", "sd"))]
        )
    exact = result["exact"]
    head = ["prior_weight", f"mean (exact {exact['mean']:.3f})", f"sd (exact {exact['sd']:.3f})"]
    return table(head, lines) + origin(result)


def dependence(groups: str) -> str:
    """Standard deviation of z2 - z1, one number a seed."""
    rows = [row for row in load("globals_and_dependence")["dependence"] if row["groups"] == groups]
    return ", ".join(f"{row['sd_of_difference']:.3f}" for row in rows)


def step_cost() -> str:
    """Time of a step beside Trace_ELBO's."""
    result = load("svi_step_cost")
    rows = []
    for row in result["table"]:
        times = [f"{row['median_ms']:.1f}", f"{row['ratio_to_elbo']:.2f}"]
        if row["matching_ms"]:
            times += [f"{row['matching_ms']:.1f}", f"{row['ratio_without_matching']:.2f}"]
        rows.append([str(row["width"]), str(row["batch"]), row["program"], *times, *[""] * (4 - len(times))])
    head = [
        "width",
        "batch",
        "program",
        "median ms a step",
        "ratio",
        "matching, ms",
        "ratio without matching",
    ]
    return table(head, rows) + origin(result)


def step_parts() -> str:
    """Where the time of a step goes."""
    profile = next(
        row
        for row in load("svi_step_cost")["profile_of_a_step"]
        if (row["program"], row["width"], row["batch"]) == ("Trace_Sinkhorn, Dirichlet prior", 128, 256)
    )
    rows = [[name, f"{ms:.2f}"] for name, ms in profile["parts_ms"].items()]
    return table(["part of a step, Dirichlet prior, width 128, batch 256", "ms"], rows)


def step_ratio() -> str:
    """The ratio of steps with equal networks, at the smallest and the largest of them."""
    ratios = [
        row["ratio_to_elbo"]
        for row in load("svi_step_cost")["table"]
        if row["program"] == "Trace_Sinkhorn, Dirichlet prior" and row["batch"] == 256
    ]
    return f"{ratios[0]:.1f} times a `Trace_ELBO` step at width 128, and {ratios[-1]:.1f} times at width 512,"


SECTIONS: dict[str, Callable[[], str]] = {
    "shrinkage": shrinkage,
    "shrinkage short": lambda: shrinkage(short=True),
    "sweep": sweep,
    "equal laws": equal_laws,
    "accuracy": accuracy,
    "digits": digits,
    "step cost": step_cost,
    "globals": global_means,
    "joint": lambda: dependence("joint"),
    "marginal": lambda: dependence("marginal"),
    "step parts": step_parts,
    **render_simulators.SECTIONS,
    **render_priors.SECTIONS,
    **render_posterior.SECTIONS,
    **render_references.SECTIONS,
    **render_structure.SECTIONS,
    **render_speed.SECTIONS,
    **render_papers.SECTIONS,
    **render_dependable.SECTIONS,
    **render_distributed.SECTIONS,
    "step ratio": step_ratio,
}


def render(text: str) -> str:
    """Replace every marked section."""

    def replace(match: re.Match[str]) -> str:
        line_break = "\n" if match[2].startswith("\n") else ""
        return f"<!-- {match[1]} -->{line_break}{SECTIONS[match[1]]()}{line_break}<!-- end -->"

    names = "|".join(map(re.escape, sorted(SECTIONS, key=len, reverse=True)))
    return re.sub(rf"<!-- ({names}) -->(.*?)<!-- end -->", replace, text, flags=re.DOTALL)


def main() -> None:
    """Write or check the documents."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    stale = []
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        new = render(text)
        if new != text:
            stale.append(path.relative_to(ROOT))
            if not options.check:
                path.write_text(new, encoding="utf-8")
    if stale:
        print("differs from the results:" if options.check else "rewritten:", *stale)
    sys.exit(1 if stale and options.check else 0)


if __name__ == "__main__":
    main()
