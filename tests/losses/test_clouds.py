"""Which points are compared: sub-samples, scales, masks, nesting, particles, covariates.

Statistical tests ask whether a mean differs from its expectation by more than five standard errors: under the truth
that happens once in a million runs.
"""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_sinkhorn import AutoImplicit, Implicit, Trace_Sinkhorn
from pyro_sinkhorn.distributions import HypersphericalUniform, VonMisesFisher
from pyro_sinkhorn.losses.call import Call
from pyro_sinkhorn.losses.clouds import make_cloud, rows, slices, varying_parameters
from pyro_sinkhorn.scoring import run_scored
from pyro_sinkhorn.structure import Plate, structure_of


def normal(scale=1.0, d=4):
    return dist.Normal(torch.zeros(d), scale).to_event(1)


def observe(x):
    """A likelihood that tells nothing of the latents: what remains is the match."""
    pyro.sample("x", dist.Normal(0.0, 1.0).expand(x.shape[1:]).to_event(x.dim() - 1), obs=x)


def evaluate(model, guide, *args, n=40, num_particles=10, group="z", **options):
    """``n`` values of the match of a group, each the mean over vectorised particles."""
    options = {"match_size": 4} | options
    loss = Trace_Sinkhorn(
        prior_weight=1.0, num_particles=num_particles, vectorize_particles=num_particles > 1, **options
    )
    values = []
    for _ in range(n):
        loss.loss(model, guide, *args)
        values.append(loss.terms.match[group])
    return torch.tensor(values)


def z_score(values, other=None):
    """Standard errors between the mean and 0, or between two means."""
    mean, variance = values.mean(), values.var() / len(values)
    if other is not None:
        mean, variance = mean - other.mean(), variance + other.var() / len(other)
    return float(mean / variance.sqrt())


# A guide that is the prior


PRIORS = {
    "normal": {"z": lambda: normal(d=8)},
    "dirichlet": {"z": lambda: dist.Dirichlet(torch.full((5,), 0.5))},
    "sphere": {"z": lambda: HypersphericalUniform(3)},
    "von mises-fisher": {"z": lambda: VonMisesFisher(torch.tensor([1.0, 0.0, 0.0]), torch.tensor(5.0))},
    "circle": {"z": lambda: dist.VonMises(3.0, 1.0)},
    "cauchy": {"z": lambda: dist.Cauchy(torch.zeros(2), 1.0).to_event(1)},
    "sphere x normal": {"a": lambda: HypersphericalUniform(3), "b": lambda: normal(d=2)},
}


@pytest.mark.parametrize("batch", [8, 11])
@pytest.mark.parametrize("prior", PRIORS)
def test_the_match_of_a_guide_that_is_the_prior_is_zero_on_average(prior, batch):
    def model(x):
        with pyro.plate("data", len(x)):
            for name, fn in PRIORS[prior].items():
                pyro.sample(name, fn())
            observe(x)

    def guide(x):
        with pyro.plate("data", len(x)):
            for name, fn in PRIORS[prior].items():
                draw = pyro.sample(f"{name}_draw", fn(), infer={"is_auxiliary": True})
                pyro.sample(name, Implicit(draw, event_dim=fn().event_dim))

    values = evaluate(model, guide, torch.zeros(batch), group=", ".join(PRIORS[prior]))
    assert abs(z_score(values)) < 5
    assert values.std() > 0


def scaled_model(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", normal())
        observe(x)


def scaled_guide(x, scale=0.7):
    with pyro.plate("data", len(x)):
        pyro.sample("z", normal(scale))


def test_other_laws_have_a_positive_match():
    assert z_score(evaluate(scaled_model, scaled_guide, torch.zeros(32), match_size=16)) > 5


# Sub-samples

FULL = torch.linspace(-3, 3, 64, dtype=torch.float64)


def sub_sampling(batch):
    def model(x):
        with pyro.plate("data", len(x), subsample_size=batch) as index:
            pyro.sample("z", normal())
            observe(x[index])

    def guide(x):
        with pyro.plate("data", len(x), subsample_size=batch):
            pyro.sample("z", normal(0.5))

    return model, guide


def test_neither_likelihood_nor_match_depends_on_the_batch_size():
    matches, totals = {}, {}
    exact = -float(dist.Normal(0.0, 1.0).log_prob(FULL).sum())
    for batch in (8, 64):
        loss = Trace_Sinkhorn(prior_weight=1.0, match_size=4)
        model, guide = sub_sampling(batch)
        terms = []
        for _ in range(250):
            loss.loss(model, guide, FULL)
            terms.append((loss.terms.match["z"], loss.terms.reconstruction * len(FULL), loss.terms.loss))
        match, reconstruction, per_datum = torch.tensor(terms).T
        assert torch.allclose(per_datum, reconstruction / len(FULL) + match)
        matches[batch], totals[batch] = match, reconstruction
    assert abs(z_score(totals[8] - exact)) < 5
    assert torch.allclose(totals[64], torch.tensor(exact))
    assert abs(z_score(matches[8], matches[64])) < 5
    # The size at which clouds are compared does matter, which is why it is a parameter of its own.
    assert z_score(evaluate(*sub_sampling(64), FULL, match_size=32), matches[64]) > 5


def test_a_prior_run_sees_the_sub_sample_of_the_scored_one():
    def model(x):
        with pyro.plate("data", len(x), subsample_size=16) as index:
            pyro.sample("z", dist.Normal(x[index], 0.01))
            observe(x[index])

    guide_trace = poutine.trace(lambda x: pyro.sample("z", dist.Normal(torch.zeros(16), 1.0))).get_trace(FULL)
    scored = run_scored(model, guide_trace, (FULL,), {})
    call = Call(model, (FULL,), {}, structure_of(scored), scored)
    for _ in range(3):
        prior = call.prior()
        assert torch.equal(prior.nodes["data"]["value"], scored.nodes["data"]["value"])
        assert (prior.nodes["z"]["value"] - FULL[prior.nodes["data"]["value"]]).abs().max() < 0.1

    def guide(x):
        with pyro.plate("data", len(x), subsample_size=16) as index:
            pyro.sample("z", dist.Normal(x[index], 0.01))

    values = evaluate(model, guide, FULL)
    assert abs(z_score(values)) < 5


# Scales


def same_seed(function, *args):
    pyro.set_rng_seed(5)
    return function(*args)


def test_a_scale_on_model_and_guide_multiplies_everything():
    loss = Trace_Sinkhorn(prior_weight=3.0, match_size=8)
    x = torch.randn(20)
    loss.loss(scaled_model, scaled_guide, x)  # the prior's unit is estimated once
    plain = same_seed(loss.loss, scaled_model, scaled_guide, x)
    scaled = same_seed(loss.loss, poutine.scale(scaled_model, 5.0), poutine.scale(scaled_guide, 5.0), x)
    assert scaled == pytest.approx(5 * plain)
    assert same_seed(loss.loss, poutine.scale(scaled_model, 5.0), scaled_guide, x) == pytest.approx(5 * plain)
    per_datum = same_seed(lambda: loss.loss(scaled_model, scaled_guide, x) and loss.terms)
    assert (per_datum.reconstruction + 3 * per_datum.match["z"]) * len(x) == pytest.approx(plain)


def test_a_scale_on_a_latent_multiplies_its_match_alone():
    def model(x, scale):
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=scale):
                pyro.sample("z", normal())
            observe(x)

    x = torch.randn(20)
    loss = Trace_Sinkhorn(prior_weight=3.0, match_size=8)
    loss.loss(scaled_model, scaled_guide, x)
    losses = {s: same_seed(loss.loss, lambda x, s=s: model(x, s), scaled_guide, x) for s in (1e-9, 1.0, 4.0)}
    assert losses[4.0] - losses[1e-9] == pytest.approx(4 * (losses[1.0] - losses[1e-9]))
    assert losses[1e-9] == pytest.approx(-float(dist.Normal(0.0, 1.0).log_prob(x).sum()))


def test_unequal_scales_weigh_the_points():
    """Half of the data at twice the weight: the law of the weighted cloud decides."""
    n = 32
    weight = torch.where(torch.arange(n) < n // 2, 3.0, 1e-6)

    def model(x):
        with pyro.plate("data", n), poutine.scale(scale=weight):
            pyro.sample("z", normal(d=2))
            observe(x)

    def guide(x):  # the points that count are drawn from the prior, the others lie far away
        with pyro.plate("data", n):
            z = pyro.sample("e", normal(d=2), infer={"is_auxiliary": True})
            pyro.sample("z", Implicit(torch.where(weight[:, None] > 1, z, z + 50), event_dim=1))

    values = evaluate(model, guide, torch.zeros(n), match_size=16)
    assert values.mean().abs() < 0.1
    trace = poutine.trace(model).get_trace(torch.zeros(n))
    total, n_data = slices(trace, structure_of(trace).groups[0])
    assert torch.equal(total, weight)
    assert n_data == pytest.approx(float(weight.sum()))


# Masks

HALF = torch.arange(24) % 2 == 0
HOW_TO_MASK = {
    "handler": lambda fn, mask: (fn, poutine.mask(mask=mask)),
    "distribution": lambda fn, mask: (fn.mask(mask), poutine.mask(mask=True)),
}


@pytest.mark.parametrize("how", HOW_TO_MASK)
def test_masked_rows_do_not_count(how):
    def model(x, mask=HALF):
        with pyro.plate("data", len(x)):
            fn, handler = HOW_TO_MASK[how](normal(), mask)
            with handler:
                pyro.sample("z", fn)
            with poutine.mask(mask=mask):
                observe(x)

    def guide(x, garbage=0.0):
        with pyro.plate("data", len(x)):
            z = pyro.sample("e", normal(), infer={"is_auxiliary": True})
            pyro.sample("z", Implicit(torch.where(HALF[:, None], z, garbage), event_dim=1))

    x = torch.zeros(24)
    loss = Trace_Sinkhorn(prior_weight=1.0, match_size=4)
    loss.loss(model, guide, x)
    clean = same_seed(loss.loss, model, guide, x)
    assert same_seed(loss.loss, model, lambda x: guide(x, 1e6), x) == clean
    assert clean == pytest.approx(12 * (0.5 * math.log(2 * math.pi) + loss.terms.match["z"]))
    assert abs(z_score(evaluate(model, lambda x: guide(x, 1e6), x))) < 5

    # Nothing left: neither likelihood nor match.
    assert loss.loss(lambda x: model(x, torch.zeros(24, dtype=torch.bool)), guide, x) == 0
    assert loss.terms.match == {"z": 0.0}


def test_a_mask_of_all_is_no_mask():
    loss = Trace_Sinkhorn(match_size=4)
    x = torch.zeros(24)
    loss.loss(scaled_model, scaled_guide, x)
    plain = same_seed(loss.loss, scaled_model, scaled_guide, x)
    masked = poutine.mask(scaled_model, mask=torch.ones(24, dtype=torch.bool))
    assert same_seed(loss.loss, masked, scaled_guide, x) == pytest.approx(plain)


# Plates in plates


def nested(words=6, documents=12, spread=0.05):
    def latents(sample_z):
        with pyro.plate("documents", documents):
            z = sample_z()
            with pyro.plate("words", words):
                return pyro.sample("w", dist.Normal(z, spread))

    def model(x):
        with pyro.plate("documents", documents):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("words", words):
                pyro.sample("w", dist.Normal(z, spread))
                pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def guide(x):
        latents(lambda: pyro.sample("z", dist.Normal(0.0, 1.0)))

    return model, guide, torch.zeros(words, documents)


def test_words_of_one_document_are_one_unit():
    group = structure_of(poutine.trace(nested(3, 2)[0]).get_trace(torch.zeros(3, 2))).groups[1]
    cloud = make_cloud(torch.zeros(1, 6, 1), torch.ones(6), group)
    assert cloud.units.tolist() == [0, 0, 0, 1, 1, 1]
    weights = torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0, 2.0])
    cloud = make_cloud(torch.arange(6.0).reshape(1, 6, 1), weights, group)
    assert cloud.points.flatten().tolist() == [1, 2, 5]
    assert cloud.units.tolist() == [0, 0, 1]
    assert cloud.weights.tolist() == [1, 1, 2]


@pytest.mark.parametrize("group", ["z", "w"])
def test_a_nested_guide_that_is_the_prior_matches(group):
    """Were words split without regard to their documents, the halves of a cloud would be dependent, hence too close."""
    model, guide, x = nested()
    assert abs(z_score(evaluate(model, guide, x, group=group))) < 5


def test_a_nested_group_is_matched_together_with_the_latents_around_it():
    model, _, x = nested(words=2, documents=32)

    def apart(x):
        with pyro.plate("documents", 32):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            other = pyro.sample("other", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
            with pyro.plate("words", 2):
                pyro.sample("w", dist.Normal(other, 0.05))

    options = {"group": "w", "match_size": 16}
    assert z_score(evaluate(model, apart, x, **options)) > 5
    assert abs(z_score(evaluate(model, apart, x, groups="marginal", **options))) < 5


def test_rows_lay_plates_out_in_their_order():
    value = torch.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)  # particles, inner, outer, event
    outer, inner = Plate("outer", -1, 4, 4), Plate("inner", -2, 3, 3)
    laid_out = rows(value, 2, (outer, inner))
    assert laid_out.shape == (2, 12, 5)
    assert torch.equal(laid_out[1, 3 * 2 + 1], value[1, 1, 2])
    # Without a dimension for a plate a value is the same in all its slices, and other plates become columns.
    assert torch.equal(rows(value[0, 0], 1, (outer, inner))[0, 3 * 2 + 1], value[0, 0, 2])
    columns = rows(value, 2, (outer,))
    assert columns.shape == (2, 4, 15)
    assert torch.equal(columns[1, 2], value[1, :, 2].flatten())
    assert rows(torch.zeros(5), 1, (outer,)).shape == (1, 4, 5)


@pytest.mark.parametrize("kind", ["normal", "dirichlet"])
def test_a_plate_inside_a_datum_makes_columns_of_full_weight(kind):
    fn = normal(d=2) if kind == "normal" else dist.Dirichlet(torch.ones(3))

    def model(x):
        data = pyro.plate("data", len(x), dim=-1)
        with data, pyro.plate("parts", 3, dim=-2):
            part = pyro.sample("part", fn)
            assert part.shape[-3:-1] == (3, len(x))
        with data:
            observe(x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1), pyro.plate("parts", 3, dim=-2):
            pyro.sample("part", fn)

    def guide_alike(x):  # the right marginals; but the parts of one datum are equal
        with pyro.plate("data", len(x), dim=-1):
            one = pyro.sample("one", fn, infer={"is_auxiliary": True})
            part = one.expand(*one.shape[:-3], 3, *one.shape[-2:])
            with pyro.plate("parts", 3, dim=-2):
                pyro.sample("part", Implicit(part, event_dim=1))

    # The prior itself is reparametrised in both cases, which is all a guide needs.
    x = torch.zeros(32)
    options = {"group": "part", "match_size": 16}
    assert abs(z_score(evaluate(model, guide, x, **options))) < 5
    assert z_score(evaluate(model, guide_alike, x, **options)) > 5

    loss = Trace_Sinkhorn(match_size=16)
    loss.loss(model, guide, x)
    # 512 points of a mean squared distance of twice the dimension, three times.
    assert float(loss.latent_match.state.mean_costs["part"]) == pytest.approx(2 * 2 * 3, rel=0.1)


# Particles


def drifting_guide(x):
    """Each particle is a narrow cloud somewhere; many of them together look like the prior."""
    centre = pyro.sample("centre", normal(d=2), infer={"is_auxiliary": True})
    with pyro.plate("data", len(x)):
        e = pyro.sample("e", normal(0.1, d=2), infer={"is_auxiliary": True})
        pyro.sample("z", Implicit(centre + e, event_dim=1))


def test_every_particle_is_a_cloud_of_its_own():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", normal(d=2))
            observe(x)

    x, values = torch.zeros(16), {}
    for vectorised in (False, True):
        loss = Trace_Sinkhorn(prior_weight=1.0, match_size=8, num_particles=8, vectorize_particles=vectorised)
        terms = []
        for _ in range(40):
            total = loss.loss(model, drifting_guide, x)
            terms.append(loss.terms.match["z"])
            assert total == pytest.approx(16 * loss.terms.loss)
        values[vectorised] = torch.tensor(terms)
    assert abs(z_score(values[False], values[True])) < 5
    assert values[True].mean() > 0.5  # pooled, it would be a tenth of it


# Priors that vary along the plate

COVARIATE = torch.linspace(-2, 2, 32, dtype=torch.float64)


def covariate_model(c, sd=0.1):
    with pyro.plate("data", len(c)):
        pyro.sample("z", dist.Normal(c.sin() * 2, sd))
        observe(c)


def exact(c, sd=0.1):
    with pyro.plate("data", len(c)):
        pyro.sample("z", dist.Normal(c.sin() * 2, sd))


def pooled(c, sd=0.1):
    """The right law over all data together, and no idea which datum is which."""
    with pyro.plate("data", len(c)):
        other = pyro.sample("other", dist.Categorical(torch.ones(len(c))), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Normal(c[other].sin() * 2, sd))


def test_slices_with_unlike_priors_are_not_pooled():
    # At the largest size possible: halves that share a datum would be closer than halves that cannot.
    assert abs(z_score(evaluate(covariate_model, exact, COVARIATE, match_size=16))) < 5
    wrong = evaluate(covariate_model, pooled, COVARIATE, match_size=16)
    assert z_score(wrong) > 5
    assert wrong.mean() > 0.05
    # And without vectorised particles.
    options = {"match_size": 16, "n": 100, "num_particles": 1}
    assert abs(z_score(evaluate(covariate_model, exact, COVARIATE, **options))) < 5
    assert z_score(evaluate(covariate_model, pooled, COVARIATE, **options)) > 5


@pytest.mark.parametrize("spread", [0.0, 1e-6], ids=["equal", "nearly equal"])
def test_a_first_batch_of_equal_covariates_does_not_blind_the_loss(spread):
    """Data may be sorted, and a prior network may start at zero."""
    loss = Trace_Sinkhorn(prior_weight=1.0, match_size=8, num_particles=10, vectorize_particles=True)
    loss.loss(covariate_model, exact, spread * COVARIATE, 1.0)
    values = {}
    for guide in (exact, pooled):
        values[guide] = []
        for _ in range(40):
            loss.loss(covariate_model, guide, COVARIATE, 1.0)
            values[guide].append(loss.terms.match["z"])
    assert abs(z_score(torch.tensor(values[exact]))) < 5
    assert z_score(torch.tensor(values[pooled])) > 5


def test_an_observed_parent_is_a_covariate():
    def model(y, x):
        with pyro.plate("data", len(x)):
            parent = pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)
            pyro.sample("z", dist.Normal(parent, 0.1))
            observe(x)

    def right(y, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(y, 0.1))

    def wrong(y, x):
        with pyro.plate("data", len(x)):
            other = pyro.sample("other", dist.Categorical(torch.ones(len(x))), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(y[other], 0.1))

    options = {"match_size": 8}
    assert abs(z_score(evaluate(model, right, COVARIATE, COVARIATE, **options))) < 5
    assert z_score(evaluate(model, wrong, COVARIATE, COVARIATE, **options)) > 5


C = torch.linspace(-1, 1, 16, dtype=torch.float64)
VARYING = {
    "normal": lambda c: dist.Normal(c, 1.0),
    "beta": lambda c: dist.Beta(c.exp(), 1.0),
    "uniform": lambda c: dist.Uniform(c - 1, 3.0),
    "dirichlet": lambda c: dist.Dirichlet(torch.stack([c.exp(), 2 - c], -1)),
    "direction": lambda c: VonMisesFisher(torch.stack([c.cos(), c.sin()], -1), torch.tensor(3.0)),
    "concentration": lambda c: VonMisesFisher(torch.tensor([1.0, 0.0]), c.exp()),
    "covariance": lambda c: dist.MultivariateNormal(
        torch.zeros(2), scale_tril=c.exp()[:, None, None] * torch.eye(2)
    ),
}


@pytest.mark.parametrize("kind", VARYING)
@pytest.mark.parametrize("first", [False, True], ids=["alone", "below another latent"])
def test_covariates_are_found_in_any_parameter_but_latents_are_not_covariates(kind, first):
    def model(x, use):
        with pyro.plate("data", len(x)):
            z0 = pyro.sample("z0", dist.Normal(0.0, 1.0)) if first else 0.0
            pyro.sample("z", VARYING[kind](use * C + 0.1 * z0))
            observe(x)

    for use, found in ((1.0, True), (0.0, False)):
        guide_trace = poutine.trace(model).get_trace(torch.zeros(16), use)
        scored = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(torch.zeros(16), use)
        call = Call(model, (torch.zeros(16), use), {}, structure_of(scored), scored)
        features = varying_parameters(call.constant(call.prior())[0], call.structure.groups[0])
        assert (features is not None) == found
        if found:
            assert features.shape[:2] == (1, 16)


# Dependence between latents


def chain(x):
    with pyro.plate("data", len(x)):
        z1 = pyro.sample("z1", dist.Normal(0.0, 1.0))
        pyro.sample("z2", dist.Normal(z1, 0.2))
        observe(x)


def chain_guide(x):
    with pyro.plate("data", len(x)):
        z1 = pyro.sample("z1", dist.Normal(0.0, 1.0))
        pyro.sample("z2", dist.Normal(z1, 0.2))


def unchained_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z1", dist.Normal(0.0, 1.0))
        pyro.sample("z2", dist.Normal(0.0, math.sqrt(1.04)))


def test_latents_of_one_group_are_matched_jointly():
    x = torch.zeros(32)
    options = {"match_size": 16}
    assert abs(z_score(evaluate(chain, chain_guide, x, group="z1, z2", **options))) < 5
    assert z_score(evaluate(chain, unchained_guide, x, group="z1, z2", **options)) > 5
    for name in ("z1", "z2"):  # which site by site cannot see
        assert abs(z_score(evaluate(chain, unchained_guide, x, group=name, groups="marginal", **options))) < 5


# Prior clouds


def test_more_prior_batches_give_the_same_mean_and_less_variance():
    x = torch.zeros(16)
    calls = []

    class Counted(dist.Normal):
        def rsample(self, sample_shape=()):
            calls.append(1)
            return super().rsample(sample_shape)

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", Counted(torch.zeros(2), 1.0).to_event(1))
            observe(x)

    def guide(x):  # far away: the variance is that of the prior cloud
        with pyro.plate("data", len(x)):
            pyro.sample("z", Implicit(torch.full((16, 2), 3.0), event_dim=1))

    values = {}
    for n in (1, 4):
        loss = Trace_Sinkhorn(prior_weight=1.0, match_size=8, num_prior_batches=n)
        loss.loss(model, guide, x)
        calls.clear()
        terms = []
        for _ in range(60):
            loss.loss(model, guide, x)
            terms.append(loss.terms.match["z"])
        assert len(calls) == 60 * n
        values[n] = torch.tensor(terms) * loss.latent_match.state.mean_costs["z"]
    # The unit is estimated from 512 draws in each loss: about 5% apart.
    assert values[4].mean() == pytest.approx(float(values[1].mean()), rel=0.2)
    assert values[4].var() < 0.6 * values[1].var()


def test_the_noise_floor_is_zero_on_average():
    x = torch.zeros(16)
    guide_trace = poutine.trace(scaled_guide).get_trace(x)
    scored = run_scored(scaled_model, guide_trace, (x,), {})
    call = Call(scaled_model, (x,), {}, structure_of(scored), scored)
    match = Trace_Sinkhorn(match_size=8).latent_match
    floor = torch.tensor([float(match.floor(call)[0].value) for _ in range(200)])
    assert abs(z_score(floor)) < 5


def test_the_guide_made_automatically_is_matched_like_any_other():
    x = torch.randn(16)

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", normal(d=2))
            observe(x)

    guide = AutoImplicit(model)
    guide(x)
    with torch.no_grad():  # noise straight to the latents, which are relative to the prior
        head = guide.heads[0]
        for parameter in head.parameters():
            parameter.zero_()
        head.direct.weight[:, -2:] = torch.eye(2)
    assert abs(z_score(evaluate(model, guide, x))) < 5


@pytest.mark.parametrize("scale", [1.0, 0.3, 7])
def test_slices_that_count_alike_weigh_as_those_that_are_laid_out(scale):
    def traced(scale):
        def model(x):
            with pyro.plate("data", len(x)), poutine.scale(scale=scale):
                z = pyro.sample("z", normal())
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

        return poutine.trace(model).get_trace(torch.zeros(6, 4))

    short, laid_out = traced(scale), traced(torch.full((6,), float(scale)))
    group = structure_of(short).groups[0]
    (one, n_one), (all_, n_all) = slices(short, group), slices(laid_out, group)
    assert torch.equal(one, all_) and n_one == n_all
    points = torch.randn(1, 6, 4)
    assert make_cloud(points, one, group).weights is make_cloud(points, all_, group).weights is None


def test_a_parameter_that_a_plate_expanded_is_no_covariate_and_a_laid_out_one_is():
    def model(x, loc):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    x = torch.zeros(6, 4)
    steps = torch.arange(6.0).unsqueeze(-1).expand(6, 4)
    for loc, varies in (
        (torch.zeros(4).expand(6, 4), False),
        (torch.zeros(6, 4), False),
        (steps, True),
        (steps[:, :1] + torch.zeros(4), True),
    ):
        trace = poutine.trace(model).get_trace(x, loc)
        found = varying_parameters(trace, structure_of(trace).groups[0])
        assert (found is not None) == varies
