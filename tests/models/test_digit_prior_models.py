"""Digit models of further priors: every one fits, encodes into its support, and generates."""

import pytest
import torch

from pyro_sinkhorn import SinkhornProgram, Trace_Sinkhorn, models
from pyro_sinkhorn.models.digit_priors import OrderedNormal

MODELS = ["correlation", "torus", "switch", "strength_and_parts", "mixture", "ranked"]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_it_fits_and_generates(name, dtype):
    torch.set_default_dtype(dtype)
    x = torch.rand(64, 64)
    program = SinkhornProgram(getattr(models, f"{name}_digits")(), loss=Trace_Sinkhorn(match_size=8))
    program.fit(x, num_steps=3, batch_size=32, seed=0, progress=False)
    encoded, generated = program.encode(x), program.generate(2, x[:5])
    assert generated["x"].shape == (2, 5, 64)
    for site, value in encoded.items():
        assert value.dtype == dtype
        assert value.shape[1] == 64
        assert generated[site].shape[2:] == value.shape[2:]
    before = program.modules["decoder"][0].weight.clone()
    program.fit(x, num_steps=1, batch_size=32, progress=False)
    assert not torch.equal(before, program.modules["decoder"][0].weight)


def test_order_statistics():
    """Means of the sorted pair of normals are -+1/sqrt(pi)."""
    draws = OrderedNormal(2, torch.zeros(())).expand([3]).sample((20_000,))
    assert draws.shape == (20_000, 3, 2)
    assert (draws.diff(dim=-1) > 0).all()
    error = 5 * float(draws[..., 0].std()) / (60_000**0.5)
    assert draws[..., 1].mean() == pytest.approx(torch.pi**-0.5, abs=error)
