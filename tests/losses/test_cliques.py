"""Cliques: which latents are compared together, read off the model's graph or given."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_sinkhorn import AutoImplicit, Implicit, SinkhornProgram, Trace_Sinkhorn
from pyro_sinkhorn.errors import ProgramError
from pyro_sinkhorn.losses.call import Call
from pyro_sinkhorn.losses.latent_match import LatentMatch, _Comparison
from pyro_sinkhorn.losses.matching import MatchOptions
from pyro_sinkhorn.structure import structure_of


def chain(x, steps=4):
    with pyro.plate("data", len(x)):
        z = torch.zeros(())
        for t in pyro.markov(range(steps)):
            z = pyro.sample(f"z_{t}", dist.Normal(0.9 * z, 0.44 if t else 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def call_of(model, *args, guide=None):
    model_trace = poutine.trace(
        model if guide is None else poutine.replay(model, poutine.trace(guide).get_trace(*args))
    )
    scored = model_trace.get_trace(*args)
    return Call(model, args, {}, structure_of(scored), scored)


def cliques(grouping, model, *args):
    match = LatentMatch(MatchOptions(match_size=4), grouping)
    return [(clique.name, clique.carried, clique.share) for clique in match.cliques(call_of(model, *args))]


def names(grouping, model, *args):
    return [name for name, _, _ in cliques(grouping, model, *args)]


def test_families_of_a_chain():
    x = torch.randn(8)
    assert names("markov", chain, x) == ["z_0, z_1", "z_1, z_2", "z_2, z_3"]
    assert names("joint", chain, x) == ["z_0, z_1, z_2, z_3"]
    assert names("marginal", chain, x) == ["z_0", "z_1", "z_2", "z_3"]
    assert sum(share for _, _, share in cliques("markov", chain, x)) == pytest.approx(1)


def test_families_of_a_graph():
    """A collider's parents are compared with it; an isolated latent is compared alone; a deterministic site is no node."""

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.LogNormal(0.0, 1.0))
            c = pyro.sample("c", dist.Normal(pyro.deterministic("m", 2 * a), b))
            d = pyro.sample("d", dist.Dirichlet(torch.ones(3)))
            e = pyro.sample("e", dist.MultivariateNormal(d, torch.eye(3)))
            pyro.sample("x", dist.Normal(c + e.sum(-1), 1.0), obs=x)

    assert names("markov", model, torch.randn(8)) == ["a, b, c", "d, e"]


def test_families_need_no_density():
    """Dependence is followed to the draw itself where a prior is a simulator."""

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", Implicit(a + torch.randn(len(x))))
            c = pyro.sample("c", Implicit(torch.randn(len(x))))
            pyro.sample("x", dist.Normal(b + c, 1.0), obs=x)

    assert names("markov", model, torch.randn(8)) == ["a, b", "c"]


def test_families_across_plates():
    """A word's latent is compared with the document's that it depends on, which is carried along."""

    def model(x):
        docs, words = pyro.plate("docs", len(x), dim=-2), pyro.plate("words", x.shape[1], dim=-1)
        with docs:
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with docs, words:
            c = pyro.sample("c", dist.Normal(a, 1.0))
            pyro.sample("x", dist.Normal(b + c, 1.0), obs=x)

    found = cliques("markov", model, torch.randn(8, 3))
    assert found == [("a", (), 0.5), ("b", (), 0.5), ("a, c", ("a",), 1.0)]
    assert cliques([("a", "b"), ("b", "a", "c")], model, torch.randn(8, 3)) == [
        ("a, b", (), 1.0),
        ("b, a, c", ("b", "a"), 1.0),
    ]


def test_graph_is_read_once_and_again_for_other_latents(monkeypatch):
    from pyro_sinkhorn.losses import latent_match

    runs = []
    graph = latent_match.model_graph
    monkeypatch.setattr(latent_match, "model_graph", lambda *a: runs.append(1) or graph(*a))
    match = LatentMatch(MatchOptions(), "markov")
    x = torch.randn(8)
    match.cliques(call_of(chain, x))
    match.cliques(call_of(chain, x))
    assert len(runs) == 1
    assert len(match.cliques(call_of(lambda x: chain(x, steps=6), x))) == 5
    assert len(runs) == 2


@pytest.mark.parametrize(
    ("grouping", "message"),
    [
        ([("z_0", "z_9")], r"names the sites \['z_9'\]"),
        ([("z_0", "z_1"), ("z_3",)], r"leaves out the latents \['z_2'\]"),
    ],
)
def test_custom_cliques_are_checked_against_the_model(grouping, message):
    with pytest.raises(ProgramError, match=message):
        Trace_Sinkhorn(match_size=4, groups=grouping).loss(chain, AutoImplicit(chain), torch.randn(8))


@pytest.mark.parametrize("grouping", ["pairs", (), [[]], ["z_0"], [("z_0", 1)], 3])
def test_custom_cliques_are_checked(grouping):
    with pytest.raises(ValueError, match=r"groups is .*: expected 'joint', 'markov', 'marginal' or cliques"):
        Trace_Sinkhorn(groups=grouping)


def test_latents_of_unlike_plates():
    def model(x, y):
        for name, value in (("x", x), ("y", y)):
            with pyro.plate(f"{name}_data", len(value)):
                z = pyro.sample(f"z_{name}", dist.Normal(0.0, 1.0))
                pyro.sample(name, dist.Normal(z, 1.0), obs=value)

    message = r"\['z_x', 'z_y'\] cannot be compared together: \['z_y'\] are in the plates \['y_data'\]"
    with pytest.raises(ProgramError, match=message):
        names([("z_x", "z_y")], model, torch.randn(8), torch.randn(9))


def test_side_by_side_is_one_by_one(monkeypatch):
    """Without a random split the values are the same to the solver's tolerance."""
    torch.manual_seed(0)
    call = call_of(chain, torch.randn(16))
    priors = [call.prior(), call.prior()]
    found = []
    for apart in (False, True):
        match = LatentMatch(MatchOptions(debias=None, tolerance=1e-8), "markov")
        if apart:
            monkeypatch.setattr(_Comparison, "like", lambda self, other: False)
        torch.manual_seed(1)
        found.append([group.value for group in match._compare(call, call.scored, priors)])
    assert torch.allclose(torch.stack(found[0]), torch.stack(found[1]), rtol=1e-5)


def independent_guide(x, steps=4):
    """Right marginals, no dependence."""
    with pyro.plate("data", len(x)):
        for t in range(steps):
            scale = math.sqrt(0.81**t + 0.44**2 * (1 - 0.81**t) / (1 - 0.81))
            pyro.sample(f"z_{t}", dist.Normal(0.0, scale))


def prior_guide(x, steps=4):
    """The prior, by another route: a linear map of noise."""
    with pyro.plate("data", len(x)):
        z = torch.zeros(len(x))
        for t in range(steps):
            z = 0.9 * z + torch.randn(len(x)) * (0.44 if t else 1.0)
            pyro.sample(f"z_{t}", Implicit(z))


def z_score(guide, grouping, repetitions=200):
    """Of the mean match, all cliques together."""
    loss = Trace_Sinkhorn(match_size=16, groups=grouping)
    values = []
    for _ in range(repetitions):
        loss.loss(chain, guide, torch.randn(32))
        values.append(sum(loss.terms.match.values()))
    found = torch.tensor(values)
    return float(found.mean() / (found.std() / math.sqrt(repetitions)))


@pytest.mark.parametrize("grouping", ["joint", "markov", [("z_0", "z_1", "z_2"), ("z_2", "z_3")]])
def test_match_is_zero_for_equal_laws(grouping):
    """Within 5 standard errors: a false alarm once in a million runs."""
    torch.manual_seed(0)
    assert abs(z_score(prior_guide, grouping)) < 5


def test_markov_sees_the_dependence_that_marginal_does_not():
    torch.manual_seed(0)
    assert abs(z_score(independent_guide, "marginal")) < 5
    assert z_score(independent_guide, "markov", 50) > 8


def test_a_guide_that_is_never_told_of_a_dependence_beyond_the_graph():
    """What cliques leave open, as documented: the guide makes the two agree, and no family holds both."""

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            pyro.sample("b", Implicit(a))

    loss = {name: Trace_Sinkhorn(match_size=16, groups=name) for name in ("joint", "markov")}
    torch.manual_seed(0)
    mean = {}
    for name, one in loss.items():
        values = []
        for _ in range(50):
            one.loss(model, guide, torch.randn(32))
            values.append(sum(one.terms.match.values()))
        mean[name] = sum(values) / len(values)
    assert mean["joint"] > 5 * abs(mean["markov"])


def test_saved_and_loaded(tmp_path):
    x = torch.randn(32)
    for grouping in ("markov", [("z_0", "z_1"), ("z_1", "z_2", "z_3")]):
        program = SinkhornProgram(chain, loss=Trace_Sinkhorn(match_size=4, groups=grouping))
        program.fit(x, num_steps=2, batch_size=16, seed=0, progress=False)
        program.save(tmp_path / "program.pt")
        loaded = SinkhornProgram.load(tmp_path / "program.pt", chain)
        assert repr(loaded.loss) == repr(program.loss)
        loaded.fit(x, num_steps=1, batch_size=16, progress=False)


def test_the_same_clique_twice_is_one():
    """Else it would share the weight with itself, and only one of them count."""
    given = [("z_0", "z_1"), ("z_1", "z_0"), ("z_2", "z_3", "z_2"), ("z_2", "z_3")]
    found = cliques(given, chain, torch.randn(8))
    assert [share for _, _, share in found] == [0.5, 0.5]
    assert [name for name, _, _ in found] == ["z_1, z_0", "z_2, z_3"]


@pytest.mark.parametrize("grouping", ["markov", "marginal"])
def test_match_is_zero_below_covariates(grouping):
    """A covariate reaches ``z_1, z_2`` through ``z_0`` alone: no parameter of theirs shows it, yet slices differ: z was -20."""
    covariate = 5 * torch.randn(12)

    def model(x):
        with pyro.plate("data", len(x)):
            z = covariate
            for t in range(3):
                z = pyro.sample(f"z_{t}", dist.Normal(z, 0.1))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            z = covariate
            for t in range(3):
                z = z + 0.1 * torch.randn(len(x))
                pyro.sample(f"z_{t}", Implicit(z))

    torch.manual_seed(0)
    loss = Trace_Sinkhorn(match_size=6, groups=grouping)
    values = []
    for _ in range(150):
        loss.loss(model, guide, torch.randn(12))
        values.append(list(loss.terms.match.values()))
    found = torch.tensor(values)
    z = found.mean(0) / (found.std(0) / math.sqrt(len(found)))
    assert float(z.abs().max()) < 5
