"""What the package weighs: a wheel in an empty environment, its size, what importing it loads and takes, the quickstart.

    python benchmarks/package.py
    python benchmarks/package.py --smoke-test    # in this environment, without building one

The wheel is built from this checkout and installed with nothing but its dependencies into a new virtual environment. A new
process then imports it and lists the modules that came along: none may belong to the tests, the benchmarks or the examples.
Import times are medians of five processes, beside those of torch and Pyro alone. Last, the examples' packages are installed and
the quickstart is run as its user would.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

from _report import write

ROOT = Path(__file__).resolve().parents[1]
#: Import names of what only tests, benchmarks and examples need, and of what is loaded when it is asked for.
NOT_WANTED = (
    "pytest", "hypothesis", "xdist", "ot", "geomloss", "sklearn", "matplotlib", "arviz", "xarray", "triton", "jax",
    "sphinx", "lightning", "IPython",
)  # fmt: skip
WATCH = """
import sys, time
start = time.perf_counter()
{first}
middle = time.perf_counter()
{second}
end = time.perf_counter()
print(repr((middle - start, end - middle, sorted({{name.split('.')[0] for name in sys.modules}}))))
"""


def run(*command: str | Path, **options: Any) -> str:
    """Standard output of a command, which must succeed."""
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, **options)
    if result.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{result.stdout}\n{result.stderr}")
    return result.stdout


def imported(python: Path, repeat: int, folder: Path) -> dict[str, Any]:
    """Import times in seconds, and what importing the package loads beyond torch and Pyro's own."""
    code = WATCH.format(first="import torch, pyro", second="import pyro_sinkhorn")
    found = [eval(run(python, "-c", code, cwd=folder)) for _ in range(repeat)]
    alone = eval(run(python, "-c", WATCH.format(first="import torch, pyro", second=""), cwd=folder))[2]
    return {
        "torch_and_pyro_seconds": statistics.median(first for first, _, _ in found),
        "package_seconds": statistics.median(second for _, second, _ in found),
        "unwanted": sorted(set(found[0][2]) & set(NOT_WANTED) - set(alone)),
        "brought_along": sorted(
            name
            for name in set(found[0][2]) - set(alone)
            if not name.startswith("_") and name != "pyro_sinkhorn"
        ),
    }


def main() -> None:
    """Build, install, import, run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke-test", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.smoke_test:
            print(json.dumps(imported(Path(sys.executable), 1, folder), indent=1))
            return
        run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, ROOT)
        wheel = next(folder.glob("*.whl"))
        venv.create(folder / "env", with_pip=True)
        python = folder / "env" / "bin" / "python"
        constraints = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line]
        torch = next(line for line in constraints if line.startswith("torch=="))
        rest = folder / "constraints.txt"
        rest.write_text("\n".join(line for line in constraints if line != torch))
        pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        run(*pip, torch)
        run(*pip, "--constraint", rest, wheel)
        found = imported(python, 5, folder) | {"wheel_kilobytes": wheel.stat().st_size / 1e3}
        found["installed"] = json.loads(run(python, "-m", "pip", "list", "--format=json"))
        run(*pip, "--constraint", rest, f"{wheel}[examples]")
        said = run(python, ROOT / "examples" / "quickstart.py", cwd=folder)
    found["quickstart"] = said.splitlines()
    print(said)
    print({name: value for name, value in found.items() if name not in ("installed", "quickstart")})
    write("package", found, seeds=[0])


if __name__ == "__main__":
    main()
