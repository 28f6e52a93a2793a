"""Tables of the benchmarks of structured programs: topics of documents, cliques of a time series."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import Any

from _tables import load, origin, table

#: What settings are chosen by, with digits.
_TUNED = (("perplexity", 0), ("npmi_train", 3))


def _with_width(measure: dict[str, float], digits: int) -> str:
    return f"{measure['mean']:.{digits}f} ± {measure['half_width']:.{digits}f}"


def _prior(row: dict[str, Any]) -> str:
    return "N(0, 1)" if row["concentration"] is None else f"{row['concentration']:g}"


def cliques() -> str:
    """What every grouping leaves of a state space, seed by seed."""
    result = load("state_space_cliques")
    truth, reference = result["truth"], result["reference"]

    def row(name: str, seed: str, found: dict[str, Any]) -> list[str]:
        learned = found.get("learned", truth)
        return [
            name,
            seed,
            *(f"{value:.2f}" for value in (*found["smoothed"], *found["encoded_transitions"])),
            f"{found['generated_c2st']:.2f}",
            *(f"{learned[key]:.2f}" for key in truth),
            f"{found['reconstruction']:.1f}" if "reconstruction" in found else "",
        ]

    rows = [row("truth; particle smoother", "", reference)]
    order = {name: i for i, name in enumerate(dict.fromkeys(found["groups"] for found in result["rows"]))}
    for found in sorted(result["rows"], key=lambda found: (order[found["groups"]], found["seed"])):
        rows.append(row(found["groups"], str(found["seed"]), found))
    head = [
        "groups", "seed", "path: position", "velocity", "transition: position", "velocity", "generated C2ST", "damping",
        "state noise", "obs. noise", "reconstruction",
    ]  # fmt: skip
    return table(head, rows) + origin(result)


def newsgroups() -> str:
    """Perplexity and coherence on the test documents."""
    result = load("newsgroups")
    rows = [
        [
            row["method"],
            row["rule"],
            _prior(row),
            f"{row['weight']:g}",
            _with_width(row["perplexity"], 0),
            _with_width(row["npmi_test"], 3),
            _with_width(row["npmi_train"], 3),
            f"{row['diversity']['mean']:.2f}",
            f"{row['ms_per_step']['mean']:.0f}",
        ]
        for row in result["summary"]
    ]
    head = [
        "method", "setting chosen by", "concentration", "weight", "perplexity", "NPMI, test documents",
        "NPMI, training documents", "diversity", "CPU ms a step",
    ]  # fmt: skip
    unigram = (
        f"\n\nPerplexity of one distribution of words for all documents: {result['unigram_perplexity']:.0f}."
    )
    return table(head, rows) + unigram + origin(result)


def newsgroups_tuning() -> str:
    """Every setting that was tried, on validation documents: means over seeds."""
    settings: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in load("newsgroups")["runs"]:
        if row["part"] == "validation":
            settings.setdefault((row["method"], _prior(row), f"{row['weight']:g}"), []).append(row)
    rows = [
        [*setting, *(f"{fmean(row[name] for row in found):.{digits}f}" for name, digits in _TUNED)]
        for setting, found in settings.items()
    ]
    return table(["method", "concentration", "weight", "perplexity", "NPMI"], rows)


def newsgroups_words() -> str:
    """Ten largest words of some topics, first seed."""
    rows = [row for row in load("newsgroups")["summary"] if row["rule"] != "lowest perplexity"]
    lines = []
    for row in rows[:2]:
        lines.append(f"{row['method']}, first eight topics:\n")
        lines += [f"- {words}" for words in row["top_words"][:8]]
        lines.append("")
    return "\n".join(lines).rstrip()


SECTIONS: dict[str, Callable[[], str]] = {
    "cliques": cliques,
    "newsgroups": newsgroups,
    "newsgroups tuning": newsgroups_tuning,
    "newsgroups words": newsgroups_words,
}
