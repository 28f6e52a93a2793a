"""The speed benchmarks run where no peer is installed, and what they measure against is right."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pyro_sinkhorn.ot import sinkhorn_divergence

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch, tmp_path):
    """Import a module of the folder, which is no package; references are kept where the test wants them."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(importlib.import_module("_clouds"), "FOLDER", tmp_path)
    return importlib.import_module


def run(script, *options, cwd):
    command = [sys.executable, str(FOLDER / script), "--smoke-test", *options]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_peers_that_are_not_here_are_named(tmp_path):
    out = run("solver_peers.py", "--methods", "ours", "flash-sinkhorn", cwd=tmp_path)
    lines = {line.split("  ")[1].strip(): line for line in out.splitlines() if line.startswith("  ")}
    assert "0.01:" in lines["ours"] and "not reached" not in lines["ours"]
    if not torch.cuda.is_available():
        assert "skipped: flash-sinkhorn needs CUDA" in lines["flash-sinkhorn"]
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "options", "expected"),
    [
        ("solver_peers.py", (), "POT"),
        ("solver_peers.py", ("--shrinkage",), "independent at 32"),
        ("scaling.py", ("--backends", "log", "none_such"), "no backend 'none_such'"),
    ],
)
def test_smoke(script, options, expected, tmp_path):
    assert expected in run(script, *options, cwd=tmp_path)


@pytest.mark.parametrize("debias", ["self", "independent"])
def test_references_are_the_divergence(benchmark, debias):
    clouds = benchmark("_clouds")
    cell = clouds.Cell(24, 3, 0.2)
    held = clouds.reference(cell, debias)
    x, y = clouds.clouds(cell)
    epsilon = clouds.epsilon_of(cell, x, y)
    leaf = x.double().requires_grad_()
    source = clouds.split(cell) if debias == "independent" else None
    # Twice the cost with twice the epsilon is twice the value.
    out = sinkhorn_divergence(
        leaf,
        y.double(),
        2 * epsilon,
        debias=debias,
        tolerance=1e-8,
        max_iters=20_000,
        generator=source,
        backend="log",
    )
    (gradient,) = torch.autograd.grad(out.value / 2, leaf)
    assert abs(out.value.item() / 2 - held.value) < 1e-7 * abs(held.value) + 1e-9
    assert (gradient - held.gradient).norm() < 1e-6 * held.gradient.norm()
    again = clouds.reference(cell, debias)  # from the cache
    assert again.value == held.value and torch.equal(again.gradient, held.gradient)


@pytest.mark.parametrize("name", ["ours", "unrolled", "log domain, envelope", "geomloss", "POT"])
def test_all_compute_one_function(benchmark, name):
    """Tightening its knob, each method comes to the same value and gradient."""
    clouds, peers = benchmark("_clouds"), benchmark("_peers")
    torch.set_default_dtype(torch.float32)
    cell = clouds.Cell(40, 3, 0.5)
    held, (x, y) = clouds.reference(cell), clouds.clouds(cell)
    method, options = peers.METHODS[name]
    *_, tightest = method(x, y, clouds.epsilon_of(cell, x, y), cell, **options)
    value, gradient, _ = tightest.run()
    # geomloss leaves the plan's last bit to its schedule; float32 and the knobs' ends leave less to the others.
    close = 2e-2 if name == "geomloss" else 1e-3
    assert abs(float(value) - held.value) < close * abs(held.value)
    assert (gradient.double() - held.gradient).norm() < close * held.gradient.norm()


def test_the_fastest_accurate_setting_counts(benchmark):
    peers = benchmark("solver_peers")

    def attempt(index, ms, error):
        times = {"cpu_ms": [ms], "wall_ms": [9 * ms]}
        return times | {"index": index, "gradient_error": error, "default": index == 2}

    attempts = [attempt(0, 1.0, 0.5), attempt(1, 3.0, 9e-3), attempt(2, 2.0, 5e-4), attempt(3, 4.0, 1e-5)]
    found = peers.summary({"end": "done", "attempts": attempts}, threads=1)
    assert found["best"] == {"0.01": 2, "0.001": 2} and found["default"] == 2
    assert peers.summary({"end": "done", "attempts": []}, threads=1)["best"] == {}


def test_what_was_too_slow_is_not_tried_larger(benchmark):
    peers = benchmark("solver_peers")
    small = {"n": 1024, "d": 8, "kappa": 0.2, "threads": 1, "seed": 0}
    slow = {"end": "done", "attempts": [{"ms": 9_000.0}]}
    quick = {"end": "done", "attempts": [{"ms": 9.0}]}
    full = {"end": "out of memory", "attempts": []}
    rows = [small | {"methods": {"POT": slow, "ours": quick, "unrolled": full}}]
    cell, limits = peers.Cell(4096, 8, 0.2), peers.Limits()
    reasons = {
        name: peers.hopeless(name, cell, 1, limits, rows) for name in ("POT", "ours", "unrolled", "OTT")
    }
    assert "9.0 s or more at n = 1024" in reasons["POT"] and "out of memory" in reasons["unrolled"]
    assert reasons["ours"] is None and reasons["OTT"] is None
    assert peers.hopeless("POT", cell, 2, limits, rows) is None


def test_power_laws_are_recovered(benchmark):
    shrinkage = benchmark("_equal_shrinkage")
    factor, slope = shrinkage.power_law([1, 10, 100], [5.0, 0.5, 0.05])
    assert factor == pytest.approx(5) and slope == pytest.approx(-1)
    sizes = [128, 256, 1024]
    assert shrinkage.call_and_entries(sizes, [3 + 1e-5 * n**2 for n in sizes]) == pytest.approx((3, 1e-5))
    fits = {("self", 128): (0.8, 3.0), ("self", 256): (0.9, 9.0), ("independent", 128): (1.01, 4.0)}
    rows = [{"debias": m, "d": 8, "batch": n, "mean": s, "ms": t} for (m, n), (s, t) in fits.items()]
    found = {record["name"]: record for record in shrinkage.conclusions(rows)}
    assert found["0.1"]["batch"] == 256 and found["0.1"]["ms"] == 9.0 and not found["0.1"]["extrapolated"]
    # Half the shrinkage at twice the batch: a twentieth of .2 at 2560, ten times the batch of .1.
    assert found["as independent"]["extrapolated"] and abs(found["as independent"]["batch"] - 2560) <= 1
    assert found["as independent"]["independent_ms"] == 4.0
    rows = [
        {"axis": "n", "backend": "log", "end": "done", "n": n, "ms": 3e-5 * n**2, "peak_mb": 0.02 * n}
        for n in (64, 512, 1024, 2048)
    ]
    found = {e["quantity"]: e for e in benchmark("scaling").exponents(rows)}
    assert found["ms"]["exponent"] == pytest.approx(2) and found["peak_mb"]["exponent"] == pytest.approx(1)
    assert found["ms"]["from"] == 512
