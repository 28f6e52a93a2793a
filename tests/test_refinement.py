"""Chains of :func:`refine` end at the exact posterior, and leave it where it is.

Thresholds: Kolmogorov-Smirnov tests at a p-value of 1e-6, z-tests at 5 standard errors. Chains are independent.
"""

import math
import re
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro import poutine
from pyro.infer import Predictive
from torch import nn

from pyro_sinkhorn.refinement import refine

LEVEL = 1e-6
PAGE = Path(__file__).parents[1] / "docs" / "refinement.md"


def same_law(draws, cdf):
    """p-value of draws against a distribution function."""
    return scipy.stats.kstest(draws.reshape(-1).numpy(), cdf).pvalue


def conjugate(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


X = torch.tensor([-3.0, -1.0, 0.0, 2.0, 6.0], dtype=torch.float64)


@pytest.mark.parametrize("kernel", ["mala", "hmc"])
@pytest.mark.parametrize(
    ("shift", "sd"), [(0.0, 0.05), (3.0, 0.7), (0.0, 5.0)], ids=["narrow", "shifted", "wide"]
)
def test_wrong_starts_end_at_the_exact_posterior(kernel, shift, sd):
    draws = {"z": X / 2 + shift + sd * torch.randn(1000, len(X))}
    refined = refine(conjugate, draws, X, num_steps=100, kernel=kernel)
    z = (refined.draws["z"] - X / 2) * math.sqrt(2.0)
    assert same_law(z, "norm") > LEVEL
    assert float((z.mean(0) * math.sqrt(1000)).abs().max()) < 5
    assert float((z.var(0) - 1).abs().max() * math.sqrt(1000 / 2)) < 5
    block = refined.blocks[0]
    assert block.acceptance.shape == (5,) and block.plates == ("data",) and block.unmoved == 0
    assert abs(block.memory) < 5 / math.sqrt(1000)


def test_nuts_ends_there_too():
    draws = {"z": torch.randn(600, 2) + 2}
    x = torch.tensor([0.0, 3.0])
    refined = refine(conjugate, draws, x, num_steps=100, kernel="nuts", num_chains=2, seed=1)
    assert refined.draws["z"].shape == (600, 2) and refined.num_chains == 2
    z = (refined.draws["z"] - x / 2) * math.sqrt(2.0)
    # States of a chain: as many as a tenth of them would say, if they were independent.
    assert float((z.mean(0) * math.sqrt(60)).abs().max()) < 5
    assert float((z.var(0) - 1).abs().max() * math.sqrt(60 / 2)) < 5


def test_exact_draws_stay_exact_with_adaptation():
    draws = {"z": X / 2 + torch.randn(2000, len(X)) / math.sqrt(2.0)}
    refined = refine(conjugate, draws, X, num_steps=12)
    z = (refined.draws["z"] - X / 2) * math.sqrt(2.0)
    assert same_law(z, "norm") > LEVEL


# Supports: the prior's draws are the start, an exact posterior the end.


def gamma_poisson(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Gamma(2.0, 1.0))
        pyro.sample("x", dist.Poisson(z), obs=x)


def uniform_binomial(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Uniform(0.0, 1.0))
        pyro.sample("x", dist.Binomial(10, z), obs=x)


def dirichlet_multinomial(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Dirichlet(torch.tensor([0.7, 1.0, 2.0])))
        pyro.sample("x", dist.Multinomial(6, probs=z), obs=x)


def angles(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.VonMises(0.0, 1.0))
        pyro.sample("x", dist.VonMises(z, 2.0), obs=x)


def circle_cdf(x):
    """Posterior of a von Mises prior (0, 1) and observations of concentration 2: the two vectors add up."""
    vector = 1.0 + 2 * math.cos(x), 2 * math.sin(x)
    return scipy.stats.vonmises(math.hypot(*vector), loc=math.atan2(vector[1], vector[0]))


def on_the_circle(z, x):
    law = circle_cdf(x)
    centred = torch.remainder(z - law.kwds["loc"] + math.pi, 2 * math.pi) - math.pi
    return scipy.stats.vonmises.cdf(centred.numpy(), law.args[0])


CASES = {
    "positive": (gamma_poisson, [0.0, 3.0, 9.0], lambda z, x: scipy.stats.gamma.cdf(z, 2 + x, scale=0.5)),
    "interval": (uniform_binomial, [0.0, 5.0, 10.0], lambda z, x: scipy.stats.beta.cdf(z, 1 + x, 11 - x)),
    "simplex": (
        dirichlet_multinomial,
        [[0.0, 1.0, 5.0], [3.0, 3.0, 0.0]],
        lambda z, x: scipy.stats.beta.cdf(z[:, 0], 0.7 + x[0], 9 - x[0]),
    ),
    "circle": (angles, [0.0, 2.0, 3.0], on_the_circle),
}


@pytest.mark.parametrize("kernel", ["mala", "hmc"])
@pytest.mark.parametrize("case", CASES)
def test_supports(case, kernel):
    model, data, cdf = CASES[case]
    x = torch.tensor(data)
    with torch.no_grad():
        start = Predictive(poutine.uncondition(model), num_samples=1000)(x)["z"]
    refined = refine(model, {"z": start}, x, num_steps={"mala": 160, "hmc": 60}[kernel], kernel=kernel)
    found = refined.draws["z"]
    prior = poutine.trace(model).get_trace(x).nodes["z"]["fn"]
    assert found.shape == start.shape and bool(prior.support.check(found).all())
    assert refined.blocks[0].memory < 0.25
    for i, value in enumerate(x):
        uniform = cdf(found[:, i], value.numpy() if value.dim() else float(value))
        assert scipy.stats.kstest(uniform, "uniform").pvalue > LEVEL


# Latents and data of one draw from the joint: the latents are an exact posterior draw, whatever the program. Chains
# that start there must end with the law of the prior over many such sets (Geweke 2004).

SETS = 3000


def levels(x):
    with pyro.plate("sets", SETS, dim=-2):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        scale = pyro.sample("scale", dist.HalfCauchy(1.0))
        with pyro.plate("data", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(mean, scale))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def dependent_support(x):
    with pyro.plate("sets", SETS, dim=-1):
        mean = pyro.sample("mean", dist.Gamma(2.0, 1.0))
        part = pyro.sample("part", dist.Uniform(0.0, mean))
        pyro.sample("x", dist.Normal(part, 0.5), obs=x)


class Correlation(dist.LKJCholesky):
    """With a sampler by rejection: in torch 2.13 that of LKJCholesky does not follow its density for more than 2 dimensions."""

    def sample(self, sample_shape=()):
        assert self.dim == 3 and bool((self.concentration == 1).all())
        matrix = torch.eye(3).repeat(4 * SETS, 1, 1)
        for i, j in ((0, 1), (0, 2), (1, 2)):
            matrix[:, i, j] = matrix[:, j, i] = 2 * torch.rand(len(matrix)) - 1
        factor, failed = torch.linalg.cholesky_ex(matrix)
        return factor[failed == 0][: self.batch_shape.numel()].reshape(self.batch_shape + self.event_shape)


def matrices(x):
    with pyro.plate("sets", SETS, dim=-1):
        mean = pyro.sample("mean", Correlation(3, 1.0))
        pyro.sample("x", dist.MultivariateNormal(torch.zeros(3), scale_tril=mean), obs=x)


def order(x):
    with pyro.plate("sets", SETS, dim=-1):
        base = dist.Normal(0.0, 1.0).expand([2]).to_event(1)
        mean = pyro.sample("mean", dist.TransformedDistribution(base, [dist.transforms.OrderedTransform()]))
        pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)


@pytest.mark.filterwarnings(
    "ignore:latents .* acceptance rate:UserWarning"
)  # of single chains, at a step size not theirs
@pytest.mark.parametrize("kernel", ["mala", "hmc"])
@pytest.mark.parametrize("joint", [False, True], ids=["turns", "joint"])
@pytest.mark.parametrize("model", [levels, dependent_support, matrices, order])
def test_the_posterior_is_invariant(model, joint, kernel):
    with torch.no_grad():
        truth = poutine.trace(poutine.uncondition(model)).get_trace(None).nodes
        other = poutine.trace(poutine.uncondition(model)).get_trace(None).nodes
    names = [name for name in ("mean", "scale", "z", "part") if name in truth]
    draws = {name: truth[name]["value"].unsqueeze(0) for name in names}
    # Short enough to go somewhere: with most moves rejected, a wrong density would show only slowly.
    sizes, steps = ({"mala": 0.25, "hmc": 0.2}, 60) if model is levels else ({"mala": 0.9, "hmc": 0.5}, 20)
    step = sizes[kernel]
    refined = refine(
        model,
        draws,
        truth["x"]["value"],
        num_steps=steps,
        step_size=step,
        kernel=kernel,
        joint=joint,
        parallel=True,
    )
    if model is levels:
        assert [block.plates for block in refined.blocks] == (
            [("sets",)] if joint else [("sets",), ("sets", "data")]
        )
    assert refined.acceptance < 0.97, "the test would not see a missing correction"
    for name in names:
        found, prior = refined.draws[name].reshape(SETS, -1), other[name]["value"].reshape(SETS, -1)
        assert float((found != draws[name].reshape(SETS, -1)).any(-1).double().mean()) > 0.5
        for i in range(found.shape[1]):
            if float(prior[:, i].std()) > 0:
                p = scipy.stats.ks_2samp(found[:, i].numpy(), prior[:, i].numpy()).pvalue
                assert p > LEVEL, f"{name}[{i}]"


# Globals


def normal_levels(x):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def exact_levels(x):
    """Mean and covariance of (mean, z) given x."""
    n = len(x)
    precision = torch.eye(n + 1) * 2
    precision[0, 0] = 1 + n
    precision[0, 1:] = precision[1:, 0] = -1
    covariance = precision.inverse()
    return covariance @ torch.cat([torch.zeros(1), x]), covariance


@pytest.mark.parametrize("joint", [False, True], ids=["turns", "joint"])
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "wrong"])
def test_global_and_local_latents(joint, exact):
    x = torch.tensor([-1.0, 0.5, 2.0, 5.0])
    mean, covariance = exact_levels(x)
    root, n = torch.linalg.cholesky(covariance), 2000
    start = mean + torch.randn(n, 5) @ root.T if exact else torch.randn(n, 5) * 0.3 + 2
    draws = {"mean": start[:, :1], "z": start[:, 1:]}
    refined = refine(normal_levels, draws, x, num_steps=20 if exact else 200, joint=joint)
    assert refined.draws["mean"].shape == (n, 1) and refined.draws["z"].shape == (n, 4)
    assert [b.plates for b in refined.blocks] == ([()] if joint else [(), ("data",)])
    found = torch.cat([refined.draws["mean"], refined.draws["z"]], -1)
    white = torch.linalg.solve_triangular(root, (found - mean).T, upper=False).T
    for column in white.T:
        assert same_law(column, "norm") > LEVEL
    second = white.T @ white / n - torch.eye(5)
    assert float((second / (1 + torch.eye(5)).sqrt()).abs().max()) * math.sqrt(n) < 5


def test_latents_read_across_slices_are_accepted_together():
    group = torch.tensor([0, 1, 1, 0])

    def grouped(x):
        with pyro.plate("groups", 2):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(theta[..., group], 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.tensor([0.0, 1.0, 3.0, 4.0])
    refined = refine(
        grouped, {"theta": torch.randn(500, 2), "z": torch.randn(500, 4)}, x, joint=False, num_steps=200
    )
    assert [(b.name, b.plates) for b in refined.blocks] == [("theta", ()), ("z", ("data",))]
    # Two data of variance 2 each around theta: precision 1 + 2/2.
    z = (refined.draws["theta"] - torch.tensor([1.0, 1.0])) * math.sqrt(2.0)
    assert same_law(z, "norm") > LEVEL


def test_large_programs_take_turns_small_ones_move_as_one():
    small, large = torch.zeros(5), torch.zeros(80)
    for x, count in ((small, 1), (large, 2)):
        draws = {"mean": torch.randn(10, 1), "z": torch.randn(10, len(x))}
        assert len(refine(normal_levels, draws, x, num_steps=20).blocks) == count


def test_dependence_without_a_gradient_is_seen():
    def sign(x):
        side = pyro.sample("side", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal((side > 0).double() + (z > 0).double(), 0.6), obs=x)

    x = torch.tensor([2.0])
    n = 4000
    refined = refine(sign, {"side": torch.randn(n, 1), "z": torch.randn(n, 1)}, x, num_steps=120, joint=False)
    weights = torch.tensor([[0.0, 1.0], [1.0, 2.0]]).sub(2.0).div(0.6).square().div(-2).exp()
    both = float(weights[1, 1] / weights.sum())
    found = ((refined.draws["side"] > 0) & (refined.draws["z"] > 0)).double().mean()
    assert abs(float(found) - both) < 5 * math.sqrt(both * (1 - both) / n)


# Data of different scales, masks, scales


def test_every_datum_has_its_step_size():
    noise = torch.tensor([0.01, 1.0, 100.0])

    def model(x):
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(0.0, 10.0))
            pyro.sample("x", dist.Normal(z, noise), obs=x)

    x = torch.tensor([1.0, 2.0, 3.0])
    refined = refine(model, {"z": x + torch.randn(1000, 3)}, x, num_steps=200)
    assert float(refined.blocks[0].acceptance.min()) > 0.4
    precision = 0.01 + noise**-2
    z = (refined.draws["z"] - x * noise**-2 / precision) * precision.sqrt()
    for column in z.T:
        assert same_law(column, "norm") > LEVEL


def test_masked_latents_stay_and_masked_data_do_not_count():
    present = torch.tensor([True, False, True])

    def model(x):
        with pyro.plate("data", 3), poutine.mask(mask=present):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.tensor([2.0, torch.nan, -2.0])
    start = torch.randn(800, 3)
    refined = refine(model, {"z": start}, x, num_steps=100)
    assert torch.equal(refined.draws["z"][:, 1], start[:, 1])
    z = (refined.draws["z"] - torch.tensor([1.0, 0.0, -1.0])) * math.sqrt(2.0)
    assert same_law(z[:, [0, 2]], "norm") > LEVEL


def test_scale_multiplies_the_density_and_not_the_jacobian():
    def model(x):
        with pyro.plate("data", len(x)), poutine.scale(scale=3.0):
            z = pyro.sample("z", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Poisson(z), obs=x)

    x = torch.tensor([0.0, 4.0])
    refined = refine(model, {"z": torch.rand(1500, 2) + 1}, x, num_steps=150)
    for i in range(2):
        law = scipy.stats.gamma(3 * (1 + float(x[i])) + 1, scale=1 / 6)
        assert same_law(refined.draws["z"][:, i], law.cdf) > LEVEL


def test_missing_values_are_latents():
    present = torch.tensor([True, False])

    def model(x):
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x, obs_mask=present)

    x = torch.tensor([2.0, 0.0])
    draws = {"z": torch.zeros(1500, 2), "x_unobserved": torch.randn(1500, 2)}
    found = refine(model, draws, x, num_steps=200).draws
    assert same_law((found["z"][:, 0] - 1) * math.sqrt(2.0), "norm") > LEVEL
    assert same_law(found["z"][:, 1], "norm") > LEVEL
    assert same_law(found["x_unobserved"][:, 1] / math.sqrt(2.0), "norm") > LEVEL
    assert torch.equal(found["x_unobserved"][:, 0], draws["x_unobserved"][:, 0])


# Programs as they come


class Reshaping(nn.Module):
    """Keeps no room for chains."""

    def forward(self, z):
        return z.reshape(-1, 1) * torch.ones(2)


def stubborn(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(Reshaping()(z), 1.0).to_event(1), obs=x)


def test_globals_of_a_model_without_room_for_chains_come_in_predictives_shapes():
    """One dimension more than the model's own, which ``t()`` of a matrix product does not take."""
    features, y = torch.randn(6, 2), torch.randn(6)

    def line(y):
        weight = pyro.sample("weight", dist.Normal(torch.zeros(1, 2), 1.0).to_event(2))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal((features @ weight.t()).squeeze(-1), 1.0), obs=y)

    draws = {"weight": torch.randn(5, 1, 1, 2)}
    refined = refine(line, draws, y, num_steps=8, seed=0, parallel=False)
    assert refined.draws["weight"].shape == (5, 1, 1, 2) and not refined.parallel


def test_a_model_without_room_for_chains_runs_them_one_by_one():
    x = torch.tensor([[1.0, 2.0], [0.0, -3.0]])
    draws = {"z": torch.randn(60, 2)}
    with pytest.warns(UserWarning, match="one after the other"):
        warned = refine(stubborn, draws, x, num_steps=20, seed=0)
    silent = refine(stubborn, draws, x, num_steps=20, seed=0, parallel=False)
    assert not warned.parallel and torch.allclose(warned.draws["z"], silent.draws["z"])
    z = (silent.draws["z"] - x.sum(-1) / 3) * math.sqrt(3.0)
    assert same_law(z, "norm") > LEVEL
    with pytest.raises(ValueError, match=r"outer plate of 60 chains.*from the right"):
        refine(stubborn, draws, x, parallel=True)


def test_one_by_one_is_the_same_as_side_by_side():
    draws = {"mean": torch.randn(20, 1), "z": torch.randn(20, 3)}
    x = torch.tensor([1.0, 2.0, 3.0])
    both = [
        refine(normal_levels, draws, x, num_steps=12, seed=3, parallel=p, joint=False) for p in (True, False)
    ]
    for name in draws:
        assert torch.allclose(both[0].draws[name], both[1].draws[name])


def test_shapes_of_predictive_go_in_and_out_and_the_store_stays():
    def model(x):
        weight = pyro.param("weight", torch.tensor(2.0), constraint=dist.constraints.positive)
        mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("outer", 3, dim=-2):
            a = pyro.sample("a", dist.Normal(mean[..., 0], 1.0))
            with pyro.plate("data", 4, dim=-1):
                z = pyro.sample("z", dist.Normal(a.unsqueeze(-1), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(weight * z, 1.0).to_event(1), obs=x)

    x = torch.randn(3, 4, 1)
    before = None
    with torch.no_grad():
        prior = Predictive(poutine.uncondition(model), num_samples=12)(x)
        before = {name: value.clone() for name, value in pyro.get_param_store().items()}
        draws = {name: prior[name] for name in ("mean", "a", "z")}
        refined = refine(model, draws, x, num_steps=8, joint=False, seed=0)
    assert [b.plates for b in refined.blocks] == [(), ("outer",), ("outer", "data")]
    assert {n: v.shape for n, v in refined.draws.items()} == {n: v.shape for n, v in draws.items()}
    assert not any(value.requires_grad for value in refined.draws.values())
    again = refine(model, draws, x, num_steps=8, joint=False, seed=0)
    assert all(torch.equal(refined.draws[name], again.draws[name]) for name in draws)
    assert Predictive(model, posterior_samples=refined.draws)(x)["x"].shape == (12, 3, 4, 1)
    store = pyro.get_param_store()
    assert {n: v.item() for n, v in store.items()} == {n: v.item() for n, v in before.items()}
    assert all(value.grad is None for _, value in store.named_parameters())


def test_a_seed_leaves_the_global_random_state():
    draws = {"z": torch.randn(20, len(X))}
    state = torch.get_rng_state()
    refine(conjugate, draws, X, num_steps=8, seed=0)
    assert torch.equal(state, torch.get_rng_state())


def test_starts_on_the_boundary_are_replaced():
    x = torch.tensor([2.0, 5.0])
    start = torch.rand(500, 2) + 1
    start[:50, 0] = 0.0
    refined = refine(gamma_poisson, {"z": start}, x, num_steps=150)
    assert refined.restarted == 50 and "50 draws of zero density" in str(refined)
    assert same_law(refined.draws["z"][:, 0], scipy.stats.gamma(4, scale=0.5).cdf) > LEVEL


def test_poor_acceptance_warns_and_the_table_says_what_happened():
    draws = {"z": torch.randn(200, len(X))}
    with pytest.warns(UserWarning, match=r"'z'.*in 5 of 5 slices of \['data'\].*hardly moved"):
        poor = refine(conjugate, draws, X, num_steps=20, step_size=60.0)
    assert poor.acceptance < 0.12
    small = refine(conjugate, draws, X, num_steps=20, step_size=0.01)
    assert small.blocks[0].memory > 0.5 and "chains remember where they were" in str(small)
    text = str(refine(conjugate, draws, X, num_steps=40))
    assert text.startswith("mala, 200 chains of 40 steps, 41 gradient evaluations") and "accepted by" in text


def test_the_snippets_of_the_page_run():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    exec(compile("\n".join(blocks), str(PAGE), "exec"), {})
