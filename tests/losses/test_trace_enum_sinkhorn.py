"""Discrete latents: exact likelihood, one drawn state a datum, gradients from potentials at all states."""

import itertools
import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro.infer import SVI, TraceEnum_ELBO, config_enumerate

from pyro_sinkhorn import AutoImplicit, Implicit, SinkhornProgram, Trace_Sinkhorn, TraceEnum_Sinkhorn
from pyro_sinkhorn.diagnostics import match_report
from pyro_sinkhorn.distributions import Finite
from pyro_sinkhorn.errors import ProgramError

LOCS = torch.tensor([-3.0, 0.0, 3.0], dtype=torch.float64)
PROBS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
#: Small clouds, on purpose.
SMALL = "ignore:.*gives halves of:UserWarning"


def mixture(x):
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(PROBS.to(x)))
        z = pyro.sample("z", dist.Normal(LOCS.to(x)[k], 0.5))
        pyro.sample("x", dist.Normal(z, 0.3), obs=x)


def draw(n):
    k = dist.Categorical(PROBS).sample((n,))
    return k, dist.Normal(LOCS[k], 0.5).sample() + 0.3 * torch.randn(n)


def test_likelihood_is_averaged_over_all_states():
    """Equal to the expectation by hand, with a continuous latent that depends on the state."""
    x, logits, shift = torch.randn(6), torch.randn(6, 3), torch.randn(3)

    def guide(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(logits=logits))
            pyro.sample("z", Implicit(shift[k]))

    found = TraceEnum_Sinkhorn(prior_weight=0.0).loss(mixture, guide, x)
    log_prob = dist.Normal(shift, 0.3).log_prob(x.unsqueeze(-1))
    assert found == pytest.approx(-float((logits.softmax(-1) * log_prob).sum()))


def test_states_that_others_depend_on_are_averaged_over():
    """The data depend on the second state alone, whose probabilities in the guide depend on the first."""
    first, second = torch.randn(6, 3).softmax(-1), torch.randn(3, 2).softmax(-1)
    x = torch.randn(6)

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("j", dist.Categorical(PROBS))
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.4, 0.6])))
            pyro.sample("x", dist.Normal(LOCS[k], 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            j = pyro.sample("j", dist.Categorical(first))
            pyro.sample("k", dist.Categorical(second[j]))

    log_prob = dist.Normal(LOCS[:2], 1.0).log_prob(x.unsqueeze(-1))
    expected = -float((first @ second * log_prob).sum())
    assert TraceEnum_Sinkhorn(prior_weight=0.0).loss(model, guide, x) == pytest.approx(expected)


@pytest.mark.filterwarnings(SMALL)
@pytest.mark.parametrize("debias", ["independent", None])
@pytest.mark.parametrize("seed", [3, 4])
def test_gradient_against_that_of_the_expectation(debias, seed):
    """Six data with two states each: the exact expectation over all 64 configurations, and the mean of the estimate."""
    torch.manual_seed(seed)
    exact, estimate = _exact_and_estimated(torch.randn(6, 2, 1), torch.randn(6, 2), torch.randn(6, 1), debias)
    assert torch.nn.functional.cosine_similarity(exact.flatten(), estimate.flatten(), dim=0) > 0.98
    assert float((exact - estimate).norm() / exact.norm()) < 0.2


@pytest.mark.parametrize("debias", ["independent", "self", None])
def test_gradient_is_exact_in_large_clouds(debias):
    """What moving one datum changes, by solving again and by the potentials: the error is of second order in 1/n."""
    from pyro_sinkhorn.ot import sinkhorn_divergence

    errors = []
    for n in (8, 128):
        squares = []
        for seed in range(24):
            torch.manual_seed(seed)
            x, y = torch.randn(n, 1), torch.randn(n, 1)
            moved = torch.cat([torch.randn(1, 1), x[1:]])
            places = torch.stack([x, moved], 1)

            def value(points, places=None, y=y):
                generator = torch.Generator().manual_seed(0)
                return sinkhorn_divergence(
                    points, y, 2.0, debias=debias, candidates=places, generator=generator, tolerance=1e-7
                )

            here, there = value(x, places), value(moved)
            predicted = here.variation[0, 1] - here.variation[0, 0]
            squares.append(float(n * (there.value - here.value - predicted)) ** 2)
        errors.append(math.sqrt(sum(squares) / len(squares)))
    # In units of one datum's share it falls as 1/n, by 16; a wrong first order would not fall at all.
    assert errors[1] < errors[0] / 6


def _exact_and_estimated(values, logits, target, debias):
    """Gradients in the logits: of the expectation by enumeration, and the expectation of the estimate."""
    from pyro_sinkhorn.losses.clouds import Cloud, CloudStates
    from pyro_sinkhorn.losses.matching import MatchOptions, match

    n, k, _ = values.shape
    logits = logits.clone().requires_grad_()
    options = MatchOptions(
        debias=debias, relative_epsilon=0.5, match_size=n // 2, tolerance=1e-9, max_iters=5000
    )
    mean = torch.tensor(2.0)
    probabilities = logits.softmax(-1)
    expectation, estimate = torch.zeros(()), torch.zeros_like(logits)
    y = Cloud(target.unsqueeze(0))
    for config in itertools.product(range(k), repeat=n):
        index = torch.tensor(config)
        points = values[torch.arange(n), index].unsqueeze(0)
        states = CloudStates(values.unsqueeze(0), probabilities.unsqueeze(0))
        # The same split for all, so that the exact gradient is that of one function.
        generator = torch.Generator().manual_seed(0)
        value = match(
            Cloud(points, states=states), y, mean, options, group="z", generator=generator, paired=False
        ).sum()
        weight = probabilities[torch.arange(n), index].prod()
        expectation = expectation + weight * value.detach()
        if value.requires_grad:
            estimate = estimate + weight.detach() * torch.autograd.grad(value, logits, retain_graph=True)[0]
    return torch.autograd.grad(expectation, logits)[0], estimate


def prior_guide(x):
    """The prior itself, by another route: equal laws."""
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(PROBS.expand(len(x), 3)))
        noise = pyro.sample("noise", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("z", Implicit(LOCS[k] + 0.5 * noise))


def z_score(values):
    values = torch.tensor(values)
    return float(values.mean() / (values.std() / math.sqrt(len(values))))


def matches(loss, guide, x, repetitions):
    found = []
    for _ in range(repetitions):
        loss.loss(mixture, guide, x)
        found.append(sum(loss.terms.match.values()))
    return found


def test_match_is_zero_for_equal_laws():
    """z within 5: a false alarm once in a million runs. With ``debias="self"`` it is far beyond."""
    torch.manual_seed(0)
    x = torch.randn(64)
    assert abs(z_score(matches(TraceEnum_Sinkhorn(match_size=16), prior_guide, x, 300))) < 5


def test_a_soft_cloud_would_not_be(monkeypatch):
    """The mistake that drawing avoids: the most likely state of every datum instead of a drawn one."""
    torch.manual_seed(0)
    from pyro_sinkhorn.losses.states import Enumeration

    drawn = Enumeration.draw

    def always_the_first(self):
        drawn(self)
        self.drawn = {name: torch.zeros_like(index) for name, index in self.drawn.items()}

    monkeypatch.setattr(Enumeration, "draw", always_the_first)
    x = torch.randn(64)
    assert z_score(matches(TraceEnum_Sinkhorn(match_size=16), prior_guide, x, 30)) > 5


def test_recovers_the_states_of_a_mixture():
    torch.manual_seed(0)
    k, x = draw(1024)
    program = SinkhornProgram(mixture, loss=TraceEnum_Sinkhorn())
    program.fit(x, num_steps=150, batch_size=128, seed=0, progress=False)
    found = program.encode(x)["k"][0]
    # Four seeds, with two backends each, gave .84 to .91; chance would be .38. And no state was given up.
    assert float((found == k).double().mean()) > 0.75
    assert len(found.unique()) == 3
    assert "k, z" in str(program.diagnose(x, num_floor=2))


@pytest.mark.filterwarnings(SMALL)
@pytest.mark.parametrize(
    ("prior", "look"),
    [
        (lambda: dist.Bernoulli(0.3), lambda z: z),
        (lambda: dist.Bernoulli(torch.full((3,), 0.3)).to_event(1), lambda z: z.sum(-1)),
        (lambda: dist.Categorical(torch.ones(4) / 4), lambda z: z.to(torch.get_default_dtype())),
        (lambda: dist.OneHotCategorical(torch.ones(4) / 4), lambda z: z[..., 0]),
        (lambda: dist.OneHotCategorical(torch.ones(2, 3) / 3).to_event(1), lambda z: z[..., 0].sum(-1)),
        (lambda: dist.Binomial(5, torch.tensor(0.4)), lambda z: z),
        (lambda: dist.Poisson(2.0), lambda z: z),
    ],
    ids=["bernoulli", "switches", "categorical", "one-hot", "one-hots", "binomial", "poisson"],
)
def test_every_discrete_prior_takes_a_step(prior, look):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior())
            pyro.sample("x", dist.Normal(look(z), 1.0), obs=x)

    guide = AutoImplicit(model)
    loss = TraceEnum_Sinkhorn(match_size=8)
    assert math.isfinite(loss.loss_and_grads(model, guide, torch.randn(16)))
    for name, parameter in guide.named_parameters():
        assert bool(parameter.grad.isfinite().all()) and bool((parameter.grad != 0).any()), name
    values = guide(torch.randn(200))["z"]
    assert bool(prior().support.check(values).all())
    assert values.dtype == prior().sample().dtype


def test_several_sites_and_a_nested_plate():
    """A state of the document, states of its words that depend on it, and a continuous latent of each level."""

    def model(x):
        docs = pyro.plate("docs", len(x), dim=-2)
        words = pyro.plate("words", x.shape[1], dim=-1)
        with docs:
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.6, 0.4])))
            m = pyro.sample("m", dist.Normal(4.0 * k, 1.0))
        with docs, words:
            s = pyro.sample("s", dist.Bernoulli(0.2 + 0.6 * k.to(x)))
            pyro.sample("x", dist.Normal(m + s, 1.0), obs=x)

    guide = AutoImplicit(model)
    loss = TraceEnum_Sinkhorn(match_size=8)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss=loss)
    assert math.isfinite(svi.step(torch.randn(16, 3)))
    drawn = guide(torch.randn(16, 3))
    assert {name: tuple(value.shape) for name, value in drawn.items()} == {
        "k": (16, 1),
        "m": (16, 1),
        "s": (16, 3),
    }
    assert set(loss.terms.match) == {"k, m", "s"}


@pytest.mark.parametrize("vectorize", [False, True])
def test_particles(vectorize):
    x = torch.randn(16)
    loss = TraceEnum_Sinkhorn(
        match_size=8, num_particles=3, vectorize_particles=vectorize, max_plate_nesting=1
    )
    guide = AutoImplicit(mixture)
    guide(x)
    assert math.isfinite(SVI(mixture, guide, pyro.optim.Adam({"lr": 1e-3}), loss=loss).step(x))


def test_likelihood_equals_that_of_pyro():
    """With the match switched off and no continuous latent, the same number as TraceEnum_ELBO's likelihood."""

    def model(x):
        with pyro.plate("data", len(x), subsample_size=4) as i:
            k = pyro.sample("k", dist.Categorical(PROBS))
            with pyro.poutine.mask(mask=x[i] > -1):
                pyro.sample("x", dist.Normal(LOCS[k], 1.0), obs=x[i])

    @config_enumerate
    def guide(x):
        with pyro.plate("data", len(x), subsample_size=4):
            pyro.sample("k", dist.Categorical(PROBS))

    x = torch.randn(12)
    torch.manual_seed(5)
    found = TraceEnum_Sinkhorn(prior_weight=0.0, max_plate_nesting=1).loss(model, guide, x)
    torch.manual_seed(5)
    # Guide and prior are equal, so that the KL vanishes.
    assert found == pytest.approx(TraceEnum_ELBO(max_plate_nesting=1).loss(model, guide, x))


def test_two_data_sets_beside_each_other_do_not_multiply():
    def model(x, y):
        for name, value in (("x", x), ("y", y)):
            with pyro.plate(f"{name}_data", len(value)):
                k = pyro.sample(f"k_{name}", dist.Categorical(torch.ones(40) / 40))
                pyro.sample(name, dist.Normal(k.to(value), 1.0), obs=value)

    x, y = torch.randn(16), torch.randn(20)
    loss = TraceEnum_Sinkhorn(match_size=8, max_states=50)
    assert math.isfinite(loss.loss(model, AutoImplicit(model), x, y))


def test_switches_in_a_guide_by_hand():
    states = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 2)

    def model(x):
        with pyro.plate("data", len(x)):
            s = pyro.sample("s", dist.Bernoulli(torch.full((2,), 0.5)).to_event(1))
            pyro.sample("x", dist.Normal(s.sum(-1), 1.0), obs=x)

    def guide(x):
        logits = pyro.param("logits", torch.zeros(4))
        with pyro.plate("data", len(x)):
            pyro.sample("s", Finite(states, logits.expand(len(x), 4)))

    loss = TraceEnum_Sinkhorn(match_size=8)
    assert math.isfinite(SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), loss=loss).step(torch.randn(16)))
    assert float(pyro.param("logits").detach().abs().max()) > 0.01


def test_lost_mass_of_a_count_is_reported():
    def model(x, rate=2.0):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Poisson(rate))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = AutoImplicit(model)
    x = torch.randn(16)
    guide(x)
    assert 0 < guide.lost_mass["z"] < 1e-4
    report = match_report(model, guide, x, loss=TraceEnum_Sinkhorn(match_size=8), num_floor=2)
    lost = scipy.stats.poisson.sf(15, 2.0)
    assert f"z: its states are cut off where {lost:.1e} of the prior's mass is left" in str(report)
    with pytest.warns(UserWarning, match="the guide's states end at 15, beyond which the prior has 0.0"):
        guide(x, rate=9.0)


@pytest.mark.filterwarnings(SMALL)
def test_straight_through():
    """The relaxation needs no enumeration; labels cannot be relaxed."""

    def model(x):
        with pyro.plate("data", len(x)):
            s = pyro.sample("s", dist.Bernoulli(torch.full((3,), 0.5)).to_event(1))
            k = pyro.sample("k", dist.OneHotCategorical(torch.ones(4) / 4))
            pyro.sample("x", dist.Normal(s.sum(-1) + k[..., 0], 1.0), obs=x)

    guide = AutoImplicit(model, discrete="straight_through")
    x = torch.randn(64)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss=Trace_Sinkhorn(match_size=8))
    before = [svi.step(x), [p.detach().clone() for p in guide.parameters()]][1]
    svi.step(x)
    assert any(not torch.equal(a, b) for a, b in zip(before, guide.parameters(), strict=True))
    values = guide(x)
    assert set(values["s"].unique().tolist()) <= {0.0, 1.0} and bool((values["k"].sum(-1) == 1).all())
    with pytest.raises(
        ProgramError, match="discrete latent 'k' has integer values, through which no gradient"
    ):
        Trace_Sinkhorn(match_size=8).loss(mixture, AutoImplicit(mixture, discrete="straight_through"), x)


def test_saved_and_loaded(tmp_path):
    _, x = draw(64)
    program = SinkhornProgram(mixture, loss=TraceEnum_Sinkhorn(match_size=8, max_states=7))
    program.fit(x, num_steps=2, batch_size=16, seed=0, progress=False)
    program.save(tmp_path / "program.pt")
    loaded = SinkhornProgram.load(tmp_path / "program.pt", mixture)
    assert repr(loaded.loss) == repr(program.loss) == "TraceEnum_Sinkhorn(match_size=8, max_states=7)"
    torch.manual_seed(0)
    first = program.encode(x)
    torch.manual_seed(0)
    assert torch.equal(first["k"], loaded.encode(x)["k"])


def test_states_of_a_loaded_guide_are_those_it_was_made_with():
    """A count's largest state follows the prior of the first call; a loaded guide keeps it."""

    def model(x, rate=2.0):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Poisson(rate))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.randn(16)
    guide, other = AutoImplicit(model), AutoImplicit(model)
    guide(x)
    other.load_state_dict(guide.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other(x, rate=9.0)
    found = [made.state_heads[0]["site_z"].values for made in (guide, other)]
    assert [len(values) for values in found] == [16, 16]


@pytest.mark.filterwarnings(SMALL)
@pytest.mark.parametrize("vectorize", [False, True])
def test_particles_of_states_alone(vectorize):
    """Where no continuous latent is beside them, the places of the states have no particles, but their probabilities do."""

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(PROBS))
            pyro.sample("x", dist.Normal(LOCS[k], 1.0), obs=x)

    loss = TraceEnum_Sinkhorn(match_size=8, num_particles=3, vectorize_particles=vectorize)
    guide = AutoImplicit(model)
    assert math.isfinite(SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss=loss).step(torch.randn(16)))


@pytest.mark.filterwarnings(SMALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "prior",
    [
        lambda p: dist.Bernoulli(p.expand(3)).to_event(1),
        lambda p: dist.OneHotCategorical(p.expand(3)),
        lambda p: dist.Poisson(p.expand(3)).to_event(1),
        lambda p: dist.Binomial(2, p.expand(3)).to_event(1),
    ],
    ids=["switches", "one-hot", "poisson", "binomial"],
)
def test_states_have_the_dtype_of_the_prior(prior, dtype):
    """Whatever the default: a decoder in another precision would refuse them."""
    net = torch.nn.Linear(3, 2).to(dtype)

    def model(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior(torch.tensor(0.4, dtype=dtype)))
            pyro.sample("x", dist.Normal(net(z), 1.0).to_event(1), obs=x)

    guide, x = AutoImplicit(model), torch.randn(16, 2, dtype=dtype)
    loss = TraceEnum_Sinkhorn(match_size=8)
    assert math.isfinite(SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss=loss).step(x))
    assert guide(x)["z"].dtype == dtype


@pytest.mark.filterwarnings(SMALL)
def test_binomials_of_unlike_totals():
    """A datum's states end at its own total; the others have probability zero, and no gradient."""

    def model(x, totals):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Binomial(totals, torch.tensor(0.4)))
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    x, totals = 5 * torch.ones(16), torch.arange(16) % 4 + 1.0
    guide = AutoImplicit(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-1}), loss=TraceEnum_Sinkhorn(match_size=8))
    for _ in range(5):
        assert math.isfinite(svi.step(x, totals))
    for _ in range(20):
        assert bool((guide(x, totals)["k"] <= totals).all())


@pytest.mark.filterwarnings(SMALL)
def test_states_of_probability_zero_pass_no_gradient():
    """Where they are impossible under the likelihood, too, the gradient was 0 times infinity."""

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(PROBS))
            pyro.sample("x", dist.Poisson(torch.tensor([0.0, 1.0, 2.0])[k]), obs=x)

    def guide(x):
        logits = pyro.param("logits", torch.tensor([-1e4, 0.0, 0.0]))
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Categorical(logits=logits.expand(len(x), 3)))

    loss = TraceEnum_Sinkhorn(match_size=8)
    assert math.isfinite(loss.loss_and_grads(model, guide, torch.ones(16)))
    gradient = pyro.param("logits").grad
    assert bool(gradient.isfinite().all()) and float(gradient[1].abs()) > 0


def test_covariates_that_a_state_switches_on():
    """One run with equal latents shows them only if its state is the right one: half of the matches were blind to them."""
    covariate = 5 * torch.randn(12).repeat(2)
    covariate[12:] *= -1

    def model(x, sign=1):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            z = pyro.sample("z", dist.Normal(k * sign * covariate, 0.1))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, sign=1):
        """Right over all data; given the covariate with ``sign=1`` only."""
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            pyro.sample("z", dist.Normal(k * sign * covariate, 0.1))

    torch.manual_seed(0)
    loss, found = TraceEnum_Sinkhorn(match_size=12), {1: [], -1: []}
    for sign, values in found.items():
        for _ in range(100):
            loss.loss(model, lambda x, sign=sign: guide(x, sign), torch.randn(24))
            values.append(loss.terms.match["k, z"])
    assert abs(z_score(found[1])) < 5
    # Blind calls lie about zero.
    assert sorted(found[-1])[10] > 0.1


@pytest.mark.filterwarnings(SMALL)
@pytest.mark.parametrize("name", ["type", "values", "cell.type"])
def test_names_that_modules_may_not_have(name):
    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample(name, dist.Categorical(PROBS))
            pyro.sample("x", dist.Normal(LOCS[k], 1.0), obs=x)

    guide, other, x = AutoImplicit(model), AutoImplicit(model), torch.randn(16)
    assert math.isfinite(TraceEnum_Sinkhorn(match_size=8).loss(model, guide, x))
    other.load_state_dict(guide.state_dict())
    torch.manual_seed(0)
    first = guide(x)[name]
    torch.manual_seed(0)
    assert torch.equal(first, other(x)[name])


def test_states_follow_the_covariates_of_their_prior():
    """Without data to speak of, the guide starts at the prior of every datum, as latents on the line do."""

    def model(c, x):
        with pyro.plate("data", len(c)):
            k = pyro.sample("k", dist.Categorical(logits=torch.stack([3 * c, -3 * c], -1)))
            pyro.sample("x", dist.Normal(k.to(x), 100.0), obs=x)

    c = torch.tensor([-1.0, 1.0]).repeat(500)
    guide = AutoImplicit(model)
    found = guide(c, torch.randn(1000))["k"]
    assert float(found[c < 0].double().mean()) > 0.9 and float(found[c > 0].double().mean()) < 0.1
    found = guide(-c, torch.randn(1000))["k"]
    assert float(found[c < 0].double().mean()) < 0.1
