"""The shape of the source: imports point downward, the core needs no optional package, no file grows too long."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "pyro_sinkhorn"
SOURCES = sorted([*ROOT.glob(f"{PACKAGE}/**/*.py"), *ROOT.glob("models/**/*.py")])
NAMES = [str(path.relative_to(ROOT)) for path in SOURCES]

#: Lowest first. A unit (a subpackage, or a module beside them) imports from its own row and those listed before it.
LAYERS = (
    {"errors"},
    {"ot"},
    {"distributions"},
    {"geometry"},
    {
        "explain",
        "runs",
        "structure",
        "reachable",
        "modules",
        "rng",
        "state",
        "optimiser",
        "recovery",
        "averaging",
        "notebook",
        "distributed",
    },
    {"scoring"},
    {"refinement"},
    {"guide", "losses"},
    {"training", "diagnostics", "plots", "proposal", "sampling", "parts", "labelled", "replay"},
    {"simulations"},
    {"calibration", "export"},
    {"snapshot"},
    {"fitting", "persistence", "queries"},
    {"program"},
    {"decorator"},
    {"__init__"},
    {"models"},
)
RANK = {unit: rank for rank, units in enumerate(LAYERS) for unit in units}
#: Not dependencies. The function that needs one imports it. ArviZ and its xarray are, but take seconds to import.
LAZY = {"zuko", "torchvision", "lightning", "ot", "geomloss", "sklearn", "matplotlib", "arviz", "xarray"}
OUTSIDE = {"tests", "benchmarks", "examples"}
MAX_LINES = 350


class Import(NamedTuple):
    line: int
    module: str  # absolute, with the name imported from it where that may be a module
    top_level: bool  # runs when the file is imported


def imports(tree: ast.Module, package: str) -> Iterator[Import]:
    """All imports of a file that belongs to ``package``, a dotted name, those inside functions too."""

    def visit(node: ast.AST, top_level: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(child.lineno, alias.name, top_level)
            elif isinstance(child, ast.ImportFrom):
                parent = (
                    package.split(".")[: len(package.split(".")) + 1 - child.level] if child.level else []
                )
                base = ".".join([*parent, *filter(None, [child.module])])
                for alias in child.names:
                    yield Import(child.lineno, f"{base}.{alias.name}", top_level)
            else:
                lazy = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from visit(child, top_level and not lazy and not typing_only(child))

    return visit(tree, True)


def typing_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts if parts[0] == PACKAGE else (PACKAGE, *parts))


def package_of(path: Path) -> str:
    return module_name(path).rpartition(".")[0]


def unit_of(module: str) -> str:
    """The subpackage or module of ours that a dotted name belongs to; the package itself is ``__init__``."""
    unit = [*module.split("."), "__init__"][1]
    is_module = (ROOT / PACKAGE / unit).is_dir() or (ROOT / PACKAGE / f"{unit}.py").is_file()
    return unit if unit in RANK or is_module else "__init__"


def violations(source: str, module: str, package: str) -> list[str]:
    """What one file imports against the rules."""
    unit, found = unit_of(module), []
    for line, target, top_level in imports(ast.parse(source), package):
        first = target.split(".")[0]
        if first == PACKAGE:
            other = unit_of(target)
            if RANK[other] > RANK[unit] or (unit == "ot" and other not in ("ot", "errors")):
                found.append(f"line {line}: {unit} imports {target}, which lies above it")
        elif unit == "ot" and first in ("pyro", "pyroapi"):
            found.append(f"line {line}: ot works on tensors alone, but imports {target}")
        elif first in OUTSIDE:
            found.append(f"line {line}: imports {target}, which is not installed")
        elif top_level and first in LAZY:
            found.append(
                f"line {line}: imports {target} at top level; import it in the function that needs it"
            )
    return found


def test_there_is_a_source_to_look_at():
    assert f"{PACKAGE}/ot/sinkhorn.py" in NAMES


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_every_unit_has_a_layer(path):
    assert unit_of(module_name(path)) in RANK, "give the new unit its place in LAYERS"


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_imports_point_downward(path):
    found = violations(path.read_text(encoding="utf-8"), module_name(path), package_of(path))
    assert not found, "\n".join(found)


def test_units_of_one_layer_do_not_import_each_other_in_a_circle():
    graph: dict[str, set[str]] = {unit: set() for unit in RANK}
    for path in SOURCES:
        unit = unit_of(module_name(path))
        for _, target, _ in imports(ast.parse(path.read_text(encoding="utf-8")), package_of(path)):
            if target.split(".")[0] == PACKAGE and unit_of(target) != unit:
                graph[unit].add(unit_of(target))
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_files_stay_small(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{lines} lines; which two concepts would live better apart?"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ot.cost", "import pyro"),
        ("ot.cost", "def f():\n    from pyro.distributions import Normal"),
        ("ot.cost", "from pyro_sinkhorn.distributions import Implicit"),
        ("ot.cost", "from ..geometry import base"),
        ("distributions.implicit", "from pyro_sinkhorn.losses.clouds import Cloud"),
        ("distributions.implicit", "from pyro_sinkhorn import geometry"),
        ("geometry.base", "from pyro_sinkhorn import Trace_Sinkhorn"),
        ("geometry.base", "import pyro_sinkhorn"),
        ("geometry.base", "from .. import guide"),
        ("losses.matching", "def f():\n    from pyro_sinkhorn import training"),
        ("losses.matching", "from pyro_sinkhorn.diagnostics.matching import match_report"),
        ("training", "from .program import SinkhornProgram"),
        ("program", "import pyro_sinkhorn.models"),
        ("plots", "import matplotlib.pyplot as plt"),
        ("plots", "try:\n    from matplotlib import pyplot\nexcept ImportError:\n    pass"),
        ("losses.matching", "import ot"),
        ("models.digits", "from sklearn.datasets import load_digits"),
        ("models.digits", "def f():\n    from benchmarks.common import clouds"),
    ],
)
def test_the_check_sees_what_is_forbidden(module, source):
    module = f"{PACKAGE}.{module}"
    assert len(violations(source, module, module.rpartition(".")[0])) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ot.cost", "from pyro_sinkhorn.errors import ProgramError\nfrom .problem import Problem"),
        ("distributions.implicit", "import pyro\nimport torch"),
        ("geometry.base", "from pyro_sinkhorn import distributions, ot"),
        ("losses.matching", "from pyro_sinkhorn.ot.divergence import sinkhorn_divergence"),
        ("plots", "def f():\n    import matplotlib.pyplot as plt"),
        ("plots", "if TYPE_CHECKING:\n    from matplotlib.axes import Axes"),
        ("models.digits", "from pyro_sinkhorn import Trace_Sinkhorn"),
    ],
)
def test_the_check_passes_what_is_allowed(module, source):
    module = f"{PACKAGE}.{module}"
    assert violations(source, module, module.rpartition(".")[0]) == []
