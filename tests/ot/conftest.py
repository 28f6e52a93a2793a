"""Every backend obeys the same laws: a test of transport asks for the ``backend`` fixture and passes it on."""

import pytest

from pyro_sinkhorn.ot.backends import BACKENDS


@pytest.fixture(params=sorted(BACKENDS))
def backend(request):
    return request.param
