"""Masks: padding, missing data, imputation, labels for some, sequences of unequal length, nothing left at all."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from pyro_sinkhorn import AutoImplicit, Implicit, SinkhornProgram, Trace_Sinkhorn
from pyro_sinkhorn.errors import NonFiniteError

N, D = 16, 3
PRESENT = torch.arange(N) % 4 != 0


def normal(mean=0.0):
    return dist.Normal(torch.zeros(N, D) + mean, 1.0).to_event(1)


def by_handler(x, present):
    with pyro.plate("data", N), poutine.mask(mask=present):
        z = pyro.sample("z", normal())
        pyro.sample("x", normal(z), obs=x)


def by_distribution(x, present):
    with pyro.plate("data", N):
        z = pyro.sample("z", normal().mask(present))
        pyro.sample("x", normal(z).mask(present), obs=x)


def of_data_alone(x, present):
    with pyro.plate("data", N):
        z = pyro.sample("z", normal())
        with poutine.mask(mask=present):
            pyro.sample("x", normal(z), obs=x)


def imputed(x, present):
    with pyro.plate("data", N):
        z = pyro.sample("z", normal())
        pyro.sample("x", normal(z), obs=x, obs_mask=present)


WAYS = [by_handler, by_distribution, of_data_alone, imputed]


@pytest.fixture(params=WAYS, ids=lambda way: way.__name__)
def way(request):
    return request.param


def gradients(model, *args):
    """Loss of a fresh automatic guide, and the gradients of all its parameters, from one seed."""
    pyro.clear_param_store()
    pyro.set_rng_seed(3)
    guide, loss = AutoImplicit(model), Trace_Sinkhorn(match_size=4)
    guide(*args)
    value = loss.loss_and_grads(model, guide, *args)
    return value, {name: parameter.grad for name, parameter in guide.named_parameters()}, guide


# What stands in masked places does not matter


def test_nan_in_masked_places_does_no_harm(way):
    x = torch.where(PRESENT[:, None], torch.randn(N, D), torch.nan)
    value, found, guide = gradients(way, x, PRESENT)
    assert math.isfinite(value)
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert max(float(gradient.abs().max()) for gradient in found.values()) > 0
    assert all(draw.isfinite().all() for draw in guide(x, PRESENT).values())


def test_the_encoder_is_told_what_is_missing_and_does_not_read_it(way):
    x = torch.randn(N, D)
    guide = AutoImplicit(way, noise_dim=0)
    before = guide(x, PRESENT)["z"]
    other = torch.where(PRESENT[:, None], x, 1e6)
    assert torch.equal(guide(other, PRESENT)["z"], before)
    assert guide.encoders[0].standardise.loc.shape == (D + 1,)
    now = PRESENT.clone()
    now[1] = False
    after = guide(x, now)["z"]
    assert not torch.equal(after[1], before[1])
    kept = torch.arange(N) != 1
    assert torch.equal(after[kept], before[kept])
    # Of rows with nothing in them the encoder says the same.
    assert torch.equal(before[0], before[4])


def test_missing_values_do_not_enter_the_standardisation():
    x = torch.randn(N, D)
    guide = AutoImplicit(of_data_alone)
    guide(torch.where(PRESENT[:, None], x, 1e6), PRESENT)
    loc = guide.encoders[0].standardise.loc[:D]
    assert torch.equal(loc, x[PRESENT].median(0).values)


def test_a_computed_mask_is_read_by_running_the_model():
    def model(x, lengths):
        with pyro.plate("data", N):
            z = pyro.sample("z", normal())
            with pyro.plate("time", D), poutine.mask(mask=torch.arange(D)[:, None] < lengths):
                pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    guide, x = AutoImplicit(model, noise_dim=0), torch.randn(D, N)
    lengths = torch.arange(N) % D + 1
    before = guide(x, lengths)["z"]
    assert torch.equal(guide(torch.where(torch.arange(D)[:, None] < lengths, x, 1e6), lengths)["z"], before)
    assert not torch.equal(guide(x, lengths.flip(0))["z"], before)


def test_an_encoder_of_the_users_gets_zeros_where_data_are_missing():
    class Spy(nn.Linear):
        def forward(self, x):
            self.seen = x
            return super().forward(x)

    spy, x = Spy(D, 2), torch.where(PRESENT[:, None], torch.randn(N, D), torch.nan)
    AutoImplicit(imputed, encoder=spy)(x, PRESENT)
    assert torch.equal(spy.seen, x.nan_to_num(0.0))


@pytest.mark.parametrize(
    ("likelihood", "value", "padding"),
    [
        (lambda z: dist.Gamma(z.exp(), 1.0), torch.rand(N) + 0.1, -1.0),
        (lambda z: dist.Poisson(z.exp()), torch.randint(0, 5, (N,)), -1),
        (lambda z: dist.Categorical(logits=torch.stack([z, -z], -1)), torch.randint(0, 2, (N,)), -1),
        (lambda z: dist.Beta(z.exp(), 1.0), torch.rand(N).clamp(0.1, 0.9), math.nan),
    ],
    ids=["gamma", "poisson", "categorical", "beta"],
)
@pytest.mark.parametrize("validate", [True, False])
def test_padding_may_lie_outside_the_support(likelihood, value, padding, validate):
    def model(x):
        with pyro.plate("data", N):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.mask(mask=PRESENT):
                pyro.sample("x", likelihood(z), obs=x)

    def guide(x):
        with pyro.plate("data", N):
            pyro.sample("z", dist.Delta(pyro.param("point", torch.zeros(N))))

    losses, found = [], []
    for x in (value, torch.where(PRESENT, value, torch.as_tensor(padding, dtype=value.dtype))):
        pyro.clear_param_store()
        with pyro.validation_enabled(validate):
            losses.append(Trace_Sinkhorn(prior_weight=0.0).loss_and_grads(model, guide, x))
        found.append(pyro.param("point").grad)
        assert AutoImplicit(model)(x)["z"].isfinite().all()
    assert losses[0] == pytest.approx(losses[1])
    assert torch.allclose(*found)
    assert (found[1][~PRESENT] == 0).all()


def test_nan_that_is_not_masked_is_reported(way):
    x = torch.randn(N, D)
    x[5] = torch.nan
    with pytest.raises(NonFiniteError, match=r"\(16, 3\).* in 1 rows \(first: 5"):
        gradients(way, x, PRESENT)


# Nothing left


def test_a_batch_that_is_masked_altogether(way):
    x, nothing = torch.full((N, D), torch.nan), torch.zeros(N, dtype=torch.bool)
    value, found, _ = gradients(way, x, nothing)
    assert math.isfinite(value)
    assert all(gradient is None or gradient.isfinite().all() for gradient in found.values())
    if way in (by_handler, by_distribution):  # the latents as well
        assert value == 0


def test_a_batch_in_which_nothing_is_missing(way):
    x = torch.randn(N, D)
    value, _, guide = gradients(way, x, torch.ones(N, dtype=torch.bool))
    assert math.isfinite(value)
    assert guide.encoders[0].standardise.loc.shape == (D + 1,)  # a later one may have gaps
    assert math.isfinite(Trace_Sinkhorn(match_size=4).loss(way, guide, x * torch.nan, ~PRESENT & False))


# Some sites of a group


def sequences(x, lengths):
    with pyro.plate("data", len(lengths)):
        z = torch.zeros(())
        for t in pyro.markov(range(3)):
            with poutine.mask(mask=t < lengths):
                z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
                pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[t])


LENGTHS = torch.arange(N) % 3 + 1


@pytest.mark.parametrize("lengths", [LENGTHS, LENGTHS.clamp(max=2)], ids=["some whole", "none whole"])
def test_what_a_mask_hides_of_a_sequence_does_not_count_and_the_rest_does(lengths, seeded):
    def guide(x, lengths, hidden=0.0, seen=0.0):
        for t in range(3):
            value = torch.where(t < lengths, x[t] + seen, hidden)
            pyro.sample(f"z_{t}", dist.Delta(value))

    x, loss = torch.randn(3, N), Trace_Sinkhorn(match_size=4)
    loss.loss(sequences, guide, x, lengths)
    value = seeded(loss.loss, sequences, guide, x, lengths)
    match = loss.terms.match["z_0, z_1, z_2"]
    assert match != 0
    for hidden in (1e3, -7.0):
        changed = seeded(loss.loss, sequences, lambda *args, h=hidden: guide(*args, h), x, lengths)
        assert changed == pytest.approx(value)
    assert seeded(loss.loss, sequences, lambda *args: guide(*args, 0.0, 0.1), x, lengths) != pytest.approx(
        value
    )
    # Every sequence is one datum of the match, however short.
    likelihood = sum(float(dist.Normal(x[t], 1.0).log_prob(x[t])[t < lengths].sum()) for t in range(3))
    assert value == pytest.approx(-likelihood + 10 * N * match)


def test_slots_of_a_datum_that_are_masked_do_not_count(seeded):
    present = torch.arange(D)[:, None] < LENGTHS

    def model(x):
        data = pyro.plate("data", N, dim=-1)
        with data, pyro.plate("places", D, dim=-2), poutine.mask(mask=present):
            slots = pyro.sample("slots", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with data:
            pyro.sample("x", normal((slots * present.unsqueeze(-1)).sum((0, -1)).unsqueeze(-1)), obs=x)

    def guide(x, hidden):
        value = torch.where(present, x.T, hidden).unsqueeze(-1).expand(D, N, 2)
        with pyro.plate("data", N, dim=-1), pyro.plate("places", D, dim=-2):
            pyro.sample("slots", dist.Delta(value, event_dim=1))

    x, loss = torch.randn(N, D), Trace_Sinkhorn(match_size=4)
    values = [seeded(loss.loss, model, lambda x, h=h: guide(x, h), x) for h in (0.0, 0.0, 50.0)]
    assert values[2] == pytest.approx(values[1])


# Imputation and labels


@pytest.mark.filterwarnings("ignore::pyro_sinkhorn.ot.ConvergenceWarning")
def test_missing_entries_are_imputed_from_the_ones_that_are_there(fit):
    """Two measurements of one latent; the second is missing for some."""
    n = 128
    present = torch.stack([torch.ones(n, dtype=torch.bool), torch.rand(n) < 0.7])
    truth = torch.randn(n) + 0.3 * torch.randn(2, n)

    def model(x, present):
        with pyro.plate("data", x.shape[-1]):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("measurements", 2):
                pyro.sample("x", dist.Normal(z, 0.3), obs=x, obs_mask=present)

    x = torch.where(present, truth, torch.nan)
    guide = AutoImplicit(model, hidden=32)
    fit(model, x, present, guide=guide, steps=100, lr=3e-2, match_size=16)
    with torch.no_grad():
        drawn = torch.stack([guide(x, present)["x_unobserved"] for _ in range(20)])[:, ~present]
    assert torch.corrcoef(torch.stack([drawn.mean(0), truth[~present]]))[0, 1] > 0.8


def labelled_if_known(x, y, known):
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Normal(0.0, 1.0), obs=y, obs_mask=known)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(torch.stack([y + 0.1 * z, y - z], -1), 0.1).to_event(1), obs=x)


def test_labels_that_are_known_for_some_through_a_program():
    n = 120
    y, z = torch.randn(2, n)
    x = torch.stack([y + 0.1 * z, y - z], -1) + 0.1 * torch.randn(n, 2)
    known = torch.arange(n) % 3 == 0
    given = torch.where(known, y, torch.nan)
    program = SinkhornProgram(labelled_if_known, loss=Trace_Sinkhorn(match_size=16))
    program.fit(x, given, known, num_steps=100, batch_size=60, lr=2e-2, seed=0, progress=False)
    encoded = program.encode(x, given, known, num_samples=5)
    found = encoded["y_unobserved"].mean(0)[~known]
    assert torch.corrcoef(torch.stack([found, y[~known]]))[0, 1] > 0.8
    assert program.generate(4, x[:6], given[:6], known[:6])["x"].shape == (4, 6, 2)


def test_calls_with_and_without_labels_with_a_guide_by_hand(step):
    def model(x, y=None):
        with pyro.plate("data", N):
            y = pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)
            z = pyro.sample("z", dist.Normal(y, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, y=None):
        with pyro.plate("data", N):
            if y is None:
                y = pyro.sample("y", dist.Normal(pyro.param("slope", torch.ones(())) * x, 0.1))
            pyro.sample("z", dist.Normal((x + y) / 2, pyro.param("spread", torch.tensor(0.5))))

    x, y = torch.randn(2, N)
    assert step(model, guide, x).match.keys() == {"y, z"}
    assert step(model, guide, x, y).match.keys() == {"z"}


def test_a_mask_inside_the_event_is_one_of_the_whole_event():
    """As Pyro's deep Markov model writes it: ``.mask(m).to_event(1)`` with a mask of shape (n, 1)."""

    def model(x, present, inside):
        mask = present.unsqueeze(-1)
        with pyro.plate("data", len(x)):
            prior, noise = dist.Normal(torch.zeros(3), 1.0).expand([len(x), 3]), 0.5
            z = pyro.sample("z", prior.mask(mask).to_event(1) if inside else prior.to_event(1).mask(present))
            seen = dist.Normal(z, noise)
            pyro.sample("x", seen.mask(mask).to_event(1) if inside else seen.to_event(1).mask(present), obs=x)

    def guide(x, present, inside):
        with pyro.plate("data", len(x)):
            pyro.sample("z", Implicit(x / 2, event_dim=1))

    x, present = torch.randn(16, 3), torch.arange(16) < 12
    losses = []
    for inside in (False, True):
        pyro.set_rng_seed(0)
        losses.append(Trace_Sinkhorn(match_size=4).loss(model, guide, x, present, inside))
        AutoImplicit(model)(x, present, inside)
    assert losses[0] == pytest.approx(losses[1])
