"""What every test and every doctest starts from, and the tests left out on this machine."""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis
import pyro
import pytest
import torch

# Kernels cannot be imported without Triton, which CUDA builds of torch bring along; pytest looks for doctests in them.
collect_ignore = (
    []
    if importlib.util.find_spec("triton")
    else [
        f"pyro_sinkhorn/ot/backends/triton_{name}.py"
        for name in ("panel", "parts", "products", "small", "tiles", "update")
    ]
)

# The examples must be the same in every run, and a busy machine is no failure.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


@contextmanager
def clean_state() -> Iterator[None]:
    """Double precision, one thread, validation on, a fixed seed, an empty parameter store."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    try:
        with pyro.validation_enabled(True):
            yield
    finally:
        pyro.clear_param_store()
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)


@pytest.fixture(scope="session", autouse=True)
def clean_session() -> Iterator[None]:
    """For fixtures of a wider scope than a test, which are made before :func:`clean_test` acts."""
    with clean_state():
        yield


@pytest.fixture(autouse=True)
def clean_test() -> Iterator[None]:
    with clean_state():
        yield


def data_folder() -> Path:
    beside = Path(__file__).resolve().parent.parent / "shared" / "data"
    return Path(os.environ.get("PYRO_SINKHORN_DATA") or beside)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of the shared data sets. A test that asks for it is marked ``data`` by that."""
    folder = data_folder()
    if not folder.is_dir():
        pytest.skip(missing_data(folder))
    return folder


def missing_data(folder: Path) -> str:
    return f"no data sets in {folder}; set PYRO_SINKHORN_DATA to their folder"


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    folder = data_folder()
    for item in items:
        if "shared_data" in getattr(item, "fixturenames", ()):
            item.add_marker("data")
        if item.get_closest_marker("data") and not folder.is_dir():
            item.add_marker(pytest.mark.skip(reason=missing_data(folder)))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch sees none"))
