"""Programs that can only be run, ellipsoids and images: their laws, their gradients, that they fit."""

import math

import pyro
import pytest
import torch
from pyro import poutine
from scipy import stats

from pyro_sinkhorn import SinkhornProgram, Trace_DataSinkhorn
from pyro_sinkhorn.models.ellipsoids import ellipsoid_radii, ellipsoids, spread_points
from pyro_sinkhorn.models.image_generator import image_generator, latent_grid

#: Disjoint ellipsoids, so that a point tells which one it is from.
CENTRES = {
    2: torch.tensor([[-8.0, 1.0], [0.0, 0.0], [9.0, 3.0]], dtype=torch.float64),
    3: torch.tensor([[-8.0, 1.0, 2.0], [0.0, 0.0, 0.0], [9.0, 3.0, -1.0]], dtype=torch.float64),
}
LEVEL = 1e-6  # of every test of a law: a right implementation fails once in a million seeds
N = 20_000


def given_axes(dim, num=3):
    """Matrices without symmetry: a transpose in the model would change the law."""
    noise = torch.randn(num, dim, dim, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return noise * 0.3 + torch.tensor([1.5, 0.5, 0.8][:dim], dtype=torch.float64).diag()


def draw(dim, n=N):
    pyro.param("axes", given_axes(dim))
    pyro.param("centres", CENTRES[dim].clone())
    trace = poutine.trace(ellipsoids(3, dim)).get_trace(torch.zeros(n, dim))
    return trace, trace.nodes["x"]["fn"].rsample().detach()


@pytest.mark.parametrize("dim", [2, 3])
def test_mean_and_covariance_are_exact(dim):
    trace, x = draw(dim)
    which = trace.nodes["which"]["value"]
    bound = stats.norm.isf(LEVEL / 2 / (3 * (dim + dim**2)))  # a union over all entries
    for k, (a, c) in enumerate(zip(given_axes(dim), CENTRES[dim], strict=True)):
        # Ellipsoid by ellipsoid: in the union the centres' spread would hide an error in the axes.
        offsets = x[which == k] - c
        products = offsets.unsqueeze(-1) * offsets.unsqueeze(-2)
        n = len(offsets)
        assert bool((offsets.mean(0).abs() <= bound * offsets.std(0) / n**0.5).all())
        # A uniform ball has covariance I / (d + 2).
        excess = products.mean(0) - a @ a.mT / (dim + 2)
        assert bool((excess.abs() <= bound * products.std(0) / n**0.5).all())


@pytest.mark.parametrize("dim", [2, 3])
def test_uniform_inside_every_ellipsoid(dim):
    axes, centres = given_axes(dim), CENTRES[dim]
    trace, x = draw(dim)
    radii = ellipsoid_radii(x, axes, centres)
    which = radii.argmin(-1)
    assert which.equal(trace.nodes["which"]["value"])
    assert float(radii.amin(-1).max()) <= 1 + 1e-12
    assert stats.chisquare(which.bincount(minlength=3).numpy()).pvalue > LEVEL
    for k in range(3):
        u = torch.linalg.solve(axes[k], (x[which == k] - centres[k]).mT).mT
        r = u.norm(dim=-1)
        # The volume inside radius r is r^d.
        assert stats.kstest((r**dim).numpy(), "uniform").pvalue > LEVEL
        cosine = (u / r.unsqueeze(-1))[:, 0]
        # A coordinate of a uniform direction: arcsine law on the circle, uniform on the sphere (Archimedes).
        level = torch.asin(cosine) / math.pi + 0.5 if dim == 2 else (cosine + 1) / 2
        assert stats.kstest(level.numpy(), "uniform").pvalue > LEVEL
        assert stats.spearmanr(r.numpy(), cosine.abs().numpy()).pvalue > LEVEL


def test_points_follow_the_data_in_number_and_type():
    for n, dtype in ((1, torch.float32), (7, torch.float64)):
        pyro.clear_param_store()
        trace = poutine.trace(ellipsoids(4, 2)).get_trace(torch.zeros(n, 2, dtype=dtype))
        fn = trace.nodes["x"]["fn"]
        assert fn.batch_shape == (n,) and fn.event_shape == (2,) and fn.rsample().dtype == dtype
        assert {name: p.shape for name, p in pyro.get_param_store().items()} == {
            "axes": (4, 2, 2),
            "centres": (4, 2),
        }
        assert all(p.dtype == dtype for p in pyro.get_param_store().values())


def test_the_start_is_balls_around_the_centres():
    ellipsoids(3, 2, centres=CENTRES[2], radius=0.7)(torch.zeros(2, 2))
    assert pyro.param("centres").equal(CENTRES[2])
    assert pyro.param("axes").equal(0.7 * torch.eye(2).repeat(3, 1, 1))
    assert (
        pyro.param("centres").data_ptr() != CENTRES[2].data_ptr()
    )  # training leaves the caller's tensor alone
    with pytest.raises(ValueError, match=r"centres have shape \(3, 2\)"):
        ellipsoids(3, 3, centres=CENTRES[2])


MODELS = {
    "ellipsoids": (lambda: ellipsoids(3, 3, centres=CENTRES[3] / 4), 3),
    "images": (lambda: image_generator(9, hidden=8), 9),
}


@pytest.mark.parametrize(("make", "dim"), MODELS.values(), ids=MODELS)
def test_gradients_of_every_parameter_are_finite_differences(make, dim):
    """Of the whole loss, at fixed noise. The value is the dual at potentials solved to 1e-9, so that what the solver
    leaves is far below the difference quotient's own error, of the order of step^2."""
    model, x = make(), torch.rand(40, dim)
    loss = Trace_DataSinkhorn(match_size=20, scale=None, relative_epsilon=2.0, tolerance=1e-9, max_iters=5000)

    def value():
        pyro.set_rng_seed(3)
        return loss.differentiable_loss(model, lambda _: None, x)

    value()
    parameters = [p.unconstrained() if hasattr(p, "unconstrained") else p for _, p in named_parameters()]
    gradients = torch.autograd.grad(value(), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert bool((gradient.abs().flatten(1).sum(-1) > 0).all()) if parameter.dim() > 1 else True
        direction, step = torch.randn_like(parameter), 1e-5
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * step * direction)
                ends.append(float(value()))
                parameter.sub_(sign * step * direction)
        expected = (ends[0] - ends[1]) / (2 * step)
        assert float((gradient * direction).sum()) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def named_parameters():
    return list(pyro.get_param_store().named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_from_the_unit_square(dtype):
    torch.set_default_dtype(dtype)
    trace = poutine.trace(image_generator(9, hidden=5, dim=2)).get_trace(torch.zeros(6, 9, dtype=dtype))
    x, z = trace.nodes["x"]["fn"], trace.nodes["z"]
    assert x.batch_shape == (6,) and x.event_shape == (9,) and x.rsample().dtype == dtype
    assert bool((x.rsample() > 0).all()) and bool((x.rsample() < 1).all())
    assert z["value"].shape == (6, 2) and bool(z["fn"].support.check(z["value"]).all())
    assert {name.split("$$$")[0] for name in trace.param_nodes} == {"decoder"}


def test_images_are_the_decoded_latents():
    model = image_generator(9, hidden=5)
    trace = poutine.trace(model).get_trace(torch.zeros(6, 9))
    program = SinkhornProgram(model, loss=Trace_DataSinkhorn(match_size=3))
    decoded = program.modules["decoder"](trace.nodes["z"]["value"]).sigmoid()
    assert trace.nodes["x"]["fn"].rsample().equal(decoded)


def test_latent_grid_tiles_the_square():
    grid = latent_grid(10)
    assert grid.shape == (100, 2)
    assert grid.mean(0).tolist() == pytest.approx([0.5, 0.5])
    assert grid[0].tolist() == pytest.approx([0.05, 0.95]) and grid[-1].tolist() == pytest.approx(
        [0.95, 0.05]
    )
    assert grid[9].tolist() == pytest.approx([0.95, 0.95])


@pytest.mark.parametrize(("make", "dim"), MODELS.values(), ids=MODELS)
def test_programs_fit_generate_save_and_load(make, dim, tmp_path):
    x = torch.rand(64, dim)
    program = SinkhornProgram(make(), loss=Trace_DataSinkhorn(match_size=8, relative_epsilon=1.0))
    program.fit(x, num_steps=3, batch_size=16, seed=0, progress=False)
    draws = program.generate(2, x[:5], seed=0)
    assert draws["x"].shape == (2, 5, dim)
    program.save(tmp_path / "a.pt")
    pyro.clear_param_store()
    loaded = SinkhornProgram.load(tmp_path / "a.pt", make())
    assert loaded.generate(2, x[:5], seed=0)["x"].equal(draws["x"])


def test_ellipsoids_move_to_the_data():
    """Started 1 away from three near ellipsoids in both coordinates. The mean of 600 points has standard error
    1 / sqrt(600) = .04 in each, the three centres' mean no more, and a step's noise is below .1 at the end of the
    schedule: .4 is beyond four of both together, and far from the 1.4 of a fit that does nothing."""
    centres = CENTRES[2] / 8
    pyro.param("axes", given_axes(2) / 2)
    pyro.param("centres", centres.clone())
    x = poutine.trace(ellipsoids(3, 2)).get_trace(torch.zeros(600, 2)).nodes["x"]["fn"].rsample().detach()
    pyro.clear_param_store()
    schedule = pyro.optim.CosineAnnealingLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "T_max": 50}
    )
    program = SinkhornProgram(
        ellipsoids(3, 2, centres + 1.0), loss=Trace_DataSinkhorn(match_size=32, scale=None)
    )
    program.fit(x, num_steps=50, batch_size=64, seed=0, optim=schedule, progress=False)
    with program.active():
        found = pyro.param("centres").detach()
    assert float((found - centres).mean(0).norm()) < 0.4


def test_spread_points_are_data_and_give_the_radius_of_balls():
    x = torch.randn(50, 3)
    generator = torch.Generator().manual_seed(0)
    centres, radius = spread_points(x, 4, generator=generator)
    distances = torch.cdist(x, centres)
    assert bool((distances.amin(0) < 1e-6).all()) and centres.unique(dim=0).shape == (4, 3)
    assert radius == pytest.approx(float((distances.amin(-1).square().mean() * 5 / 3).sqrt()))
    one = [spread_points(x, 4, tries=1, generator=generator)[1] for _ in range(20)]
    assert radius <= sum(one) / len(one)  # the best of 20 against the average one
    with pytest.raises(ValueError, match="tries"):
        spread_points(x, 2, tries=0)


def test_radii_are_the_metric_of_each_ellipsoid():
    axes, centres, x = given_axes(3), CENTRES[3], torch.randn(5, 3)
    by_hand = [
        [
            float(((v - c) @ torch.linalg.inv(a @ a.mT) @ (v - c)).sqrt())
            for a, c in zip(axes, centres, strict=True)
        ]
        for v in x
    ]
    assert ellipsoid_radii(x, axes, centres).tolist() == [pytest.approx(row) for row in by_hand]
