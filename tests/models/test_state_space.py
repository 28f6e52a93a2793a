"""The state space: its motion against an independent solver, its sites, its paths."""

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer.inspect import get_dependencies
from scipy.integrate import solve_ivp

from pyro_sinkhorn import AutoImplicit, SinkhornProgram, Trace_Sinkhorn
from pyro_sinkhorn.models import simulate_state_space, state_space, van_der_pol_step


@pytest.mark.parametrize("damping", [0.0, 1.0, 2.0])
def test_one_step_is_the_motion_of_the_differential_equation(damping):
    z = torch.tensor([[2.0, 0.0], [-1.0, 1.5], [0.1, -0.2]])
    steps = van_der_pol_step(z, damping, 0.02)
    for start, end in zip(z.tolist(), steps.tolist(), strict=True):

        def velocity(_, y):
            return [y[1], damping * (1 - y[0] ** 2) * y[1] - y[0]]

        exact = solve_ivp(velocity, (0, 0.02), start, rtol=1e-12, atol=1e-12).y[:, -1]
        assert np.abs(exact - end).max() < 1e-7  # a method of order 2 would be off by 1e-6


def test_paths_wind_onto_the_cycle_from_anywhere():
    z = 6 * torch.randn(500, 2)
    for _ in range(200):
        z = van_der_pol_step(z)
        assert z.abs().max() < 40
    path = []
    for _ in range(40):
        z = van_der_pol_step(z)
        path.append(z[:, 0])
    assert torch.stack(path).abs().amax(0).sub(2.0).abs().max() < 0.03


def test_sites_depend_on_their_predecessor_alone():
    _, x = simulate_state_space(4, num_steps=4)
    trace = poutine.trace(state_space(4)).get_trace(x)
    for t in range(4):
        assert trace.nodes[f"z_{t}"]["value"].shape == (4, 2)
        assert trace.nodes[f"x_{t}"]["value"].equal(x[:, t])
        assert [f.name for f in trace.nodes[f"z_{t}"]["cond_indep_stack"] if f.vectorized] == ["data"]
    found = get_dependencies(state_space(4), (x,))["prior_dependencies"]
    assert set(found["z_3"]) == {"z_2", "z_3"} and set(found["x_2"]) == {"z_2", "x_2"}


def test_simulated_paths_have_the_noises_asked_for():
    state = torch.get_rng_state()
    z, x = simulate_state_space(500, num_steps=20, state_noise=0.2, obs_noise=0.1)
    assert torch.get_rng_state().equal(state)
    assert z.shape == (500, 20, 2) and x.shape == (500, 20, 1)
    kicks = (z[:, 1:] - van_der_pol_step(z[:, :-1])) / 0.2
    blurs = (x - z[..., :1]) / 0.1
    for standard in (kicks, blurs, z[:, 0]):
        n = standard.numel()
        assert abs(standard.mean()) < 5 / n**0.5 and abs(standard.var() - 1) < 5 * (2 / n) ** 0.5
    again, _ = simulate_state_space(500, num_steps=20, state_noise=0.2, obs_noise=0.1)
    assert again.equal(z) and not simulate_state_space(500, num_steps=20, seed=1)[0].equal(z)


def test_known_by_default_and_parameters_on_demand():
    _, x = simulate_state_space(4, num_steps=3)
    state_space(3)(x)
    assert not pyro.get_param_store().keys()
    state_space(3, 0.7, learn=True)(x)
    assert set(pyro.get_param_store().keys()) == {"damping", "state_noise", "obs_noise"}
    assert pyro.param("damping").item() == pytest.approx(0.7)


def test_data_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"x has shape \(4, 7, 1\): expected \(n, 5, 1\)"):
        state_space(5)(torch.zeros(4, 7, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_it_fits_encodes_and_generates(dtype):
    torch.set_default_dtype(dtype)
    _, x = simulate_state_space(40, num_steps=6)
    model = state_space(6, learn=True)
    guide = AutoImplicit(model, encoder_input=lambda x: x)
    program = SinkhornProgram(model, guide, Trace_Sinkhorn(match_size=8))
    program.fit(x, num_steps=3, batch_size=20, seed=0, progress=False)
    with program.active():
        values = [pyro.param(name).item() for name in ("damping", "state_noise", "obs_noise")]
    assert all(value != start for value, start in zip(values, (1.0, 0.1, 0.3), strict=True))
    assert program.encode(x)["z_5"].shape == (1, 40, 2)
    assert program.encode(x)["z_5"].dtype == dtype
    assert program.generate(3, x[:2])["x_5"].shape == (3, 2, 1)
