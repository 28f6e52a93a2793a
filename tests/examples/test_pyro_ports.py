"""The ports of Pyro's examples: they run, and their two ways differ in guide and loss alone."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pyro
import pytest
import torch
from pyro.infer import SVI

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "pyro_ports"
PORTS = ("vae", "ss_vae", "dmm", "sparse_gamma_def", "prodlda")
PROGRAMS = {
    "vae": "VAE()",
    "ss_vae": "SSVAE()",
    "dmm": "DMM()",
    "sparse_gamma_def": "SparseGammaDEF()",
    "prodlda": "ProdLDA(30, 4)",
}
OURS = [*((port, "sinkhorn") for port in PORTS), ("dmm", "sinkhorn_markov")]


@pytest.fixture
def folder(monkeypatch):
    """The ports import each other as scripts do."""
    monkeypatch.syspath_prepend(str(FOLDER))
    names = (*PORTS, "_harness", "show_diff")
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    yield FOLDER
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(before)


@pytest.mark.parametrize(("port", "way"), [*((port, "pyro") for port in PORTS), *OURS])
def test_the_model_is_one_and_the_same(folder, port, way):
    # Which statements define it cannot differ: both set-ups are handed it, and hand it to SVI untouched.
    module = importlib.import_module(port)
    program = eval(PROGRAMS[port], vars(module))
    svi = module.SET_UPS[way](program)
    assert isinstance(svi, SVI)
    assert svi.model == program.model


def bound(statement: ast.stmt) -> str:
    """The name that a statement of a set-up function binds, an attribute's included."""
    if isinstance(statement, ast.FunctionDef):
        return statement.name
    assert isinstance(statement, ast.Assign) and len(statement.targets) == 1, ast.unparse(statement)
    return ast.unparse(statement.targets[0])


def differing(left: ast.FunctionDef, right: ast.FunctionDef) -> tuple[list[ast.stmt], list[ast.stmt]]:
    """Statements of either function that the other lacks."""
    said = [[ast.unparse(statement) for statement in each.body] for each in (left, right)]
    return tuple(
        [statement for statement in each.body if ast.unparse(statement) not in other]
        for each, other in ((left, said[1]), (right, said[0]))
    )


def strangers(left: ast.FunctionDef, right: ast.FunctionDef) -> set[str]:
    """What differs and is neither the guide, nor the loss, nor read by nothing but a guide that differs."""
    found = set()
    for function, own in zip((left, right), differing(left, right), strict=True):
        names = {bound(statement): statement for statement in own}
        for name in names.keys() - {"guide", "loss"}:
            readers = [s for s in function.body if s is not names[name] and name in ast.unparse(s)]
            if any(reader is not names.get("guide") for reader in readers):
                found.add(name)
    return found


@pytest.mark.parametrize(("port", "way"), OURS)
def test_only_guide_and_loss_differ(folder, port, way):
    functions = importlib.import_module("show_diff").set_ups(port)
    assert list(functions) == ["pyro", *(mine for theirs, mine in OURS if theirs == port)]
    left, right = functions["pyro"], functions[way]
    assert ast.unparse(left.args) == ast.unparse(right.args)
    assert strangers(left, right) == set()
    assert "loss" in {bound(statement) for statement in differing(left, right)[1]}
    assert isinstance(left.body[-1], ast.Return) and ast.unparse(left.body[-1]) == ast.unparse(right.body[-1])


def test_a_changed_model_or_optimiser_would_be_seen():
    left = ast.parse(
        "def f(p):\n model = p.model\n guide = 1\n loss = 2\n adam = 3\n return SVI(model, guide, adam, loss)"
    )
    for change in (("model = p.model", "model = p.other"), ("adam = 3", "adam = 4")):
        right = ast.parse(ast.unparse(left).replace(*change))
        assert strangers(left.body[0], right.body[0]) == {change[0].partition(" ")[0]}


@pytest.mark.parametrize("port", PORTS)
def test_sites_are_those_of_the_original(folder, port):
    module = importlib.import_module(port)
    torch.set_default_dtype(torch.float32)
    expected = {
        "vae": ({"latent", "obs"}, {"data"}),
        "ss_vae": ({"z", "y", "x"}, {"data"}),
        "dmm": (
            {f"{name}_{t}" for name in ("z", "obs_x") for t in range(1, 9)},
            {"z_minibatch"},
        ),
        "sparse_gamma_def": (
            {"w_top", "w_mid", "w_bottom", "z_top", "z_mid", "z_bottom", "obs"},
            {"w_top_plate", "w_mid_plate", "w_bottom_plate", "data"},
        ),
        "prodlda": ({"logtheta", "obs"}, {"documents"}),
    }[port]
    args = {
        "dmm": (torch.zeros(4, 8, 24), torch.ones(4, 8)),
        "prodlda": (torch.ones(4, 30),),
    }.get(port, (torch.zeros(4, 64),))
    program = eval(PROGRAMS[port], vars(module))
    trace = pyro.poutine.trace(program.model).get_trace(*args)
    sampled = {name for name, site in trace.nodes.items() if site["type"] == "sample"}
    assert sampled - expected[1] == expected[0]
    assert sampled & expected[1] == expected[1]


@pytest.mark.parametrize("port", PORTS)
def test_smoke(folder, port, tmp_path):
    command = [sys.executable, "-W", "error::UserWarning", str(FOLDER / f"{port}.py"), "--smoke-test"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert "log_likelihood" in result.stdout


def test_the_page_says_what_source_and_results_say(folder):
    show = importlib.import_module("show_diff")
    page = (ROOT / "docs" / "ports.md").read_text(encoding="utf-8")
    assert show.rendered(page) == page
    changed = page.replace("Trace_Sinkhorn(", "Trace_Sinkhorm(", 1)
    assert show.rendered(changed) == page
