"""Which geometry a distribution gets, and how a user teaches one."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import SVI

import pyro_sinkhorn
from pyro_sinkhorn import AutoImplicit, Trace_Sinkhorn, register_geometry
from pyro_sinkhorn.geometry import (
    Circle,
    Geometry,
    HalfLine,
    Interval,
    Real,
    Simplex,
    discrete,
    geometry_of,
    registry,
)


@pytest.fixture(autouse=True)
def registrations_of_a_test_end_with_it(monkeypatch):
    monkeypatch.setattr(registry, "_BY_TYPE", dict(registry._BY_TYPE))
    monkeypatch.setattr(registry, "_BY_SUPPORT", dict(registry._BY_SUPPORT))


def real(fn):
    return Real(fn.event_shape)


def test_the_type_wins_over_the_support():
    assert dist.VonMises.support is constraints.real
    assert isinstance(geometry_of(dist.VonMises(0.0, 1.0)), Circle)
    assert geometry_of(dist.Cauchy(0.0, 1.0)).heavy_tailed
    assert not geometry_of(dist.Laplace(0.0, 1.0)).heavy_tailed


def test_a_subclass_wins_over_its_parent():
    class Mine(dist.Gamma):
        pass

    assert isinstance(geometry_of(Mine(1.0, 1.0)), HalfLine)
    register_geometry(dist.Gamma, real)
    assert isinstance(geometry_of(Mine(1.0, 1.0)), Real)
    register_geometry(Mine, lambda fn: Interval(fn.event_shape))
    assert isinstance(geometry_of(Mine(1.0, 1.0)), Interval)
    assert isinstance(geometry_of(dist.Gamma(1.0, 1.0)), Real)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda d: d.to_event(1),
        lambda d: d.mask(torch.tensor([True, False, True])),
        lambda d: d.mask(False).to_event(1),
        lambda d: d.expand([2, 3]),
        lambda d: d.expand([2, 3]).to_event(2),
        lambda d: d.expand_by([4]).mask(True),
    ],
)
def test_wrappers_do_not_hide_the_type(wrap):
    fn = wrap(dist.VonMises(torch.zeros(3), 1.0))
    geometry = geometry_of(fn)
    assert isinstance(geometry, Circle)
    assert geometry.event_shape == fn.event_shape


def test_registered_as_a_function():
    assert register_geometry(dist.Gamma, real) is real
    assert isinstance(geometry_of(dist.Gamma(1.0, 1.0)), Real)
    assert isinstance(geometry_of(dist.Exponential(1.0)), HalfLine)


def test_registered_as_a_decorator():
    @register_geometry(dist.Gamma)
    def gamma(fn):
        return Real(fn.event_shape)

    assert gamma(dist.Gamma(1.0, 1.0)).event_shape == ()
    assert isinstance(geometry_of(dist.Gamma(1.0, 1.0)), Real)


@pytest.mark.parametrize("key", [constraints.simplex, type(constraints.simplex)], ids=["instance", "class"])
def test_registered_for_a_constraint(key):
    register_geometry(key, real)
    for fn in (dist.Dirichlet(torch.ones(3)), dist.Dirichlet(torch.ones(2, 3)).to_event(1)):
        assert isinstance(geometry_of(fn), Real)


def test_a_second_registration_replaces_the_first():
    register_geometry(dist.Gamma, real)
    register_geometry(dist.Gamma, lambda fn: Interval(fn.event_shape))
    assert isinstance(geometry_of(dist.Gamma(1.0, 1.0)), Interval)


def test_the_factory_sees_the_distribution_as_the_model_states_it():
    seen = []
    register_geometry(dist.Gamma, lambda fn: seen.append(fn) or Real(fn.event_shape))
    fn = dist.Gamma(1.0, 1.0).expand([2]).to_event(1)
    geometry_of(fn)
    assert seen[0] is fn


@pytest.mark.parametrize("key", ["positive", 3, dist.Gamma(1.0, 1.0), torch.nn.Linear], ids=repr)
def test_what_is_neither_distribution_nor_constraint_is_refused(key):
    with pytest.raises(TypeError, match="expected a distribution class such as .* or a constraint such as"):
        register_geometry(key, real)


@pytest.fixture
def forgotten(registrations_of_a_test_end_with_it):
    """As if nobody had taught the support of LKJCholesky."""
    del registry._BY_SUPPORT[type(constraints.corr_cholesky)]


@pytest.mark.usefixtures("forgotten")
def test_an_unknown_support_names_the_site_and_the_way_out():
    with pytest.raises(ValueError) as error:
        geometry_of(dist.LKJCholesky(3, 1.0), "rho")
    text = str(error.value)
    assert text.startswith(
        "latent site 'rho': LKJCholesky with event shape (3, 3) has the support CorrCholesky()"
    )
    assert "register_geometry(pyro.distributions.LKJCholesky" in text
    with pytest.raises(ValueError, match="^LKJCholesky with event shape"):
        geometry_of(dist.LKJCholesky(3, 1.0))


@pytest.mark.usefixtures("forgotten")
def test_a_distribution_of_the_users_own_is_not_looked_for_in_pyro():
    class Own(dist.LKJCholesky):
        pass

    with pytest.raises(ValueError, match=r"register_geometry\(Own, lambda"):
        geometry_of(Own(3, 1.0))


@pytest.mark.parametrize(
    "fn", [dist.Multinomial(3, torch.ones(3)), dist.DirichletMultinomial(torch.ones(3), total_count=3)]
)
def test_states_that_cannot_be_listed_are_told_so_instead_of_how_to_embed_it(fn):
    with pytest.raises(
        ValueError, match="latent site 'k': .* has the discrete support .* Sum it out"
    ) as error:
        geometry_of(fn, "k")
    assert "register_geometry" not in str(error.value)


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.LKJCholesky(2, 1.0))
        pyro.sample("x", dist.Normal(z[..., 1, :], 0.1).to_event(1), obs=x)


@pytest.mark.usefixtures("forgotten")
def test_the_recipe_of_the_error_works_when_followed():
    x = dist.LKJCholesky(2, 1.0).sample((16,))[:, 1]
    with pytest.raises(ValueError) as error:
        AutoImplicit(model)(x)
    _, _, recipe = str(error.value).partition("Teach it one:\n\n")
    recipe = recipe.partition("Trace Shapes:")[0].replace("\n    ", "\n").strip()
    # Fill in the two bodies: a correlation of two variables is one number.
    for heading, body in [
        (
            "def head(self, raw): ...",
            "def head(self, raw):\n"
            "        c, s = raw[..., 0].tanh(), 1 / raw[..., 0].cosh()\n"
            "        rows = torch.stack([torch.ones_like(c), torch.zeros_like(c), c, s], -1)\n"
            "        return rows.reshape(*raw.shape[:-1], 2, 2)",
        ),
        (
            "def embed(self, value): ...",
            "def embed(self, value):\n        return self.flatten(value)[..., 2:]",
        ),
    ]:
        assert heading in recipe
        recipe = recipe.replace(heading, body)
    exec(recipe, {"pyro": pyro, "pyro_sinkhorn": pyro_sinkhorn, "torch": torch})

    assert issubclass(type(geometry_of(dist.LKJCholesky(2, 1.0))), Geometry)
    svi = SVI(model, AutoImplicit(model), pyro.optim.Adam({"lr": 1e-3}), loss=Trace_Sinkhorn(match_size=8))
    assert all(torch.tensor(svi.step(x)).isfinite() for _ in range(3))


def test_a_registered_geometry_is_what_the_guide_and_the_match_use():
    class Shifted(Simplex):
        def head(self, raw):
            return super().head(raw + 100 * torch.eye(3)[0])  # always the first vertex

    register_geometry(dist.Dirichlet, lambda fn: Shifted(fn.event_shape))

    def program(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Dirichlet(torch.ones(3)))
            pyro.sample("x", dist.Normal(z, 0.1).to_event(1), obs=x)

    z = AutoImplicit(program)(torch.rand(5, 3))["z"]
    assert torch.allclose(z, torch.eye(3)[0].expand(5, 3))


def test_a_site_is_looked_up_once_unless_its_distribution_changes(monkeypatch):
    asked = []
    monkeypatch.setattr(registry, "geometry_of", lambda fn, name: asked.append(fn) or geometry_of(fn, name))
    site = {"name": "z", "fn": dist.Gamma(1.0, 1.0)}
    first = registry.geometry_at(site)
    assert registry.geometry_at(site) is first and isinstance(first, HalfLine) and len(asked) == 1
    site["fn"] = dist.Normal(0.0, 1.0)
    assert isinstance(registry.geometry_at(site), Real) and len(asked) == 2


@pytest.mark.parametrize(
    "make",
    [
        lambda rate: dist.Poisson(rate).expand([50]),
        lambda rate: dist.Poisson(torch.stack([rate, 9 * rate])).expand([50, 2]).to_event(1),
        lambda rate: dist.NegativeBinomial(rate, torch.tensor(0.6)).expand([50]),
        lambda rate: dist.GammaPoisson(rate, torch.tensor(0.5)).expand([50]),
        lambda rate: dist.Poisson(rate + torch.arange(100.0) / 30),
    ],
    ids=["one rate", "one a coordinate", "two parameters", "inside another", "one a datum"],
)
def test_the_range_of_a_count_follows_its_rate(make, monkeypatch):
    found = [geometry_of(make(torch.tensor(rate))).largest for rate in (0.1, 4.0, 0.1, 4.0)]
    monkeypatch.setattr(discrete, "_law", lambda fn: None)
    anew = [geometry_of(make(torch.tensor(rate))).largest for rate in (0.1, 4.0, 0.1, 4.0)]
    assert found == anew and anew[0] < anew[1]


def test_a_rate_changed_in_place_is_seen():
    rate = torch.tensor(0.1)
    fn = dist.Poisson(rate)
    low = geometry_of(fn).largest
    rate.fill_(9.0)
    assert geometry_of(fn).largest > low


def test_the_range_of_one_rate_is_summed_once(monkeypatch):
    asked = []
    search = discrete._found_largest
    monkeypatch.setattr(discrete, "_found_largest", lambda fn: asked.append(fn) or search(fn))
    monkeypatch.setattr(discrete, "_LARGEST", {})
    for _ in range(3):
        geometry_of(dist.Poisson(torch.tensor(2.0)).expand([50]))
    assert len(asked) == 1
