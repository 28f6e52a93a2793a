"""Costs of single sites: where they come from, which one wins, and that they are what a group is compared by."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI

from pyro_sinkhorn import AutoImplicit, Implicit, SinkhornProgram, Trace_Sinkhorn
from pyro_sinkhorn.distributions import HypersphericalUniform
from pyro_sinkhorn.errors import ProgramError
from pyro_sinkhorn.geometry import Circle, Real, Sphere, geometry_of, registry
from pyro_sinkhorn.losses.site_cost import GroupCost, SiteCost, site_cost
from pyro_sinkhorn.ot import sinkhorn
from pyro_sinkhorn.ot.cost import geodesic, l1, mahalanobis, sqeuclidean


def model_of(prior, cost=None, name="z"):
    infer = {} if cost is None else {"sinkhorn": {"cost": cost}}

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample(name, prior(), infer=infer)
            pyro.sample("x", dist.Normal(z.reshape(len(x), -1)[:, :2], 0.1).to_event(1), obs=x)

    return model


def normal():
    return dist.Normal(torch.zeros(2), 1.0).to_event(1)


def matched(model, cost=None, n=64):
    """The costs that a step compared by, one for each group."""
    seen = []
    loss = Trace_Sinkhorn(cost=cost, match_size=n // 2)
    inherited = loss.latent_match.divergence

    def watch(x, y, mean, group, paired, cost="sqeuclidean"):
        seen.append((x, y, mean, cost))
        return inherited(x, y, mean, group, paired, cost)

    loss.latent_match.divergence = watch
    pyro.clear_param_store()
    SVI(model, AutoImplicit(model), pyro.optim.Adam({"lr": 1e-3}), loss).step(torch.randn(n, 2))
    return seen


def named(name):
    def cost(x, y):
        return torch.cdist(x, y)

    cost.__name__ = name
    return cost


def test_the_argument_wins_over_the_annotation_over_the_registry(monkeypatch):
    class Mine(Real):
        cost = named("registered")

    monkeypatch.setitem(registry._BY_TYPE, dist.Laplace, lambda fn: Mine(fn.event_shape))

    def prior():
        return dist.Laplace(torch.zeros(2), 1.0).to_event(1)

    def used(model, cost=None):
        ((_, _, _, found),) = matched(model, cost)
        (block,) = found.blocks
        return block[1].cost.__name__

    assert used(model_of(prior)) == "registered"
    assert used(model_of(prior, named("annotated"))) == "annotated"
    assert used(model_of(prior, named("annotated")), {"z": named("argument")}) == "argument"
    annotated = poutine.infer_config(
        model_of(prior),
        lambda site: {"sinkhorn": {"cost": named("configured")}} if site["name"] == "z" else {},
    )
    assert used(annotated) == "configured"


def test_the_whole_group_can_have_one_cost():
    mine = named("mine")
    ((_, _, _, cost),) = matched(model_of(normal, named("annotated")), mine)
    assert cost is mine
    ((_, _, _, cost),) = matched(model_of(normal))
    assert cost == "sqeuclidean"
    ((_, _, _, cost),) = matched(model_of(normal, named("annotated")), {"z": "sqeuclidean"})
    assert cost == "sqeuclidean"


@pytest.mark.parametrize(
    "cost",
    ["l1", "euclidean", lambda x, y: 7 * sqeuclidean(x, y), mahalanobis(torch.eye(2))],
    ids=["l1", "euclidean", "function", "mahalanobis"],
)
def test_every_site_weighs_its_dimension(cost):
    """Two prior draws are 2 dim apart, whatever unit a cost comes in."""
    ((_, y, mean, found),) = matched(model_of(normal, cost))
    assert float(mean) == pytest.approx(4, rel=0.02)
    assert float(found(y.points[0, :32], y.points[0, 32:]).mean()) == pytest.approx(4, rel=0.5)


def test_a_function_sees_values_in_their_own_shape():
    shapes = set()

    def cost(x, y):
        shapes.add((tuple(x.shape[1:]), tuple(y.shape[1:])))
        return sqeuclidean(x.flatten(1), y.flatten(1))

    matched(model_of(lambda: dist.Dirichlet(torch.ones(2, 3)).to_event(1), cost))
    assert shapes == {((2, 3), (2, 3))}


def test_sites_of_a_group_add_up():
    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", normal(), infer={"sinkhorn": {"cost": "l1"}})
            b = pyro.sample("b", normal())
            c = pyro.sample("c", HypersphericalUniform(3), infer={"sinkhorn": {"cost": "geodesic"}})
            pyro.sample("x", dist.Normal(a + b + c[..., :2], 0.1).to_event(1), obs=x)

    ((x, y, mean, cost),) = matched(model)
    p, q = x.points[0].detach(), y.points[0]
    factors = [block[2] for block in cost.blocks]
    expected = (
        factors[0] * l1(p[:, :2], q[:, :2])
        + sqeuclidean(p[:, 2:4], q[:, 2:4])
        + factors[2] * geodesic(p[:, 4:], q[:, 4:])
    )
    assert torch.allclose(cost(p, q), expected)
    assert float(mean) == pytest.approx(2 * (2 + 2 + 2), rel=0.2)
    assert torch.allclose(p[:, 4:].norm(dim=-1), torch.ones(64))


def test_a_site_in_a_plate_inside_the_datum_adds_its_copies_up():
    def model(x):
        n, k = len(x), 3
        with pyro.plate("data", n, dim=-2):
            with pyro.plate("copies", k, dim=-1):
                z = pyro.sample("z", dist.VonMises(0.0, 1.0), infer={"sinkhorn": {"cost": "geodesic"}})
            pyro.sample("x", dist.Normal(z[..., :2].cos().unsqueeze(-2), 0.1).to_event(1), obs=x.unsqueeze(1))

    ((x, y, _, cost),) = matched(model)
    p, q = x.points[0, :5].detach(), y.points[0, :5]
    width = 2 if p.shape[-1] == 6 else p.shape[-1]
    assert p.shape[-1] in (2, 6)
    total = sum(geodesic(p[:, i : i + width], q[:, i : i + width]) for i in range(0, p.shape[-1], width))
    assert torch.allclose(cost(p, q), cost.blocks[0][2] * total)


def test_geodesics_of_angles():
    own = SiteCost("z", "geodesic", Circle(torch.Size([3])))
    a, b = torch.rand(4, 3) * 6, torch.rand(5, 3) * 6
    x, y = (own.columns(v) for v in (a, b))
    wrapped = torch.remainder(a[:, None] - b + math.pi, 2 * math.pi) - math.pi
    assert torch.allclose(own.matrix(x, y), wrapped.square().sum(-1))


def test_geodesics_of_several_directions():
    own = SiteCost("z", "geodesic", Sphere(torch.Size([2, 3])))
    a, b = (HypersphericalUniform(3).sample((n, 2)) for n in (4, 5))
    x, y = (own.columns(v) for v in (a, b))
    arcs = torch.einsum("nki,mki->nmk", a, b).clamp(-1, 1).acos()
    assert torch.allclose(own.matrix(x, y), arcs.square().sum(-1))


@pytest.mark.parametrize(("prior", "cost"), [
    (lambda: HypersphericalUniform(3), "geodesic"),
    (lambda: dist.VonMises(torch.zeros(2), 1.0).to_event(1), "geodesic"),
    (normal, "l1"),
    (normal, mahalanobis(torch.tensor([[2.0, 0.5], [0.5, 1.0]]))),
])  # fmt: skip
def test_a_guide_learns_by_it(prior, cost):
    """A cloud that starts beside the prior is brought to it: the match falls to its floor."""
    fn = prior()
    geometry = geometry_of(fn)

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", fn, infer={"sinkhorn": {"cost": cost}})
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def guide(x):
        shift = pyro.param("shift", torch.full((geometry.num_raw,), 2.0))
        spread = pyro.param("spread", torch.full((geometry.num_raw,), 0.5))
        with pyro.plate("data", len(x)):
            value = geometry.head(shift + spread * torch.randn(len(x), geometry.num_raw))
            pyro.sample("z", Implicit(value, event_dim=len(fn.event_shape)))

    loss = Trace_Sinkhorn(prior_weight=100.0, match_size=32)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 3e-2}), loss)
    values = []
    for _ in range(250):
        svi.step(torch.randn(64))
        values.append(loss.terms.match["z"])
    assert sum(values[-50:]) / 50 < 0.05 * sum(values[:3]) / 3


def test_a_program_keeps_the_factor(tmp_path):
    model = model_of(normal)
    program = SinkhornProgram(model, loss=Trace_Sinkhorn(cost={"z": "l1"}, match_size=8))
    program.fit(torch.randn(64, 2), num_steps=1, batch_size=16, seed=0, progress=False)
    program.save(tmp_path / "program.pt")
    loaded = SinkhornProgram.load(tmp_path / "program.pt", model)
    assert "cost of z" in loaded.loss.latent_match.state.units
    assert loaded.loss.config() == program.loss.config()
    own = SinkhornProgram(model, loss=Trace_Sinkhorn(cost={"z": named("mine")}, match_size=8))
    own.fit(torch.randn(64, 2), num_steps=1, batch_size=16, seed=0, progress=False).save(tmp_path / "own.pt")
    with pytest.raises(ValueError, match="with a cost of its own"):
        SinkhornProgram.load(tmp_path / "own.pt", model)


@pytest.mark.parametrize(
    ("model", "cost", "message"),
    [
        (model_of(normal, "cosine"), None, "site 'z': unknown cost 'cosine': expected one of"),
        (
            model_of(normal, "geodesic"),
            None,
            r"cost='geodesic' is the arc on a sphere or circle, but its geometry is Real",
        ),
        (
            model_of(normal, lambda x, y: x.sum()),
            None,
            r"site 'z': its cost was given values .* returned \(\)",
        ),
        (
            model_of(normal),
            {"w": "l1"},
            r"cost= names the sites \['w'\], but the latents of the model are \['z'\]",
        ),
    ],
)
def test_wrong_costs(model, cost, message):
    with pytest.raises(ProgramError, match=message):
        matched(model, cost)


def test_a_wrong_annotation():
    fn = normal()
    site = {"infer": {"sinkhorn": {"price": 1}}, "fn": fn}
    with pytest.raises(
        ProgramError, match=r"infer=\{'sinkhorn': \{'price': 1\}\}: expected a dictionary with the keys"
    ):
        site_cost("z", site, geometry_of(fn), None)


# The named costs


def test_a_geodesic_is_smooth_where_points_coincide():
    x = HypersphericalUniform(3).sample((4,)).requires_grad_()
    y = x.detach().clone()
    assert torch.autograd.gradcheck(lambda x: geodesic(x, y).sum(), x, atol=1e-4)
    (gradient,) = torch.autograd.grad(geodesic(x, x.detach()).diagonal().sum(), x)
    assert (gradient.abs() < 1e-5).all()
    (gradient,) = torch.autograd.grad(geodesic(x, -x.detach()).diagonal().sum(), x)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("angle", [1e-8, 1e-3, 0.019, 0.021, 0.5, 3.0])
def test_a_geodesic_is_the_arc(angle):
    x = torch.tensor([[1.0, 0.0]])
    y = torch.tensor([[math.cos(angle), math.sin(angle)]])
    assert float(geodesic(x, y)) == pytest.approx(angle**2, rel=1e-6, abs=1e-15)


def test_mahalanobis_and_l1_in_transport():
    x, y = torch.randn(2, 6, 2)
    precision = torch.tensor([[2.0, 0.5], [0.5, 1.0]])
    difference = x[:, None] - y
    expected = torch.einsum("nmi,ij,nmj->nm", difference, precision, difference)
    assert torch.allclose(mahalanobis(precision)(x, y), expected)
    assert sinkhorn(x, y, 0.5, cost=mahalanobis(precision)).converged
    assert torch.allclose(l1(x, y), difference.abs().sum(-1))
    with pytest.raises(ValueError, match="positive definite"):
        mahalanobis(-torch.eye(2))


def test_a_group_cost_without_plain_columns():
    cost = GroupCost([(2, SiteCost("z", "l1", Real(torch.Size([2]))), 2.0)])
    x, y = torch.randn(3, 2), torch.randn(4, 2)
    assert torch.allclose(cost(x, y), 2 * l1(x, y))


def test_copies_inside_the_datum_have_units_of_their_own():
    """A named cost sees rows in the units of their columns, of every copy."""

    def model(x):
        n, k = len(x), 3
        with pyro.plate("data", n, dim=-2):
            with pyro.plate("copies", k, dim=-1):
                z = pyro.sample("z", dist.Normal(0.0, 5.0), infer={"sinkhorn": {"cost": "l1"}})
            pyro.sample("x", dist.Normal(z[..., :2].unsqueeze(-2), 0.1).to_event(1), obs=x.unsqueeze(1))

    ((_, y, mean, _),) = matched(model)
    assert y.points.std() == pytest.approx(1, rel=0.3)
    assert float(mean) == pytest.approx(2, rel=0.3)
