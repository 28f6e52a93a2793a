"""Topic models: what they declare, the densities of counts, thinning, and that topics are found in counts made of them."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO

from pyro_sinkhorn import AutoImplicit, SinkhornProgram, Trace_Sinkhorn
from pyro_sinkhorn.models import (
    BagOfWords,
    SoftmaxNormalGuide,
    TopicDecoder,
    TopicEncoder,
    prod_lda,
    prod_lda_normal,
)

TOPICS, WORDS = 3, 12


def counts(n=40, seed=0):
    """Documents of 30 words, from three topics with four words each; some of one topic, some mixed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        theta = dist.Dirichlet(torch.full((TOPICS,), 0.3)).sample((n,))
        topics = torch.eye(TOPICS).repeat_interleave(WORDS // TOPICS, 1) / (WORDS // TOPICS)
        return dist.Multinomial(30, theta @ topics).sample()


def program(batch=None, **options):
    torch.manual_seed(0)
    encoder = TopicEncoder(WORDS, width=32)
    guide = functools.partial(AutoImplicit, encoder=encoder)
    loss = Trace_Sinkhorn(prior_weight=30.0, match_size=8 if batch is None else batch // 2)
    return SinkhornProgram(prod_lda(TOPICS, WORDS, 0.3, **options), guide, loss)


# What they declare.


def test_a_dirichlet_of_the_given_concentration_in_one_plate():
    trace = poutine.trace(prod_lda(TOPICS, WORDS, 0.3)).get_trace(counts(5))
    theta = trace.nodes["theta"]
    assert isinstance(theta["fn"], dist.Dirichlet) and theta["fn"].concentration.unique().tolist() == [0.3]
    assert theta["value"].shape == (5, TOPICS) and trace.observation_nodes == ["x"]
    assert all([f.name for f in trace.nodes[n]["cond_indep_stack"]] == ["documents"] for n in ("theta", "x"))
    assert {name.split("$$$")[0] for name in trace.param_nodes} == {"decoder"}


def test_the_stand_in_has_the_spread_of_the_laplace_approximation():
    trace = poutine.trace(prod_lda_normal(TOPICS, WORDS)).get_trace(counts(5))
    assert trace.nodes["h"]["fn"].base_dist.scale.unique().tolist() == [1.0]
    # Srivastava and Sutton 2017: (1 - 2/K)/alpha + (1/K^2) sum_k 1/alpha, for equal alphas.
    expected = (1 - 2 / TOPICS) / 0.3 + TOPICS / TOPICS**2 / 0.3
    trace = poutine.trace(prod_lda_normal(TOPICS, WORDS, 0.3)).get_trace(counts(5))
    assert trace.nodes["h"]["fn"].base_dist.variance.allclose(torch.tensor(expected))


# Words given shares.


def test_bag_of_words_is_the_multinomial_without_its_coefficient():
    x, logits = counts(6), torch.randn(6, WORDS)
    coefficient = torch.lgamma(x.sum(-1) + 1) - torch.lgamma(x + 1).sum(-1)
    full = dist.Multinomial(30, logits=logits).log_prob(x)
    assert BagOfWords(30, logits=logits).log_prob(x).allclose(full - coefficient)
    assert BagOfWords(30, logits=logits).sample().sum(-1).unique().tolist() == [30.0]
    with pytest.raises(ValueError, match="support"):
        BagOfWords(30, logits=logits).log_prob(-x)


def test_documents_of_unequal_length_are_scored_by_their_own_words():
    x = torch.cat([counts(3), counts(3)[:, :] * 2])
    model = prod_lda(TOPICS, WORDS, 0.3)
    with pyro.condition(data={"theta": torch.full((6, TOPICS), 1 / TOPICS)}):
        trace = poutine.trace(model).get_trace(x)
    trace.compute_log_prob()
    logits = trace.nodes["x"]["fn"].logits
    assert trace.nodes["x"]["log_prob"].allclose((x * logits).sum(-1))


@pytest.mark.parametrize("kind", ["product", "mixture"])
def test_decoders_against_their_formulas(kind):
    decoder = TopicDecoder(TOPICS, WORDS, kind, dropout=0.0)
    with torch.no_grad():
        decoder.offset.normal_()
    theta = dist.Dirichlet(torch.ones(TOPICS)).sample((50,))
    for _ in range(3):
        decoder(theta)  # running moments
    decoder.eval()

    def norm(raw):
        scale = (decoder.norm.running_var + decoder.norm.eps).sqrt()
        return (raw - decoder.norm.running_mean) / scale + decoder.offset

    if kind == "product":
        expected = norm(theta @ decoder.topics).softmax(-1)
    else:
        expected = theta @ norm(decoder.topics).softmax(-1)  # but for one millionth of every share
    assert decoder(theta).exp().allclose(expected, atol=1e-5)
    stacked = theta.reshape(5, 10, TOPICS)
    assert decoder(stacked).reshape(50, WORDS).allclose(decoder(theta))


@pytest.mark.parametrize("kind", ["product", "mixture"])
def test_probabilities_sum_to_one_also_where_dropout_took_shares(kind):
    decoder = TopicDecoder(TOPICS, WORDS, kind, dropout=0.7).train()
    theta = dist.Dirichlet(torch.ones(TOPICS)).sample((200,))  # of 200 rows about 70 lose all three
    total = decoder(theta).exp().sum(-1)
    assert total.allclose(torch.ones(200))


def test_an_unknown_decoder_is_refused():
    with pytest.raises(ValueError, match="'product' or 'mixture'"):
        TopicDecoder(TOPICS, WORDS, "sum")


# What the encoder reads.


def test_thinning_leaves_out_words_in_training_only():
    encoder = TopicEncoder(WORDS, thinning=0.7)
    encoder.layers = torch.nn.Identity()
    x = counts(2000)
    assert encoder.eval()(x).equal(x.log1p())
    kept = encoder.train()(x).expm1().round()
    assert bool((kept <= x).all()) and bool((kept >= 0).all())
    total = x.sum()
    z = (kept.sum() - 0.3 * total) / (total * 0.3 * 0.7).sqrt()
    assert abs(z) < 5  # p = 6e-7


# As programs.


def test_every_parameter_learns_and_the_program_encodes_generates_saves(tmp_path):
    x = counts()
    mine = program()
    before = {name: p.detach().clone() for name, p in mine.modules["decoder"].named_parameters()}
    mine.fit(x, num_steps=3, batch_size=16, seed=0, progress=False)
    after = dict(mine.modules["decoder"].named_parameters())
    assert all(not before[name].equal(after[name]) for name in before)
    theta = mine.encode(x, num_samples=2, seed=1)["theta"]
    assert theta.shape == (2, 40, TOPICS) and theta.sum(-1).allclose(torch.ones(2, 40))
    drawn = mine.generate(4, x, seed=2)
    assert drawn["x"].shape == (4, 40, WORDS) and drawn["x"].sum(-1).unique().tolist() == [30.0]
    mine.save(tmp_path / "topics.pt")
    guide = functools.partial(AutoImplicit, encoder=TopicEncoder(WORDS, width=32))
    again = SinkhornProgram.load(tmp_path / "topics.pt", prod_lda(TOPICS, WORDS, 0.3), guide)
    assert again.encode(x, num_samples=2, seed=1)["theta"].equal(theta)


def found_topics(decoder):
    """Words of each topic, as sets."""
    top = decoder.topics.topk(WORDS // TOPICS).indices
    return {frozenset(row.tolist()) for row in top}


TRUE_TOPICS = {frozenset(range(4 * k, 4 * k + 4)) for k in range(TOPICS)}


def test_the_topics_that_made_the_counts_are_found():
    mine = program(batch=64)
    optim = pyro.optim.Adam({"lr": 0.03})
    mine.fit(counts(512), num_steps=100, batch_size=64, optim=optim, seed=0, progress=False)
    assert found_topics(mine.modules["decoder"]) == TRUE_TOPICS
    assert mine.history.reconstruction[-1] < mine.history.reconstruction[0]


def test_the_stand_in_finds_them_under_an_elbo():
    torch.manual_seed(0)
    model = prod_lda_normal(TOPICS, WORDS)
    guide = SoftmaxNormalGuide(TopicEncoder(WORDS, width=32), TOPICS, width=32)
    mine = SinkhornProgram(model, guide, TraceMeanField_ELBO())
    optim = pyro.optim.Adam({"lr": 0.03})
    mine.fit(counts(512), num_steps=100, batch_size=64, optim=optim, seed=0, progress=False)
    assert found_topics(mine.modules["decoder"]) == TRUE_TOPICS
