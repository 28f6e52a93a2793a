"""What is read off a trace: data, locals, globals, groups, and the parameters of priors."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import transforms
from pyro.infer import Trace_ELBO

from pyro_sinkhorn.distributions import HypersphericalUniform, VonMisesFisher
from pyro_sinkhorn.errors import ProgramError
from pyro_sinkhorn.structure import (
    PARTICLE_PLATE,
    Plate,
    innermost,
    is_data,
    is_latent,
    parameters_of,
    plates_of,
    sample_sites,
    structure_of,
)

X = torch.zeros(6, 4)


def trace_of(model, *args):
    return poutine.trace(model).get_trace(*args)


def structure(model, *args):
    return structure_of(trace_of(model, *args))


def documents(words):
    topics = pyro.sample("topics", dist.Dirichlet(torch.ones(2, 3)).to_event(1))
    with pyro.plate("documents", words.shape[-1]):
        mix = pyro.sample("mix", dist.Dirichlet(torch.ones(2)))
        with pyro.plate("words", len(words)):
            shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
            pyro.sample("word", dist.Normal((mix @ topics).sum(-1) + shift, 1.0), obs=words)


def test_globals_locals_and_nested_groups():
    found = structure(documents, X)
    outer, inner = Plate("documents", -1, 4, 4), Plate("words", -2, 6, 6)
    assert found.data == ("word",)
    assert found.data_plates == (outer, inner)
    assert found.globals == ("topics",)
    assert [(group.sites, group.plates) for group in found.groups] == [
        (("mix",), (outer,)),
        (("shift",), (outer, inner)),
    ]
    assert found.locals == ("mix", "shift")
    assert found.latents == ("topics", "mix", "shift")


def test_latents_of_one_plate_stack_are_one_group_and_coarse_groups_come_first():
    def model(x):
        documents_plate, words_plate = pyro.plate("documents", 4), pyro.plate("words", 6)
        with documents_plate, words_plate:
            fine = pyro.sample("fine", dist.Normal(0.0, 1.0))
        with documents_plate:
            one = pyro.sample("one", dist.Normal(0.0, 1.0))
            two = pyro.sample("two", dist.Normal(one, 1.0))
        with documents_plate, words_plate:
            pyro.sample("x", dist.Normal(fine + two, 1.0), obs=x)

    assert [group.name for group in structure(model, X).groups] == ["one, two", "fine"]


def test_a_plate_without_data_makes_no_group():
    def model(x):
        with pyro.plate("components", 3):
            weight = pyro.sample("weight", dist.Normal(0.0, 1.0))
        data = pyro.plate("data", len(x), dim=-1)
        with data, pyro.plate("parts", 2, dim=-2):
            part = pyro.sample("part", dist.Normal(0.0, 1.0))
        with data:
            pyro.sample("x", dist.Normal(part.sum(0) + weight.sum(), 1.0), obs=x[:, 0])

    found = structure(model, X)
    assert found.globals == ("weight",)
    assert [(group.name, [plate.name for plate in group.plates]) for group in found.groups] == [
        ("part", ["data"])
    ]


def test_sub_sampled_plates_know_both_sizes():
    def model(x):
        with pyro.plate("data", 6, subsample_size=2) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index, 0])

    trace = trace_of(model, X)
    assert structure_of(trace).data_plates == (Plate("data", -1, 2, 6),)
    assert [name for name, _ in sample_sites(trace)] == ["z", "x"]


def test_what_is_not_data_and_what_is_not_latent():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            noise = pyro.sample("noise", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
            pyro.deterministic("sum", z + noise)
            pyro.factor("penalty", -z.square())
            with poutine.mask(mask=False):
                pyro.factor("masked", -z.square())
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    trace = trace_of(model, X)
    assert [name for name, site in sample_sites(trace) if is_data(site)] == ["x"]
    assert [name for name, site in sample_sites(trace) if is_latent(site)] == ["z"]
    found = structure_of(trace)
    assert (found.data, found.latents) == (("x",), ("z",))


def test_conditioning_makes_data():
    def model():
        with pyro.plate("data", 6):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0))

    assert structure(poutine.condition(model, data={"x": X[:, 0]})).data == ("x",)
    with pytest.raises(
        ProgramError, match=r"observes nothing: none of its sample sites \['z', 'x'\] has obs="
    ):
        structure(model)


def test_the_particle_plate_is_no_data_plate():
    elbo = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=2)
    trace = trace_of(elbo._vectorized_num_particles(documents), X)
    assert any(frame.name == PARTICLE_PLATE for frame in trace.nodes["mix"]["cond_indep_stack"])
    assert [plate.name for plate in plates_of(trace.nodes["mix"])] == ["documents"]
    assert structure_of(trace) == structure(documents, X)


def test_data_in_no_plate():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0).expand(x.shape).to_event(2), obs=x)

    with pytest.raises(
        ProgramError, match=r"observed sites \['x'\] are in no plate.*with pyro.plate\('data', len\(x\)\)"
    ):
        structure(model, X)


def test_data_in_a_sequential_plate():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        for i in pyro.plate("data", len(x)):
            pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=x[i, 0])

    with pytest.raises(
        ProgramError, match=r"'x0' is in the sequential plate 'data'.*with pyro.plate\('data', size\)"
    ):
        structure(model, X)


N = 5
SCALE = torch.eye(3).expand(N, 3, 3)
PER_SLICE = {
    "normal": lambda c: dist.Normal(c, 1.0),
    "scale": lambda c: dist.Normal(0.0, c.exp()),
    "vector": lambda c: dist.Normal(c.unsqueeze(-1), 1.0).expand([N, 3]).to_event(1),
    "beta": lambda c: dist.Beta(c.exp(), 2.0),
    "beta 0": lambda c: dist.Beta(2.0, c.exp()),
    "chi2": lambda c: dist.Chi2(c.exp()),
    "gamma": lambda c: dist.Gamma(2.0, c.exp()),
    "uniform": lambda c: dist.Uniform(c, 10.0),
    "dirichlet": lambda c: dist.Dirichlet(c.exp().unsqueeze(-1).expand(N, 3)),
    "dirichlet rows": lambda c: dist.Dirichlet(c.exp()[:, None, None].expand(N, 2, 3)).to_event(1),
    "multivariate": lambda c: dist.MultivariateNormal(c.unsqueeze(-1).expand(N, 3), scale_tril=SCALE),
    "scale matrix": lambda c: dist.MultivariateNormal(
        torch.zeros(3), scale_tril=SCALE * c.exp()[:, None, None]
    ),
    "scale matrices": lambda c: dist.MultivariateNormal(
        torch.zeros(2, 3), scale_tril=(SCALE * c.exp()[:, None, None]).unsqueeze(1)
    ).to_event(1),
    "concentration": lambda c: VonMisesFisher(torch.tensor([1.0, 0.0, 0.0]), c.exp()),
    "log-normal": lambda c: dist.LogNormal(c.unsqueeze(-1), 1.0).expand([N, 2]).to_event(1),
    "affine": lambda c: dist.TransformedDistribution(
        dist.Normal(torch.zeros(N, 2), 1.0).to_event(1), [transforms.AffineTransform(c.unsqueeze(-1), 1.0)]
    ),
    "masked": lambda c: dist.Normal(c, 1.0).mask(torch.ones(N, dtype=torch.bool)),
    "mixture": lambda c: dist.MixtureSameFamily(
        dist.Categorical(torch.ones(N, 2)), dist.Normal(c.unsqueeze(-1) + torch.arange(2), 1.0)
    ),
}


@pytest.mark.parametrize("kind", PER_SLICE)
def test_parameters_that_differ_between_slices_are_found_with_their_batch_dimensions(kind):
    fn = PER_SLICE[kind](torch.linspace(-1, 1, N))
    assert fn.batch_shape == (N,)
    found = [p for p, dims in parameters_of(fn) if p.shape[: max(p.dim() - dims, 0)] == (N,)]
    assert any((p - p[:1]).abs().max() > 0.1 for p in found)


@pytest.mark.parametrize(
    "fn",
    [
        dist.Normal(torch.zeros(3), 1.0).to_event(1),
        dist.LowRankMultivariateNormal(torch.zeros(3), torch.ones(3, 1), torch.ones(3)),
        dist.Dirichlet(torch.ones(3)).to_event(0),
        HypersphericalUniform(3),
        dist.OMTMultivariateNormal(torch.zeros(3), torch.eye(3)),
    ],
    ids=lambda fn: type(innermost(fn)).__name__,
)
def test_parameters_of_one_event_have_no_batch_dimensions(fn):
    for parameter, dims in parameters_of(fn):
        assert parameter.shape[: max(parameter.dim() - dims, 0)] == ()


def test_lazy_parameters_are_not_computed():
    fn = dist.MultivariateNormal(torch.zeros(3), scale_tril=torch.eye(3))
    assert len(list(parameters_of(fn))) == 2
    assert "covariance_matrix" not in fn.__dict__
