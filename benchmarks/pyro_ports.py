"""Pyro's own examples beside their ports, which differ in guide and loss alone: see examples/pyro_ports.

    python benchmarks/pyro_ports.py              # less than half an hour on one core
    python benchmarks/pyro_ports.py --smoke-test

Weights of the match were chosen on a validation part with seed 100; the seeds and the data of this table are others.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from _report import RESULTS, write

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "pyro_ports"
PORTS = ("vae", "ss_vae", "dmm", "sparse_gamma_def", "prodlda")


def run(module: Any, seeds: list[int], budget: Any) -> dict[str, list[dict[str, Any]]]:
    """Measures of every way of a port, a row a seed."""
    rows: dict[str, list[dict[str, Any]]] = {way: [] for way in module.SET_UPS}
    for seed in seeds:
        for way in module.SET_UPS:
            rows[way].append(module.run(way, budget, seed=seed))
            print(module.__name__, way, seed, rows[way][-1], flush=True)
    return rows


def main() -> None:
    """Run, print, write; other ports keep the results they have."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ports", nargs="+", choices=PORTS, default=PORTS)
    parser.add_argument("--smoke-test", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sys.path.insert(0, str(FOLDER))
    seeds = [0] if options.smoke_test else [0, 1, 2]
    path = RESULTS / "pyro_ports.json"
    payload = {"ports": {}}
    if path.exists():
        payload["ports"] = json.loads(path.read_text(encoding="utf-8"))["ports"]
    for port in options.ports:
        began = time.process_time()
        module = importlib.import_module(port)
        budget = module.BUDGET.smoke() if options.smoke_test else module.BUDGET
        rows = run(module, seeds, budget)
        minutes = (time.process_time() - began) / 60
        print(f"{port}: {minutes:.1f} minutes of one core")
        payload["ports"][port] = {
            "steps": budget.steps,
            "batch": budget.batch,
            "minutes": round(minutes, 1),
            "ways": rows,
        }
        if not options.smoke_test:
            write("pyro_ports", payload, seeds=seeds, packages=["scikit-learn"])


if __name__ == "__main__":
    main()
