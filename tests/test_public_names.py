"""Every public name can be imported, says what it is, and is in the documentation."""

import importlib
import inspect
from pathlib import Path

import pytest

PACKAGES = [
    "pyro_sinkhorn",
    "pyro_sinkhorn.diagnostics",
    "pyro_sinkhorn.distributed",
    "pyro_sinkhorn.distributions",
    "pyro_sinkhorn.fitting",
    "pyro_sinkhorn.geometry",
    "pyro_sinkhorn.guide",
    "pyro_sinkhorn.losses",
    "pyro_sinkhorn.models",
    "pyro_sinkhorn.ot",
    "pyro_sinkhorn.refinement",
]
NAMES = [(package, name) for package in PACKAGES for name in importlib.import_module(package).__all__]


@pytest.mark.parametrize(("package", "name"), NAMES, ids=lambda value: value)
def test_public_names_are_documented(package, name):
    value = getattr(importlib.import_module(package), name)
    assert (inspect.getdoc(value) or "").strip(), f"{package}.{name} has no docstring"
    text = (Path(__file__).parents[1] / "docs" / "api.md").read_text(encoding="utf-8")
    assert f"`{name}" in text, f"{package}.{name} is not in docs/api.md"


def test_public_methods_of_a_program_have_docstrings():
    from pyro_sinkhorn import (
        AutoImplicit,
        SinkhornProgram,
        Trace_DataSinkhorn,
        Trace_JointSinkhorn,
        Trace_Sinkhorn,
        TraceEnum_Sinkhorn,
    )
    from pyro_sinkhorn.losses import LearnedCost

    for cls in (
        SinkhornProgram,
        AutoImplicit,
        Trace_Sinkhorn,
        TraceEnum_Sinkhorn,
        Trace_DataSinkhorn,
        Trace_JointSinkhorn,
        LearnedCost,
    ):
        for name, member in vars(cls).items():
            if not name.startswith("_") and callable(member):
                assert member.__doc__, f"{cls.__name__}.{name} has no docstring"
