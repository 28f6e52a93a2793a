"""Tables of the study generative_autoencoding."""

from __future__ import annotations

import itertools

from _choice import reported
from _interval import interval
from _tables import load, origin, table

#: The papers' figures: Table 2 of v1 (MMD x 1000 / reconstruction / FID), FID of v3 with normal and spherical prior.
_PAPERS = {
    "ae": ("AE; on the sphere AE with normalised codes", "– / 62.6 / 45.2; 4.7 / 66.2 / 22.0", "–", "–"),
    "vae": ("VAE; on the sphere von Mises-Fisher", ".63 / 66.4 / 7.2; .33 / 72.2 / 9.5", "11.4", "21.5"),
    "beta-vae": ("β-VAE; the same", "2.3 / 62.8 / 15.2 (β = .1)", "50.0", "–"),
    "wae": ("WAE-MMD", ".69 / 63.1 / 9.0; .25 / 65.7 / 8.9", "24.4", "22.3"),
    "swae": ("sliced WAE", "–", "18.8", "27.6"),
    "hae": ("Hungarian AE", "–", "16.8", "12.0"),
    "sae-v1": ("SAE as published (v1)", "sphere: .30 / 66.8 / 6.8", "–", "–"),
    "sae-v3": ("SAE, debiased on one batch (v3)", "–", "17.2", "12.5"),
    "ours": ("`Trace_Sinkhorn`, independent halves", "", "", ""),
}


def _of_prior(prior: str) -> str:
    result = load("papers_generative_autoencoding")
    rows = result["rows"]
    lines = []
    for also, (method, (title, *_)) in itertools.product((False, True), _PAPERS.items()):
        found = reported(rows, prior, method, also=also)
        if not found:
            continue
        title = title.split(";")[0] if "gauss" in prior else title
        weight = "" if method == "ae" else f"{found[0]['weight']:g}"
        cells = [
            interval(found, name, digits)
            for name, digits in (
                ("reconstruction", 2),
                ("frechet", 1),
                ("latent_mmd", 2),
                ("spread", 3),
                ("norm", 3),
            )
        ]
        lines.append([title + (", not the weight chosen" if also else ""), weight, str(len(found)), *cells])
    if not lines:
        return "Not run yet."
    (floor,) = [r for r in rows if r["part"] == "floor" and r["prior"] == prior]
    (images,) = [r for r in rows if r["part"] == "floor" and not r["prior"]]
    lines.append(
        [
            "floor",
            "",
            "",
            "",
            f"{images['frechet']:.1f}",
            f"{floor['mean']:.2f} (sd {floor['sd']:.2f})",
            "1",
            "1",
        ]
    )
    head = [
        "method",
        "weight",
        "seeds",
        "squared error of an image",
        "Fréchet distance",
        "latent MMD × 1000",
        "mean singular value",
        "norm",
    ]
    return table(head, lines) + origin(result)


def early() -> str:
    """What a quarter of the steps had shown at d = 64."""
    rows = load("papers_generative_autoencoding")["rows"]
    lengths = sorted({row["steps"] for row in rows if (row["prior"], row["part"]) == ("gaussian-64", "test")})
    lines = []
    for method, (title, *_) in _PAPERS.items():
        line = [title.split(";")[0]]
        for steps in lengths:
            found = reported(rows, "gaussian-64", method, steps)
            weight = f"{found[0]['weight']:g}" if found and found[0]["weight"] else ""
            line += [weight, interval(found, "reconstruction", 2), interval(found, "frechet", 1)]
        lines.append(line)
    names = ("weight", "error of an image", "Fréchet")
    return table(["method", *(f"{steps} steps: {name}" for steps in lengths for name in names)], lines)


def papers() -> str:
    """What the papers report for MNIST."""
    head = ["method", "v1, Table 2: MMD × 1000 / reconstruction / FID", "v3, normal: FID", "v3, sphere: FID"]
    return table(head, [list(line) for line in _PAPERS.values() if any(line[1:])])


SECTIONS = {
    "papers-generative-normal-10": lambda: _of_prior("gaussian-10"),
    "papers-generative-sphere-10": lambda: _of_prior("sphere-10"),
    "papers-generative-normal-64": lambda: _of_prior("gaussian-64"),
    "papers-generative-early": early,
    "papers-generative-theirs": papers,
}
