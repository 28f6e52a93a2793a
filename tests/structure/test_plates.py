"""Plates: nested, sub-sampled at every level, several beside each other, sequential, and too small to split."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_sinkhorn import AutoImplicit, SinkhornProgram, Trace_Sinkhorn
from pyro_sinkhorn.errors import ProgramError

DOCUMENTS, WORDS = 24, 6


def library(x, documents=None, words=None):
    """Latents at both levels and one above; sub-sampled at both levels if sizes are given."""
    level = pyro.sample("level", dist.Normal(0.0, 1.0))
    with pyro.plate("documents", DOCUMENTS, subsample_size=documents) as i:
        z = pyro.sample("z", dist.Normal(level, 1.0))
        with pyro.plate("words", WORDS, subsample_size=words) as j:
            w = pyro.sample("w", dist.Normal(z, 0.5))
            pyro.sample("x", dist.Normal(w, 0.5), obs=x[j][:, i])


def words():
    return torch.randn(WORDS, DOCUMENTS)


# Sub-sampling at every level


def fixed_guide(x, documents=None, words=None):
    """Latents that are a function of their data, of the wrong law."""
    pyro.sample("level", dist.Delta(torch.zeros(())))
    with pyro.plate("documents", DOCUMENTS, subsample_size=documents) as i:
        pyro.sample("z", dist.Delta(2 * x[0, i]))
        with pyro.plate("words", WORDS, subsample_size=words) as j:
            pyro.sample("w", dist.Delta(0.5 * x[j][:, i]))


def test_the_likelihood_is_unbiased_when_both_plates_are_sub_sampled(too_far):
    x, loss = words(), Trace_Sinkhorn(prior_weight=0.0)
    exact = loss.loss(library, fixed_guide, x)
    for sizes in ((4, 2), (8, 3)):
        values = torch.tensor([loss.loss(library, fixed_guide, x, *sizes) for _ in range(200)])
        assert abs(values.mean() - exact) < too_far * values.std() / math.sqrt(200)
        assert values.std() > 0


def test_the_match_at_fixed_size_does_not_depend_on_the_number_of_documents(too_far):
    x, values = words(), {}
    for documents in (8, 24):
        loss = Trace_Sinkhorn(prior_weight=1.0, match_size=4)
        columns = []
        for _ in range(80):
            loss.loss(library, fixed_guide, x, documents, 3)
            columns.append([loss.terms.match["z"], loss.terms.match["w"]])
        values[documents] = torch.tensor(columns)
    few, many = values[8], values[24]
    difference = few.mean(0) - many.mean(0)
    assert bool((difference.abs() < too_far * ((few.var(0) + many.var(0)) / 80).sqrt()).all())
    assert bool((many.mean(0) > 0.1).all())  # there is something to see


def test_the_automatic_guide_reads_the_sub_sample_of_both_plates(fit):
    x = words()
    guide = fit(library, x, 8, 3)
    for _ in range(3):
        trace = poutine.trace(guide).get_trace(x, 8, 3)
        scored = poutine.trace(poutine.replay(library, trace=trace)).get_trace(x, 8, 3)
        assert torch.equal(guide.last_inputs["x"], scored.nodes["x"]["value"])
        assert trace.nodes["z"]["value"].shape == (8,)
        assert trace.nodes["w"]["value"].shape == (3, 8)


# Minibatches


def test_the_last_smaller_batch_of_nested_plates():
    def model(x):
        with pyro.plate("documents", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("words", x.shape[-1], dim=-1):
                w = pyro.sample("w", dist.Normal(z, 0.5))
                pyro.sample("x", dist.Normal(w, 0.5), obs=x)

    x = torch.randn(22, 3)
    program = SinkhornProgram(model, loss=Trace_Sinkhorn(match_size=2))
    program.fit(x, num_steps=6, batch_size=8, seed=0, progress=False)  # batches of 8, 8 and 6
    assert program.encode(x)["w"].shape == (1, 22, 3)
    assert program.encode(x[:5])["z"].shape == (1, 5, 1)


# Two data sets


def two_sets(x, y):
    shared = pyro.sample("shared", dist.Normal(0.0, 1.0))
    with pyro.plate("one", len(x)):
        z = pyro.sample("z", dist.Normal(shared, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)
    with pyro.plate("two", len(y)):
        w = pyro.sample("w", dist.Gamma(2.0, 1.0))
        pyro.sample("y", dist.Normal(w + shared, 0.5), obs=y)


def test_the_latents_of_each_data_set_come_from_its_own_data(step):
    x, y = torch.randn(12), torch.randn(9)
    guide = AutoImplicit(two_sets, noise_dim=0, global_guide="delta")
    terms = step(two_sets, guide, x, y)
    assert terms.match.keys() == {"z", "w"}
    before, after = guide(x, y), guide(x, y + 1)
    assert torch.equal(before["z"], after["z"])
    assert not torch.equal(before["w"], after["w"])


def test_each_match_is_multiplied_by_its_own_number_of_data():
    x, y = torch.randn(12), torch.randn(9)

    def guide(x, y):
        pyro.sample("shared", dist.Delta(torch.zeros(())))
        pyro.sample("z", dist.Delta(x))
        pyro.sample("w", dist.Delta(y.exp()))

    loss = Trace_Sinkhorn(prior_weight=3.0, match_size=4)
    value = loss.loss(two_sets, guide, x, y)
    likelihood = dist.Normal(x, 0.5).log_prob(x).sum() + dist.Normal(y.exp(), 0.5).log_prob(y).sum()
    prior = dist.Normal(0.0, 1.0).log_prob(torch.zeros(()))
    match = 3 * (12 * loss.terms.match["z"] + 9 * loss.terms.match["w"])
    assert value == pytest.approx(float(-likelihood - prior) + match)


# Sequential plates


def test_a_sequential_plate_around_vectorised_data_is_several_sites(fit, seeded):
    def looped(x):
        data = pyro.plate("data", len(x))
        for i in pyro.plate("views", 2):
            with data:
                z = pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))
                pyro.sample(f"x_{i}", dist.Normal(z, 0.5), obs=x[:, i])

    def unrolled(x):
        with pyro.plate("data", len(x)):
            for i in range(2):
                z = pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))
                pyro.sample(f"x_{i}", dist.Normal(z, 0.5), obs=x[:, i])

    def guide(x):
        for i in range(2):
            pyro.sample(f"z_{i}", dist.Delta(x[:, i]))

    x = torch.randn(12, 2)
    losses = [seeded(Trace_Sinkhorn(match_size=4).loss, model, guide, x) for model in (looped, unrolled)]
    assert losses[0] == pytest.approx(losses[1])
    assert fit(looped, x)(x).keys() == {"z_0", "z_1"}


def test_a_sequential_plate_alone_is_refused():
    def model(x):
        for i in pyro.plate("data", len(x)):
            z = pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))
            pyro.sample(f"x_{i}", dist.Normal(z, 1.0), obs=x[i])

    with pytest.raises(
        ProgramError,
        match=r"'x_0' is in the sequential plate 'data'.*may stand around or inside a vectorised",
    ):
        AutoImplicit(model)(torch.randn(5))


# Too few units


@pytest.mark.parametrize("mask", [False, True], ids=["one document", "one left by the mask"])
def test_many_words_of_one_document_are_one_unit(mask):
    n = 5 if mask else 1

    def model(x):
        with pyro.plate("documents", n), poutine.mask(mask=torch.arange(n) == 0):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("words", 20):
                w = pyro.sample("w", dist.Normal(z, 0.5))
                pyro.sample("x", dist.Normal(w, 0.5), obs=x)

    with pytest.raises(ProgramError, match=r"latent group \(z\): a batch of 1 cannot be split"):
        Trace_Sinkhorn(match_size=4).loss(model, AutoImplicit(model), torch.randn(20, n))
