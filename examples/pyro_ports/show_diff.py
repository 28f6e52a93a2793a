"""The difference between the two ways of every port, read off their source; and the page that shows it with the results.

python examples/pyro_ports/show_diff.py                       # print the diffs
python examples/pyro_ports/show_diff.py --write docs/ports.md # rewrite what stands between `<!-- name -->` and `<!-- end -->`
python examples/pyro_ports/show_diff.py --check docs/ports.md # fail where the page differs from source or results
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULT = HERE.parents[1] / "benchmarks" / "results" / "pyro_ports.json"
PORTS = ("vae", "ss_vae", "dmm", "sparse_gamma_def", "prodlda")
#: What the page calls the ways: names of functions without "set_up_".
LABELS = {"pyro": "Pyro: its guide, its ELBO"}
MEASURES = {
    "log_likelihood": "held-out log-likelihood under the guide, per datum",
    "match": "match of the held-out latents to the prior",
    "floor": "its noise floor",
    "z": "distance from the floor, in standard errors",
    "encoder_variance": "share of the latents' variance that is the guide's noise",
    "evidence_bound": "evidence bound of the model on held-out data, per datum",
    "accuracy": "held-out digits named rightly",
    "topic_correlation": "correlation of learned with true topics",
    "seconds": "seconds of training, on a busy machine",
    "c2st": "C2ST, generated against held-out data",
}


def set_ups(port: str) -> dict[str, ast.FunctionDef]:
    """The set-up functions of a port, by way, in their order."""
    tree = ast.parse((HERE / f"{port}.py").read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {f.name.removeprefix("set_up_"): f for f in functions if f.name.startswith("set_up_")}


def body(port: str, function: ast.FunctionDef) -> list[str]:
    """Lines of a set-up function below its signature, as they are in the file."""
    lines = (HERE / f"{port}.py").read_text(encoding="utf-8").splitlines()
    return lines[function.body[0].lineno - 1 : function.end_lineno]


def diff(port: str, way: str) -> list[str]:
    """Unified diff from Pyro's set-up to another, whole, without its header."""
    functions = set_ups(port)
    left, right = (body(port, functions[name]) for name in ("pyro", way))
    lines = difflib.unified_diff(left, right, n=max(len(left), len(right)), lineterm="")
    return [line for line in lines if not line.startswith(("---", "+++", "@@"))]


def shown(port: str) -> str:
    """The diffs of a port as Markdown."""
    ways = [way for way in set_ups(port) if way != "pyro"]
    return "\n".join(line for way in ways for line in ("```diff", *diff(port, way), "```"))


def spread(values: list[float]) -> str:
    """Mean over seeds, and the smallest and largest."""
    small = max(map(abs, values)) < 1.5
    digits = 4 if small else 1
    mean, low, high = sum(values) / len(values), min(values), max(values)
    return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def results(port: str, result: dict[str, Any]) -> str:
    """The measures of a port, a column a way."""
    found = result["ports"][port]
    rows = found["ways"]
    ways = list(rows)
    names = [name for name in rows[ways[0]][0] if name != "floor_sd"]
    lines = [["", *(LABELS.get(way, f"`set_up_{way}`") for way in ways)], ["---"] * (len(ways) + 1)]
    for name in names:
        label = MEASURES.get(name, name.replace("_", " "))
        lines.append([label, *(spread([row[name] for row in rows[way]]) for way in ways)])
    steps = f"\n\n{found['steps']} steps of {found['batch']} data, seeds {result['seeds']}: mean, smallest and largest."
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + steps


def rendered(text: str) -> str:
    """The page with its diffs and tables as source and results have them."""
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    parts = {f"diff of {port}": shown(port) for port in PORTS}
    parts |= {f"results of {port}": results(port, result) for port in PORTS}
    parts["origin"] = f"{result['machine']['in_words']}; " + ", ".join(
        f"{name} {number}" for name, number in result["versions"].items()
    )
    for name, part in parts.items():
        pattern = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(\n<!-- end -->)", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"the page has no place for the {name}: <!-- {name} -->, <!-- end -->")
        text = pattern.sub(lambda found, part=part: found[1] + part + found[2], text)
    return text


def main() -> None:
    """Print, write or check."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--write", type=Path, metavar="PAGE")
    action.add_argument("--check", type=Path, metavar="PAGE")
    options = parser.parse_args()
    page = options.write or options.check
    if page is None:
        for port in PORTS:
            print(f"{port}\n{shown(port)}\n")
        return
    before = page.read_text(encoding="utf-8")
    after = rendered(before)
    if options.write:
        page.write_text(after, encoding="utf-8")
    elif after != before:
        sys.exit(f"{page} differs from what the ports and their results say: run show_diff.py --write {page}")


if __name__ == "__main__":
    main()
