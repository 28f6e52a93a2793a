r"""A guide fitted to a prior alone reaches it, support by support, and not with a broken head or embedding.

The long list is ``benchmarks/prior_zoo.py``; here are some of it after few steps, at a size where such a fit cannot be told
from the prior: the energy distance between ``N`` latents and ``N`` prior draws. Between two prior samples it is a sum of
chi-squares with positive weights, for which (Laurent and Massart 2000, Lemma 1)

.. math:: P\bigl(T - \mathbb{E}T \ge \sqrt2\,(\sqrt x + x)\,\mathrm{sd}(T)\bigr) \le e^{-x},

so 25 standard deviations above the mean, x = 13.8, is a level of 1e-6. Mean and deviation are measured between prior
samples. Clouds are always compared in the geometry as it is in the package, whatever the guide was fitted with.
"""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_sinkhorn import SinkhornProgram
from pyro_sinkhorn.distributions import HypersphericalUniform
from pyro_sinkhorn.geometry import (
    Circle,
    HalfLine,
    Interval,
    Ordered,
    PositiveDefinite,
    Simplex,
    Sphere,
    geometry_of,
)

pytestmark = [
    # torch says so of every draw whose smallest eigenvalue it cannot tell from 0, and draws again
    pytest.mark.filterwarnings("ignore:Singular sample detected"),
    # the first steps are far from the prior
    pytest.mark.filterwarnings("ignore::pyro_sinkhorn.ot.ConvergenceWarning"),
]

STEPS, BATCH, LR = 150, 128, 1e-2
N, REPEATS = 1000, 60
LEVEL_IN_SDS = math.sqrt(2) * (math.sqrt(math.log(1e6)) + math.log(1e6))


class OrderedNormal(dist.TorchDistribution):
    """Sums of exponentials, of which nothing but draws is known."""

    arg_constraints = {}

    def __init__(self, batch_shape=()):
        super().__init__(torch.Size(batch_shape), torch.Size([3]), validate_args=False)

    @property
    def support(self):
        return dist.constraints.ordered_vector

    def expand(self, batch_shape, _instance=None):
        return OrderedNormal(batch_shape)

    def sample(self, sample_shape=()):
        z = torch.randn(*sample_shape, *self.batch_shape, 3)
        return torch.cat([z[..., :1], (z[..., 1:] / 2).exp()], -1).cumsum(-1)


def one(fn):
    return lambda: pyro.sample("z1", fn())


def banana():
    z1 = pyro.sample("z1", dist.Normal(0.0, 1.0))
    pyro.sample("z2", dist.Normal(z1**2, 0.3))


ZOO = {
    "banana": banana,
    "half-cauchy": one(lambda: dist.HalfCauchy(torch.ones(2)).to_event(1)),
    "beta": one(lambda: dist.Beta(torch.tensor([1.0, 2.0]), 5.0).to_event(1)),
    "dirichlet": one(lambda: dist.Dirichlet(torch.full((4,), 0.5))),
    "sphere": one(lambda: HypersphericalUniform(3)),
    "torus": one(lambda: dist.VonMises(torch.tensor([3.0, 0.0]), 2.0).to_event(1)),
    "ordered": one(OrderedNormal),
    "wishart": one(lambda: dist.Wishart(torch.tensor(4.0), covariance_matrix=torch.eye(2))),
}


@functools.cache
def yardstick_of(name):
    """Made before anything is broken, also where a broken test comes first."""
    return Yardstick(ZOO[name])


def fitted(sites):
    def model(x):
        with pyro.plate("data", len(x)):
            sites()
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)  # tells nothing of the latents

    program = SinkhornProgram(model)
    schedule = pyro.optim.CosineAnnealingLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": LR}, "T_max": STEPS}
    )
    return program.fit(
        torch.randn(5000), num_steps=STEPS, batch_size=BATCH, optim=schedule, seed=0, progress=False
    )


def run(sites, n):
    with poutine.trace() as tracer, pyro.plate("data", n):
        sites()
    nodes = tracer.trace.nodes
    return {name: site for name, site in nodes.items() if name.startswith("z")}


def energy(x, y):
    cross, within_x, within_y = (torch.cdist(a, b).mean() for a, b in ((x, y), (x, x), (y, y)))
    return float(2 * cross - within_x - within_y)


class Yardstick:
    """Geometry and unit of every site as the package has them, and the law of the energy between prior samples."""

    def __init__(self, sites):
        self.sites = sites
        reference = run(sites, 2000)
        self.geometries = {name: geometry_of(site["fn"]) for name, site in reference.items()}
        self.embed = {name: g.embed for name, g in self.geometries.items()}
        self.units = {name: g.unit(g.embed(reference[name]["value"])) for name, g in self.geometries.items()}
        null = torch.tensor([energy(self.prior(), self.prior()) for _ in range(REPEATS)])
        self.mean, self.sd = null.mean(), null.std()

    def rows(self, values):
        return torch.cat(
            [self.geometries[k].finish(self.embed[k](values[k]) / self.units[k]) for k in self.geometries], -1
        )

    def prior(self):
        return self.rows({name: site["value"] for name, site in run(self.sites, N).items()})

    def deviations(self, program):
        """How far the guide's latents are from prior draws, in standard deviations of two prior samples."""
        drawn = {name: value[0] for name, value in program.encode(torch.randn(N)).items()}
        found = float((energy(self.rows(drawn), self.prior()) - self.mean) / self.sd)
        print(f"{found:.1f} standard deviations, of {LEVEL_IN_SDS:.1f}")
        return found


@pytest.mark.parametrize("name", ZOO)
def test_a_few_steps_reach_the_prior(name):
    yardstick = yardstick_of(name)
    assert yardstick.deviations(fitted(ZOO[name])) < LEVEL_IN_SDS


def squashed_simplex(self, raw):
    """No entry comes near 0 or 1."""
    return self.unflatten(raw).tanh().softmax(-1)


def constant(self, value):
    return 0 * self.flatten(value)


def angle_itself(self, value):
    return self.flatten(value)


def bounded_gaps(self, raw):
    raw = self.unflatten(raw)
    return torch.cat([raw[..., :1], raw[..., 1:].sigmoid()], -1).cumsum(-1)


def a_cap(self, raw):
    """Half a sphere is 20 to 26 standard deviations away, too near the level to tell by."""
    vector = self.unflatten(raw)
    vector = torch.cat(
        [vector[..., :1].abs() + vector[..., 1:].norm(dim=-1, keepdim=True) / 2, vector[..., 1:]], -1
    )
    return vector / vector.norm(dim=-1, keepdim=True)


def trace_only(self, value):
    return self._taken(torch.diag_embed(value.diagonal(dim1=-2, dim2=-1).log()))


def upper_half(self, raw):
    return 0.5 + 0.5 * self.unflatten(raw).sigmoid()


BROKEN = [
    ("dirichlet", Simplex, "head", squashed_simplex),
    ("half-cauchy", HalfLine, "embed", constant),
    ("torus", Circle, "embed", angle_itself),
    ("ordered", Ordered, "head", bounded_gaps),
    ("sphere", Sphere, "head", a_cap),
    ("wishart", PositiveDefinite, "embed", trace_only),
    pytest.param("beta", Interval, "head", upper_half, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "geometry", "method", "replacement"), BROKEN)
def test_the_same_steps_do_not_with_a_broken_geometry(name, geometry, method, replacement, monkeypatch):
    yardstick = yardstick_of(name)
    with monkeypatch.context() as patch:
        patch.setattr(geometry, method, replacement)
        program = fitted(ZOO[name])
    assert yardstick.deviations(program) > LEVEL_IN_SDS
