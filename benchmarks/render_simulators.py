"""Tables of the benchmarks that compare data: iris, recovered parameters, learned costs, unrolled gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from _tables import load, origin, table


def iris() -> str:
    """Counts on the diagonal of species against ellipsoids."""
    result = load("iris_ellipsoids")
    rows = []
    for row in result["table"]:
        paper = "/".join(map(str, row["paper"])) if row["paper"] else ""
        counts = " / ".join(f"{count:.1f}" for count in row["counts"])
        rows.append(
            [
                row["method"],
                f"{row['parameter']:g}",
                counts,
                f"{row['total']:.1f} ({row['min']} to {row['max']})",
                paper,
                f"{row['cpu_ms_per_step']:.0f}",
            ]
        )
    head = [
        "method",
        "epsilon, or bandwidth",
        "of 50, 50, 50",
        "of 150 (range)",
        "the paper's",
        "CPU ms a step",
    ]
    return table(head, rows) + origin(result)


def iris_resampling() -> str:
    """Totals after 400 steps, without and with replacement."""
    rows = {(row["method"], row["steps"]): row for row in load("iris_variants")["table"]}
    apart, drawn = rows["halves, not drawn", 400], rows["independent halves", 400]
    return f"{apart['total']:.0f} and {drawn['total']:.0f}"


def recovery() -> str:
    """Errors of recovered parameters."""
    result = load("simulator_recovery")
    tables = []
    for problem in result["problems"]:
        names = problem["parameters"]
        rows = []
        for row in (r for r in result["table"] if r["problem"] == problem["name"]):
            errors = [f"{row['mean_error'][n]:+.2%} ({row['rms_error'][n]:.2%})" for n in names]
            rows.append([row["method"], *errors, str(row["data_sets"]), f"{row['time_over_mmd']:.1f}"])
        head = [f"{problem['name']}, {problem['n']} data", *names, "data sets", "time over MMD"]
        tables.append(table(head, rows))
    chosen = ", ".join(f"{v:g} × median ({k})" for k, v in result["chosen_bandwidth"].items())
    return (
        "\n\n".join(tables)
        + f"\n\nMMD's bandwidths, chosen by the true error on tuning data: {chosen}."
        + origin(result)
    )


def unrolled() -> str:
    """What unrolling costs."""
    result = load("unrolled_gradients")
    rows = [
        [
            str(row["n_iters"]),
            *(f"{row[m]['peak_bytes'] / 1e6:.1f}" for m in ("envelope", "unrolled", "plain_autograd")),
            *(f"{row[m]['time_over_envelope']:.1f}" for m in ("unrolled", "plain_autograd")),
        ]
        for row in result["cost"]
        if row["dtype"] == "float64"
    ]
    head = [
        "L",
        "envelope, MB",
        "unrolled, MB",
        "plain autograd, MB",
        "unrolled, time",
        "plain autograd, time",
    ]
    return table(head, rows) + origin(result)


#: Gradients, each against the converged one of its value.
_GRADIENTS = ("unrolled_sharp_to_sharp", "unrolled_entropic_to_entropic", "envelope_to_entropic")


def unrolled_errors() -> str:
    """How far stopped gradients are from converged ones."""
    rows = [
        [
            f"{row['relative_epsilon']:g}",
            str(row["n_iters"]),
            *(
                f"{row[key]:.1e}"
                for key in (
                    "unrolled_sharp_to_sharp",
                    "unrolled_entropic_to_entropic",
                    "envelope_to_entropic",
                )
            ),
            f"{row['sharp_to_entropic']:.2f}",
        ]
        for row in load("unrolled_gradients")["errors"]
        if row["dtype"] == "float64"
    ]
    head = [
        "epsilon / mean cost",
        "L",
        "sharp, unrolled",
        "entropic, unrolled",
        "entropic, envelope",
        "sharp from entropic, converged",
    ]
    return table(head, rows)


def learned() -> str:
    """Generated images under fixed and learned costs."""
    result = load("learned_cost")

    def cell(row: dict[str, Any], key: str, digits: int) -> str:
        values = ", ".join(f"{value:.{digits}f}" for value in row[key]["values"])
        return f"{row[key]['mean']:.{digits}f} ({values})"

    rows = [
        [
            row["method"],
            cell(row, "score", 2),
            cell(row, "frechet", 1),
            f"{row['entropy']['mean']:.3f}",
            f"{row['cpu_ms_per_step']:.0f}",
        ]
        for row in result["summary"]
    ]
    head = ["method", "score (three seeds)", "Fréchet distance", "entropy of classes", "CPU ms a step"]
    seen, trained = result["reference"]["test images"], result["reference"]["training images"]
    notes = (
        f"\n\nThe classifier is right on {result['classifier']['test_accuracy']:.2%} of the test images. Test images score "
        f"{seen['score']:.2f}; training images are at a Fréchet distance of {trained['frechet']:.1f}, the floor."
    )
    return table(head, rows) + notes + origin(result)


SECTIONS: dict[str, Callable[[], str]] = {
    "iris": iris,
    "learned": learned,
    "iris resampling": iris_resampling,
    "recovery": recovery,
    "unrolled": unrolled,
    "unrolled errors": unrolled_errors,
}
