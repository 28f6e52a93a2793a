"""Every backend obeys the same laws: a test of transport asks for the ``backend`` fixture and passes it on."""

import pytest

from pyro_sinkhorn.ot.backends import BACKENDS

#: Run by test_triton in processes of their own, with Triton's interpreter; not to be looked through for doctests.
collect_ignore = ["backends/triton_laws.py", "backends/triton_offline.py"]

#: Made for few large problems: laws of averages, which solve thousands of small ones, are slow tests of these.
LARGE_ONLY = {"streaming"}


#: These need a GPU, where their own tests hold them to the reference (tests/gpu; tests/ot/backends without one).
GPU_ONLY = {"triton", "flash"}


@pytest.fixture(params=sorted(BACKENDS.keys() - GPU_ONLY))
def backend(request):
    return request.param


def pytest_collection_modifyitems(items):
    for item in items:
        name = getattr(getattr(item, "callspec", None), "params", {}).get("backend")
        if name in LARGE_ONLY and item.path.name == "test_divergence.py":
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """A law for a cost that a backend does not have is skipped, by what the backend says."""
    try:
        return (yield)
    except ValueError as error:
        if "backend" in pyfuncitem.fixturenames and "has only 'sqeuclidean'" in str(error):
            pytest.skip(str(error))
        raise
