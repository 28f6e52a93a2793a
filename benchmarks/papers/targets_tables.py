"""Table of the study targets."""

from __future__ import annotations

from _interval import interval
from _tables import load, origin, table

#: Table 1 of v1: MMD x 1000 / reconstruction / FID at the weights 10 and 100.
_PAPER = {
    "hae": ("Hungarian", "fresh samples", ".37 / 65.9 / 10.3", ".60 / 85.0 / 9.7"),
    "nat": ("Hungarian", "fixed targets", ".32 / 68.5 / 10.0", ".21 / 67.2 / 7.1"),
    "sae-v1": ("Sinkhorn", "fresh samples", ".35 / 66.2 / 9.4", ".30 / 66.8 / 6.8"),
    "sae-v1-fixed": ("Sinkhorn", "fixed targets", ".29 / 65.3 / 9.4", ".30 / 66.8 / 6.8"),
    "ours": ("`Trace_Sinkhorn`", "fresh samples, independent halves", "", ""),
}


def targets() -> str:
    """Ours beside theirs."""
    result = load("papers_targets")
    lines = []
    for beta, column in ((10, 2), (100, 3)):
        for method, entry in _PAPER.items():
            found = [r for r in result["rows"] if r["method"] == method and r["beta"] == beta]
            if found:
                cells = [
                    interval(found, name, digits)
                    for name, digits in (
                        ("latent_mmd", 2),
                        ("reconstruction", 2),
                        ("frechet", 1),
                        ("spread", 3),
                    )
                ]
                lines.append([f"{beta}", *entry[:2], str(len(found)), *cells, entry[column]])
    head = [
        "β",
        "matching",
        "targets",
        "seeds",
        "latent MMD × 1000",
        "squared error of an image",
        "Fréchet distance",
        "mean singular value",
        "theirs: MMD × 1000 / reconstruction / FID",
    ]
    return table(head, lines) + origin(result)


SECTIONS = {"papers-targets": targets}
