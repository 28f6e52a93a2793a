"""Laws that hold for every support: heads land in it, embeddings tell values apart, gradients stay finite."""

import math

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch.distributions import transforms

from pyro_sinkhorn.distributions import HypersphericalUniform, VonMisesFisher
from pyro_sinkhorn.geometry import Circle, HalfLine, Interval, Ordered, Real, Simplex, Sphere, geometry_of

DTYPES = [torch.float32, torch.float64]
# torch says so of every draw whose smallest eigenvalue it cannot tell from 0, and draws again
pytestmark = pytest.mark.filterwarnings("ignore:Singular sample detected")


class Below(dist.Gamma):
    """Less than 2."""

    support = constraints.less_than(2.0)

    def rsample(self, sample_shape=()):
        return 2.0 - super().rsample(sample_shape)


class HalfOpen(dist.Uniform):
    """In [-1, 3)."""

    support = constraints.half_open_interval(-1.0, 3.0)


def t(*values):
    return torch.tensor(values)


class InverseWishart(dist.Wishart):
    """Covariances with heavy tails, sampled through their inverse."""

    def rsample(self, sample_shape=()):
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(super().rsample(sample_shape)))
        return (inverse + inverse.mT) / 2


def transformed(shape, support):
    """A normal sent into a support by torch's own bijection."""
    base = dist.Normal(torch.zeros(shape), 1.0).to_event(len(shape))
    return Through(base, torch.distributions.transform_to(support), support)


class Through(dist.TorchDistribution):
    """The law of a transformed draw, whose support is named."""

    arg_constraints = {}
    has_rsample = True

    def __init__(self, base, transform, support):
        self.base, self.transform, self._support = base, transform, support
        super().__init__(torch.Size(), transform(base.sample()).shape, validate_args=False)

    @property
    def support(self):
        return self._support

    def rsample(self, sample_shape=()):
        return self.transform(self.base.rsample(sample_shape))


class Pieced(dist.TorchDistribution):
    """Unlike numbers in one vector: a real one, a positive one, and one in (0, 1)."""

    arg_constraints = {}

    def __init__(self, stacked):
        parts = [constraints.real, constraints.positive, constraints.unit_interval]
        made = (
            constraints.stack(parts, dim=-1) if stacked else constraints.cat(parts, dim=-1, lengths=[1, 1, 1])
        )
        self._support = constraints.independent(made, 1 - made.event_dim)
        super().__init__(torch.Size(), torch.Size([3]), validate_args=False)

    @property
    def support(self):
        return self._support

    def sample(self, sample_shape=()):
        z = torch.randn(*sample_shape, 3)
        return torch.stack([z[..., 0], z[..., 1].exp(), z[..., 2].sigmoid()], -1)


# Every support, and the ways a distribution can be wrapped. Made in the default dtype of the moment.
PRIORS = {
    "normal": lambda: dist.Normal(0.3, 2.0),
    "normal vector": lambda: dist.Normal(t(0.0, 1.0, 2.0), t(0.1, 1.0, 10.0)).to_event(1),
    "multivariate normal": lambda: dist.MultivariateNormal(torch.zeros(2), t([1.0, 0.5], [0.5, 2.0])),
    "gumbel": lambda: dist.Gumbel(0.0, 2.0),
    "affine of normal": lambda: dist.TransformedDistribution(
        dist.Normal(torch.zeros(2), 1.0).to_event(1), [transforms.AffineTransform(3.0, 2.0)]
    ),
    "gamma": lambda: dist.Gamma(2.0, 3.0),
    "exponential": lambda: dist.Exponential(2.0),
    "log-normal": lambda: dist.LogNormal(torch.zeros(3), 2.0).to_event(1),
    "half-cauchy": lambda: dist.HalfCauchy(1.0),
    "pareto": lambda: dist.Pareto(2.0, 3.0),
    "below": lambda: Below(2.0, 1.0),
    "beta": lambda: dist.Beta(0.5, 2.0),
    "uniform": lambda: dist.Uniform(t(-1.0, 100.0), t(3.0, 101.0)).to_event(1),
    "half-open": lambda: HalfOpen(-1.0, 3.0),
    "logit-normal": lambda: dist.TransformedDistribution(
        dist.Normal(0.0, 2.0), [transforms.SigmoidTransform()]
    ),
    "dirichlet": lambda: dist.Dirichlet(torch.ones(4)),
    "sparse dirichlet": lambda: dist.Dirichlet(torch.full((10,), 0.05)),
    "dirichlet rows": lambda: dist.Dirichlet(torch.ones(2, 3)).to_event(1),
    "sphere": lambda: HypersphericalUniform(3),
    "circle of vectors": lambda: HypersphericalUniform(2),
    "von mises-fisher": lambda: VonMisesFisher(t(0.0, 0.0, 1.0, 0.0), torch.tensor(20.0)),
    "projected normal": lambda: dist.ProjectedNormal(t(1.0, 0.0, 0.0)),
    "spheres": lambda: HypersphericalUniform(3).expand([2]).to_event(1),
    "von mises": lambda: dist.VonMises(3.0, 2.0),
    "torus": lambda: dist.VonMises(torch.zeros(2), 1.0).to_event(1),
    "cauchy": lambda: dist.Cauchy(1.0, 3.0),
    "student": lambda: dist.StudentT(1.5).expand([2]).to_event(1),
    "expanded": lambda: dist.Dirichlet(torch.ones(3)).expand([2]).to_event(1),
    "masked": lambda: dist.Beta(2.0, 2.0).mask(True),
    "levy": lambda: dist.Stable(0.5, 1.0),
    "shifted cauchy": lambda: dist.TransformedDistribution(
        dist.Cauchy(0.0, 1.0), [transforms.AffineTransform(3.0, 2.0)]
    ),
    "multivariate student": lambda: dist.MultivariateStudentT(
        torch.tensor(1.5), torch.zeros(2), torch.eye(2)
    ),
    "weibull": lambda: dist.Weibull(2.0, 0.7),
    "inverse gamma": lambda: dist.InverseGamma(1.5, 1.0),
    "small gamma": lambda: dist.Gamma(0.3, 1.0),
    "kumaraswamy": lambda: dist.Kumaraswamy(0.5, 2.0),
    "logistic-normal": lambda: dist.LogisticNormal(torch.zeros(3), torch.ones(3)),
    "relaxed one-hot": lambda: dist.RelaxedOneHotCategorical(torch.tensor(0.7), torch.ones(4)),
    "sine-skewed": lambda: dist.SineSkewed(
        dist.VonMises(torch.zeros(2), torch.ones(2)).to_event(1), torch.tensor([0.3, -0.4])
    ),
    "lkj cholesky": lambda: dist.LKJCholesky(4, 1.0),
    "lkj": lambda: dist.LKJ(3, torch.tensor(0.5)),
    "lkj of 1": lambda: dist.LKJCholesky(2, 3.0),
    "wishart": lambda: dist.Wishart(torch.tensor(5.0), covariance_matrix=torch.eye(3)),
    "inverse wishart": lambda: InverseWishart(torch.tensor(6.0), covariance_matrix=torch.eye(2)),
    "cholesky factor": lambda: transformed((3, 3), constraints.lower_cholesky),
    "softplus cholesky": lambda: transformed((2, 2), constraints.softplus_lower_cholesky),
    "ordered": lambda: transformed((4,), constraints.ordered_vector),
    "positive ordered": lambda: transformed((4,), constraints.positive_ordered_vector),
    "mixture": lambda: dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), dist.Normal(t(-3.0, 3.0), t(1.0, 0.5))
    ),
    "mixture of directions": lambda: dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), dist.VonMises(t(0.0, 3.0), t(9.0, 9.0))
    ),
    "mixture of simplices": lambda: dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), dist.Dirichlet(t([9.0, 1.0, 1.0], [1.0, 1.0, 9.0]))
    ),
    "mixture of intervals": lambda: dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), dist.Uniform(t(-3.0, -3.0), t(5.0, 5.0))
    ),
    "mixture of vectors": lambda: dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), dist.Normal(t([-3.0, 0.0], [3.0, 1.0]), 1.0).to_event(1)
    ),
    "masked mixture": lambda: dist.MaskedMixture(
        torch.tensor([True, False, True]), dist.Gamma(torch.ones(3), 1.0), dist.LogNormal(torch.zeros(3), 1.0)
    ).to_event(1),
    "empirical": lambda: dist.Empirical(torch.randn(50, 3), torch.zeros(50)),
    "laplace": lambda: dist.Laplace(0.0, 1.0),
    "side by side": lambda: Pieced(stacked=False),
    "on top of each other": lambda: Pieced(stacked=True),
}
HEAVY = ("cauchy", "student", "levy", "shifted cauchy", "multivariate student")  # no second moment
LIGHT = [name for name in PRIORS if name not in HEAVY]


@pytest.fixture(params=PRIORS)
def name(request):
    return request.param


@pytest.fixture
def prior(name):
    return PRIORS[name]()


@pytest.fixture
def in_dtype():
    def switch(dtype):
        torch.set_default_dtype(dtype)  # the root conftest restores it

    return switch


def test_every_support_has_the_geometry_one_expects():
    expected = {
        "normal": Real, "pareto": HalfLine, "below": HalfLine, "half-open": Interval, "exponential": HalfLine,
        "logit-normal": Interval, "masked": Interval, "expanded": Simplex, "projected normal": Sphere,
        "spheres": Sphere, "torus": Circle, "student": Real,
    }  # fmt: skip
    assert {name: type(geometry_of(PRIORS[name]())) for name in expected} == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [(), (7,), (2, 7)], ids=str)
@pytest.mark.parametrize("size", [0.1, 1.0, 30.0, 1e6])
def test_the_head_lands_in_the_support(name, dtype, batch, size, in_dtype):
    in_dtype(dtype)
    prior = PRIORS[name]()
    geometry = geometry_of(prior)
    value = geometry.head(size * torch.randn(*batch, geometry.num_raw))
    assert value.shape == batch + prior.event_shape
    assert value.dtype == dtype
    assert value.isfinite().all()
    assert prior.support.check(value).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("raw", [0.0, 1e-30, -1e-30, 1e30], ids=str)
def test_the_head_survives_raw_outputs_without_direction_or_scale(name, dtype, raw, in_dtype):
    in_dtype(dtype)
    prior = PRIORS[name]()
    geometry = geometry_of(prior)
    x = torch.full((3, geometry.num_raw), raw, requires_grad=True)
    value = geometry.head(x)
    assert prior.support.check(value).all()
    (gradient,) = torch.autograd.grad(geometry.embed(value).sum(), x)
    # At 1e-30 the true slope of a direction is 1e30, the next step of the chain may not be representable; never NaN.
    assert not gradient.isnan().any()
    if raw == 0.0:
        assert gradient.isfinite().all()


def test_the_embedding_is_finite_and_tells_draws_apart(prior):
    torch.manual_seed(1)
    geometry = geometry_of(prior)
    draws = prior.sample((300,))
    embedded = geometry.embed(draws)
    finished = geometry.finish(embedded / geometry.unit(embedded))
    assert finished.isfinite().all()
    different = geometry.flatten(draws).unique(dim=0)
    assert len(finished.unique(dim=0)) == len(different)
    assert len(different) > 1


def test_shapes_with_batches(prior):
    geometry = geometry_of(prior)
    draws = prior.sample((5, 2))
    embedded = geometry.embed(draws)
    assert embedded.shape[:2] == (5, 2)
    assert embedded.dim() == 3
    # Rounding only: a batch of eigenvalue problems may be solved by other routines than one of them, as processors have it.
    torch.testing.assert_close(embedded[3, 1], geometry.embed(draws[3, 1]), rtol=1e-13, atol=1e-13)
    assert geometry.flatten(draws).shape == (5, 2, math.prod(prior.event_shape))


def test_every_raw_output_moves_the_embedding(prior):
    geometry = geometry_of(prior)
    for _ in range(10):
        raw = torch.randn(20, geometry.num_raw, requires_grad=True)
        embedded = geometry.embed(geometry.head(raw))
        (gradient,) = torch.autograd.grad((embedded * torch.randn_like(embedded)).sum(), raw)
        assert gradient.isfinite().all()
        assert (gradient != 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("prior", "value"),
    [
        ("gamma", 0.0),
        ("exponential", 0.0),
        ("pareto", 2.0),
        ("below", 2.0),
        ("beta", 0.0),
        ("beta", 1.0),
        ("half-open", -1.0),
        ("dirichlet", [1.0, 0.0, 0.0, 0.0]),
        ("dirichlet", [0.5, 0.5, 0.0, 0.0]),
        ("sparse dirichlet", [0.0] * 9 + [1.0]),
        ("sphere", [0.0, 1.0, 0.0]),
        ("von mises", math.pi),
        ("normal", 0.0),
        ("cauchy", 1e30),
    ],
)
def test_gradients_are_finite_on_the_boundary(prior, value, dtype, in_dtype):
    in_dtype(dtype)
    fn = PRIORS[prior]()
    geometry = geometry_of(fn)
    at = torch.tensor(value, requires_grad=True)
    unit = geometry.unit(geometry.embed(fn.sample((100,))))
    finished = geometry.finish(geometry.embed(at) / unit)
    (gradient,) = torch.autograd.grad(finished.square().sum(), at)
    assert finished.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_distances_survive_two_equal_points_on_the_boundary(name, dtype, in_dtype):
    """acos and sqrt have infinite slopes there: the reason why chords and Hellinger distances are squared ones."""
    in_dtype(dtype)
    geometry = geometry_of(PRIORS[name]())
    raw = torch.full((1, geometry.num_raw), 40.0)
    raw[..., ::2] = -40.0
    raw.requires_grad_()
    x = geometry.embed(geometry.head(raw))
    (gradient,) = torch.autograd.grad((x - x.detach()).square().sum(), raw)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", LIGHT)
def test_a_unit_brings_prior_draws_to_a_mean_squared_distance_of_twice_the_dimension(prior):
    geometry = geometry_of(prior)
    embedded = geometry.embed(prior.sample((500,)))
    points = embedded / geometry.unit(embedded)
    assert 2 * points.var(0, correction=0).sum() == pytest.approx(2 * geometry.dim)


@pytest.mark.parametrize("name", LIGHT)
def test_units_generalise_to_fresh_draws(prior):
    geometry = geometry_of(prior)
    unit = geometry.unit(geometry.embed(prior.sample((4000,))))
    fresh = geometry.embed(prior.sample((2, 4000))) / unit
    squares = (fresh[0] - fresh[1]).square().sum(-1)
    # the unit is as uncertain as the mean
    error = math.sqrt(2) * squares.std() / math.sqrt(len(squares))
    assert abs(squares.mean() - 2 * geometry.dim) < 5 * error


@pytest.mark.parametrize("name", HEAVY)
def test_heavy_tails_are_compressed_by_the_quartiles_of_the_prior(name):
    prior = PRIORS[name]()
    geometry = geometry_of(prior)
    embedded = geometry.embed(prior.sample((20_000,)))
    unit = geometry.unit(embedded)
    quartiles = (embedded / unit).quantile(torch.tensor([0.25, 0.75]), 0)
    assert torch.allclose(quartiles[1] - quartiles[0], torch.tensor(1.34898))
    finished = geometry.finish(embedded / unit)
    assert finished.abs().max() < 30 < embedded.abs().max()
    assert torch.allclose(geometry.finish(torch.tensor([0.01])), torch.tensor([0.01]), rtol=1e-3)


def test_a_constant_prior_leaves_coordinates_as_they_are():
    for geometry in (
        Real(torch.Size([2])),
        Real(torch.Size([2]), heavy_tailed=True),
        Sphere(torch.Size([3])),
    ):
        assert (geometry.unit(torch.ones(50, 3)) == 1).all()


def test_inverse_and_head_undo_each_other(prior):
    geometry = geometry_of(prior)
    raw = 3 * torch.randn(50, geometry.num_raw).clamp(-3, 3)
    back = geometry.inverse(geometry.head(raw))
    if back is None:
        assert isinstance(geometry, (Simplex, Sphere, Circle))
        return
    assert torch.allclose(back, raw, atol=1e-6)
    draws = prior.sample((50,))
    assert torch.allclose(geometry.head(geometry.inverse(draws)), draws, atol=1e-5, rtol=1e-5)


def test_an_inverse_stays_finite_at_the_ends():
    assert HalfLine(torch.Size()).inverse(torch.tensor(0.0)).isfinite().all()
    assert Interval(torch.Size()).inverse(torch.tensor([[0.0], [1.0]])).isfinite().all()


def test_heads_follow_bounds_that_learn():
    low = torch.tensor(2.0, requires_grad=True)
    value = geometry_of(dist.Pareto(low, 3.0)).head(torch.zeros(1))
    assert torch.autograd.grad(value.sum(), low)[0] == pytest.approx(1.0)


def test_pi_and_minus_pi_are_one_angle():
    geometry = Circle(torch.Size([1]))
    a, b = geometry.embed(torch.tensor([[math.pi], [-math.pi]]))
    assert torch.allclose(a, b)


def test_repr():
    assert repr(Simplex(torch.Size([3]))) == "Simplex(event_shape=(3,))"


def test_heavy_tails_are_measured_from_their_centre():
    """Far from 0 a Cauchy is as far from itself as near it: the compression is about the median."""
    distances = []
    for loc in (0.0, 1e4):
        torch.manual_seed(0)
        geometry = geometry_of(dist.Cauchy(loc, 1.0))
        embedded = geometry.embed(dist.Cauchy(loc, 1.0).sample((2000,)))
        centre = geometry.tails(embedded)
        finished = geometry.finish((embedded - centre) / geometry.unit(embedded), heavy=True)
        distances.append(float(finished.std()))
    assert distances[0] == pytest.approx(distances[1], rel=1e-6)


@pytest.mark.parametrize(
    ("draw", "heavy"),
    [
        (lambda: torch.randn(2000, 1), False),
        (lambda: dist.Laplace(0.0, 1.0).sample((2000, 1)), False),
        (lambda: torch.randn(2000, 1) * dist.HalfCauchy(1.0).sample((2000, 1)), True),
        (lambda: torch.randn(2000, 1) * (1.5 * torch.randn(2000, 1)).exp(), True),
        (lambda: torch.randn(2000, 1) * (torch.arange(2000) % 2)[:, None], False),
    ],
    ids=["normal", "laplace", "horseshoe", "funnel", "half of it 0"],
)
def test_scale_mixtures_have_heavy_tails(draw, heavy):
    """The type of a conditional normal says light; its draws do not."""
    geometry = Real(torch.Size())
    points = draw()
    assert (geometry.tails(points) is not None) == heavy
    if heavy:
        assert geometry.unit(points) < points.std(0)


def test_an_interval_is_stretched_at_its_ends():
    geometry = Interval(torch.Size(), 0.0, 1.0)
    p = torch.tensor([0.0, 1e-4, 0.5, 1 - 1e-4, 1.0], requires_grad=True)
    embedded = geometry.embed(p)
    assert torch.allclose(embedded[:, 0], p.sqrt().asin(), atol=1e-6)
    (gradient,) = torch.autograd.grad(embedded.sum(), p)
    assert gradient.isfinite().all()


def test_gaps_of_an_ordered_vector_count_by_their_ratio():
    geometry = Ordered(torch.Size([3]))
    one, other = torch.tensor([[0.0, 1e-6, 1.0]]), torch.tensor([[0.0, 1e-3, 1.0]])
    assert (geometry.embed(one) - geometry.embed(other)).norm() > 5
