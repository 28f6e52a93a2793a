"""The ``triton`` backend: its laws under the interpreter, its kernels compiled for Hopper, its refusals."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pyro_sinkhorn.ot.backends.flash import solve_flash
from pyro_sinkhorn.ot.backends.graph import capture
from pyro_sinkhorn.ot.backends.triton_backend import solve_triton
from pyro_sinkhorn.ot.problem import Problem

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="needs triton: on a machine without CUDA, pip install triton",
)


def run(*command, **environment):
    """A fresh Python: whether kernels are interpreted is decided when Triton is first imported."""
    found = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-3000:]
    return found.stdout


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="the laws run on the CUDA device instead")
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_the_laws_hold_under_the_interpreter(which):
    run(
        *("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", which, HERE / "triton_laws.py"),
        TRITON_INTERPRET="1",
    )


@needs_triton
@pytest.mark.slow
def test_kernels_fit_a_hopper_multiprocessor():
    lines = run(HERE / "triton_offline.py", TRITON_INTERPRET="0").splitlines()
    kernels = [line.split() for line in lines if line.startswith("kernel")]
    assert len(kernels) > 30
    for line, (_, name, registers, stack, shared, threads, together) in zip(lines, kernels, strict=True):
        assert int(registers) <= 255, line
        assert int(shared) <= 227 * 1024, line
        # The tile of 128 x 128 scores and its densities fill the register file: how much of it spills depends on the
        # version of Triton (24 bytes a thread with 3.9, 192 with 3.6). So do panels of 512 and 1024 rows (48, 16). What is
        # stated here is what was found, not what is harmless: no GPU has timed it.
        allowed = {"small_kernel": 192, "panel_kernel": 48}
        assert int(stack) <= allowed.get(name, 0), line
        # As many programs as the launcher counts on.
        assert int(together) * int(threads) * int(registers) <= 65536, line


def problem(dtype=torch.float32):
    x = torch.zeros(1, 3, 2, dtype=dtype)
    w = torch.full((1, 3), 1 / 3, dtype=dtype)
    return Problem(x, x, w, w, torch.ones(1, dtype=dtype))


def test_without_triton_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ImportError, match="CUDA build"):
        solve_triton(problem())


def test_without_flash_sinkhorn_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_sinkhorn", None)
    with pytest.raises(ImportError, match=r"pip install 'pyro_sinkhorn\[flash\]'"):
        solve_flash(problem())


def test_a_graph_needs_a_cuda_device():
    with pytest.raises(ValueError, match="points are on cpu"):
        capture(problem())


@needs_triton
def test_float64_and_the_processor_are_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"float64: convert points and weights with \.float\(\)"):
        solve_triton(problem(torch.float64))
    with pytest.raises(ValueError, match="points are on cpu"):
        solve_triton(problem())
