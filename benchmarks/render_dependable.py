"""Tables of what a long run needs, and of what the package weighs."""

from __future__ import annotations

import sys
from collections.abc import Callable

from _tables import load, origin, table


def long_run() -> str:
    """Resident memory at every thousand steps."""
    result = load("long_run")
    steps, megabytes = zip(*result["megabytes"], strict=True)
    rows = [["MB", *(f"{value:.1f}" for value in megabytes)]]
    said = f"\n\n{result['megabytes_per_thousand_steps']:.2f} MB a thousand steps, after the first thousand."
    return table(["steps", *map(str, steps)], rows) + said + origin(result)


def package() -> str:
    """Size, import times, and what an import brings along."""
    result = load("package")
    rows = [
        ["wheel, kB", f"{result['wheel_kilobytes']:.0f}"],
        ["import of torch and Pyro, s", f"{result['torch_and_pyro_seconds']:.2f}"],
        ["import of pyro_sinkhorn after them, s", f"{result['package_seconds']:.2f}"],
        ["packages of tests, benchmarks or examples that it loads", ", ".join(result["unwanted"]) or "none"],
        [
            "packages that it loads beyond torch's and Pyro's",
            ", ".join(name for name in result["brought_along"] if name not in sys.stdlib_module_names)
            or "none",
        ],
    ]
    return table(["", ""], rows) + origin(result)


SECTIONS: dict[str, Callable[[], str]] = {"long run": long_run, "package": package}
