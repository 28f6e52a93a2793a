"""What every result file says besides its figures: which versions, on which machine, when, from which seeds.

Scripts run as ``python benchmarks/<name>.py``, so that this folder is on their path::

    from _report import write

    write("no_shrinkage", {"rows": rows}, seeds=range(5), packages=["geomloss"])
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent / "results"


def cpu_model() -> str:
    """The processor's name, or its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """The machine, without anything that tells whose it is."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "in_words": ", ".join([f"{cores} cores", cpu_model(), *gpus]),
        "cores": cores,
        "cpu": cpu_model(),
        "gpus": gpus,
        "torch_threads": torch.get_num_threads(),
        "system": platform.system(),
    }


def versions(packages: Iterable[str] = ()) -> dict[str, str]:
    """Versions of Python, of what everything here stands on, and of further ``packages`` by distribution name."""
    found = {"python": platform.python_version()}
    for name in ("torch", "pyro-ppl", "numpy", *packages):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def write(
    name: str,
    payload: dict[str, Any],
    *,
    seeds: Iterable[int],
    packages: Iterable[str] = (),
    folder: Path = RESULTS,
) -> Path:
    """Write ``<folder>/<name>.json`` and return its path. NaN and infinities are refused: JSON has none."""
    report = {
        "benchmark": name,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "versions": versions(packages),
        "seeds": list(seeds),
        **payload,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path
