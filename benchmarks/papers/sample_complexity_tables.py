"""Tables of the study sample_complexity."""

from __future__ import annotations

from _tables import load, origin, table
from sample_complexity import FROM, REPETITIONS, slopes


def complexity() -> str:
    """Slopes of the error, and the error at the largest size."""
    result = load("papers_sample_complexity")
    largest = max(REPETITIONS)
    found = {(s["dimension"], s["epsilon"], s["estimator"]): s for s in slopes(result["rows"])}
    lines = []
    for row in result["rows"]:
        if row["n"] != largest:
            continue
        d, e = row["dimension"], row["epsilon"]
        cells = []
        for estimator in ("same-batch, sharp", "same-batch, entropic", "halves, sharp", "halves, entropic"):
            s = found[d, e, estimator]
            curved = " *" if s["chi2"] > 13.8 else ""  # 1 in 1000 of a straight line, two degrees of freedom
            cells.append(f"{s['slope']:.2f} ± {s['se']:.2f}{curved}")
        errors = [f"{row[name]['rms']:.4f}" for name in ("same-batch, sharp", "halves, sharp")]
        bias = row["halves, sharp"]["mean"] / row["halves, sharp"]["mean_se"]
        lines.append([str(d), "∞" if e == "inf" else f"{e:g}", *cells, *errors, f"{bias:+.1f}"])
    head = [
        "d",
        "ε",
        "same-batch, sharp",
        "same-batch, entropic",
        "halves, sharp",
        "halves, entropic",
        f"error at {largest}, same-batch",
        "halves",
        "bias of the halves, in standard errors",
    ]
    notes = f"\n\nSlopes over {FROM} to {largest} points with standard errors; * a straight line does not fit (p < .001)."
    return table(head, lines) + notes + origin(result)


SECTIONS = {"sample complexity": complexity}
