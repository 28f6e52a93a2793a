"""What discrete latents cannot be: each is refused by name, with the way out."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_sinkhorn import AutoImplicit, Implicit, TraceEnum_Sinkhorn
from pyro_sinkhorn.errors import NonFiniteError, ProgramError

LOCS = torch.tensor([-3.0, 0.0, 3.0], dtype=torch.float64)
PROBS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


def mixture(x):
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(PROBS.to(x)))
        pyro.sample("x", dist.Normal(LOCS.to(x)[k], 0.3), obs=x)


def test_too_many_states():
    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(40) / 40))
            m = pyro.sample("m", dist.Categorical(torch.ones(40) / 40))
            pyro.sample("x", dist.Normal((k + m).to(x), 1.0), obs=x)

    guide = AutoImplicit(model)
    message = r"the discrete latents k \(40\) x m \(40\) have 1600 joint states, more than max_states=1024"
    with pytest.raises(ProgramError, match=message):
        TraceEnum_Sinkhorn(match_size=8).loss(model, guide, torch.randn(16))
    assert math.isfinite(
        TraceEnum_Sinkhorn(match_size=8, max_states=1600).loss(model, guide, torch.randn(16))
    )


def test_states_that_no_table_holds():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.full((30,), 0.5)).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    with pytest.raises(ProgramError, match=r"'z' of event shape \(30,\) has 2 \*\* 30 joint states"):
        TraceEnum_Sinkhorn(match_size=8).loss(model, AutoImplicit(model), torch.randn(16))


def test_a_discrete_plate_inside_a_datum():
    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            with pyro.plate("factors", 3, dim=-1):
                s = pyro.sample("s", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(s.sum(-1, keepdim=True), 1.0), obs=x.unsqueeze(-1))

    with pytest.raises(ProgramError, match=r"discrete latent 's' is in the plates \['factors'\]"):
        TraceEnum_Sinkhorn(match_size=8).loss(model, AutoImplicit(model), torch.randn(16))


def test_a_likelihood_across_a_discrete_plate():
    """x depends on the states of all words of its document at once, which enumeration word by word cannot express."""

    def model(x, y):
        docs = pyro.plate("docs", len(x), dim=-2)
        words = pyro.plate("words", y.shape[1], dim=-1)
        with docs, words:
            k = pyro.sample("k", dist.Bernoulli(0.5))
            pyro.sample("y", dist.Normal(k, 1.0), obs=y)
        with docs:
            pyro.sample("x", dist.Normal(k.sum(-1, keepdim=True), 1.0), obs=x.unsqueeze(-1))

    message = (
        r"site 'x' is in the plates \['docs'\] and depends on the states of 'k', which is in \['words'\] too"
    )
    with pytest.raises(ProgramError, match=message):
        TraceEnum_Sinkhorn(match_size=8).loss(model, AutoImplicit(model), torch.randn(16), torch.randn(16, 3))


def test_a_discrete_global():
    def model(x):
        k = pyro.sample("k", dist.Categorical(torch.ones(3) / 3))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(k.to(x), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("k", dist.Categorical(torch.ones(3) / 3))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    with pytest.raises(ProgramError, match="global latent 'k' is discrete"):
        TraceEnum_Sinkhorn(match_size=8).loss(model, guide, torch.randn(16))


def test_markov_chains_of_states_share_a_dimension():
    def model(x):
        with pyro.plate("data", len(x)):
            k = torch.zeros((), dtype=torch.long)
            for t in pyro.markov(range(4)):
                k = pyro.sample(f"k_{t}", dist.Categorical(torch.ones(2, 2)[k] / 2))
                pyro.sample(f"x_{t}", dist.Normal(k.to(x), 1.0), obs=x[:, t])

    def guide(x):
        with pyro.plate("data", len(x)):
            for t in pyro.markov(range(4)):
                pyro.sample(f"k_{t}", dist.Categorical(torch.ones(2) / 2))

    with pytest.raises(ProgramError, match="share one enumeration dimension"):
        TraceEnum_Sinkhorn(match_size=8).loss(model, guide, torch.randn(16, 4))
    # AutoImplicit has no markov context: a short chain is enumerated whole.
    assert math.isfinite(
        TraceEnum_Sinkhorn(match_size=8).loss(model, AutoImplicit(model), torch.randn(16, 4))
    )


@pytest.mark.parametrize(
    ("infer", "message"),
    [
        ({"enumerate": "sequential"}, "guide site 'k' asks to be enumerated sequentially"),
        ({"enumerate": "parallel", "num_samples": 5}, "num_samples=5"),
    ],
)
def test_other_ways_to_enumerate(infer, message):
    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(PROBS))
            pyro.sample("x", dist.Normal(LOCS[k], 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Categorical(PROBS), infer=infer)

    with pytest.raises(ProgramError, match=message):
        TraceEnum_Sinkhorn(match_size=8).loss(model, guide, torch.randn(16))


def test_options_are_checked():
    with pytest.raises(ValueError, match="max_states is 0"):
        TraceEnum_Sinkhorn(max_states=0)
    with pytest.raises(ProgramError, match="discrete is 'gumbel'"):
        AutoImplicit(mixture, discrete="gumbel")
    with pytest.raises(ProgramError, match="temperature is 0"):
        AutoImplicit(mixture, temperature=0)


@pytest.mark.filterwarnings("ignore:.*gives halves of:UserWarning")
def test_a_decoder_that_takes_no_further_dimensions():
    net = torch.nn.Conv2d(1, 2, 3, padding=1)

    def model(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(PROBS))
            image = LOCS[k].reshape(*k.shape, 1, 1, 1).expand(*k.shape, 1, 4, 4)
            pyro.sample("x", dist.Normal(net(image), 1.0).to_event(3), obs=x)

    message = (
        r"failed while it ran on all states of 'k' \(3 states\) at once: Expected 3D .* flattened into one"
    )
    with pytest.raises(ProgramError, match=message):
        TraceEnum_Sinkhorn(match_size=8).loss(model, AutoImplicit(model), torch.randn(16, 2, 4, 4))


def test_a_guide_whose_states_are_outside_the_plate():
    def guide(x):
        k = pyro.sample("k", dist.Categorical(PROBS))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(LOCS[k], 1.0))

    with pytest.raises(ProgramError, match=r"guide site 'k' is in none of the plates \['data'\]"):
        TraceEnum_Sinkhorn(match_size=8).loss(mixture, guide, torch.randn(16))


def test_an_implicit_guide_of_a_label():
    """It claims a gradient that integers cannot pass."""

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("k", Implicit((x > 0).long()))

    with pytest.raises(
        ProgramError, match="guide site 'k' is a Implicit, a discrete latent, whose values pass no gradient"
    ):
        TraceEnum_Sinkhorn(match_size=4).loss(mixture, guide, torch.randn(16))


def test_data_that_a_state_rules_out():
    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(PROBS))
            pyro.sample("x", dist.Uniform(-1.0, 1.0 + k, validate_args=False), obs=x)

    message = (
        r"site 'x': the data are impossible in 32 of the 48 states of \['k'\].*a little noise in every state"
    )
    with pytest.raises(NonFiniteError, match=message):
        TraceEnum_Sinkhorn(match_size=4).loss(model, AutoImplicit(model), torch.full((16,), 2.5))


@pytest.mark.parametrize("fresh", [True, False])
def test_nan_in_the_data(fresh):
    """Before the loss knows the plates, and after."""
    x = torch.randn(16)
    guide, loss = AutoImplicit(mixture), TraceEnum_Sinkhorn(match_size=4)
    guide(x)
    if not fresh:
        loss.loss(mixture, guide, x)
    x = torch.where(torch.arange(16) == 3, torch.nan, x)
    with pytest.raises(NonFiniteError, match=r"(argument 0|observed site 'x').* 1 rows \(first: 3"):
        loss.loss(mixture, guide, x)


def test_a_diverged_encoder():
    guide, loss = AutoImplicit(mixture), TraceEnum_Sinkhorn(match_size=4, max_plate_nesting=1)
    guide(torch.randn(16))
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.fill_(torch.nan)
    with pytest.raises(
        NonFiniteError, match="guide site 'k': the probabilities of its 3 states are NaN.*encoder"
    ):
        loss.loss(mixture, guide, torch.randn(16))
