"""The same answers on a GPU; collected everywhere, skipped where there is none."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI

from pyro_sinkhorn import AutoImplicit, SinkhornProgram, Trace_Sinkhorn, TraceEnum_Sinkhorn
from pyro_sinkhorn.distributions import HypersphericalUniform, VonMisesFisher
from pyro_sinkhorn.errors import ProgramError
from pyro_sinkhorn.models import dirichlet_archetypes
from pyro_sinkhorn.ot import sinkhorn

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean"])
def test_values_and_gradients_equal_the_cpu(cost):
    x, y = torch.randn(4, 50, 3), torch.randn(4, 60, 3)
    results = []
    for device in ("cpu", "cuda"):
        points = x.to(device).requires_grad_()
        out = sinkhorn(points, y.to(device), 0.5, cost=cost, tolerance=1e-8)
        out.value.sum().backward()
        results.append((out.value.detach().cpu(), points.grad.cpu(), out.plan().cpu()))
    for on_cpu, on_gpu in zip(*results, strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize(
    "fn",
    [
        lambda d: HypersphericalUniform(5, device=d),
        lambda d: VonMisesFisher(
            torch.nn.functional.one_hot(torch.tensor(0), 5).double().to(d), torch.tensor(20.0, device=d)
        ),
    ],
)
def test_spherical_distributions_sample_and_score_there(fn):
    draws = fn("cuda").sample((1000,))
    assert draws.is_cuda
    torch.testing.assert_close(fn("cuda").log_prob(draws).cpu(), fn("cpu").log_prob(draws.cpu()))


def test_a_program_moves_fits_and_comes_back(tmp_path):
    program = SinkhornProgram(dirichlet_archetypes(), loss=Trace_Sinkhorn(match_size=16))
    x = torch.rand(64, 64)
    program.fit(x, num_steps=3, batch_size=32, seed=0, device="cuda", progress=False)
    assert program.encode(x)["z"].is_cuda
    program.save(tmp_path / "program.pt")
    back = SinkhornProgram.load(tmp_path / "program.pt", program.model)
    assert not back.generate(2, x[:1])["z"].is_cuda


@pytest.mark.parametrize("groups", ["joint", "markov"])
def test_discrete_latents_masks_and_cliques(groups):
    def model(x, present):
        probs = x.new_tensor([0.5, 0.3, 0.2])
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(probs))
            s = pyro.sample("s", dist.Bernoulli(x.new_full((2,), 0.5)).to_event(1))
            c = pyro.sample("c", dist.Poisson(x.new_tensor(2.0)))
            with poutine.mask(mask=present):
                z = pyro.sample("z", dist.Normal(k.to(x), 1.0))
                pyro.sample("x", dist.Normal(z + s.sum(-1) + c, 1.0), obs=x)

    x, present = torch.randn(32, device="cuda"), torch.arange(32, device="cuda") < 24
    loss = TraceEnum_Sinkhorn(match_size=8, groups=groups)
    svi = SVI(model, AutoImplicit(model), pyro.optim.Adam({"lr": 1e-3}), loss=loss)
    assert math.isfinite(svi.step(x, present))
    assert all(value.is_cuda for value in svi.guide(x, present).values())


def test_a_posterior_is_trained_drawn_and_diagnosed():
    def model(x):
        zero = x.new_zeros(())
        mu = pyro.sample("mu", dist.Normal(zero, zero + 1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, zero + 1))
            k = pyro.sample("k", dist.Bernoulli(zero + 0.5))
            pyro.sample("x", dist.Normal(z + k, zero + 0.5), obs=x)

    x = torch.randn(16, device="cuda")
    for rounds in (1, 2):
        program = SinkhornProgram(model).to("cuda")
        program.calibrate(x, num_steps=4, num_simulations=300, num_rounds=rounds, seed=0, progress=False)
        draws = program.posterior(x, num_samples=10)
        assert all(value.is_cuda for value in draws.values())
    assert program.diagnose(x, num_simulations=20).posterior is not None


def test_mixed_devices_are_named():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.1).to_event(1), obs=x)

    with pytest.raises(ProgramError, match="cuda"):
        AutoImplicit(model)(torch.randn(8, 2, device="cuda"))
