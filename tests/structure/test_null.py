"""The match of a guide that is the prior is zero on average, whatever the structure; and wrong guides are seen.

Each guide draws from the prior by a route of its own: a run of the model with its data hidden, under the guide's plates.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

N = 8
COVARIATE = torch.linspace(-2, 2, N, dtype=torch.float64)
WEIGHTS = torch.tensor([1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 5.0, 5.0], dtype=torch.float64)
LENGTHS = torch.tensor([1, 1, 1, 2, 2, 4, 4, 4])
LABELLED = torch.arange(N) % 2 == 0
LABELS = torch.linspace(-3, 3, N, dtype=torch.float64)


def observe(name="x", n=N):
    """Tells nothing of the latents: what remains is the match."""
    pyro.sample(name, dist.Normal(0.0, 1.0), obs=torch.zeros(n))


def unequal_lengths():
    with pyro.plate("documents", N):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("words", 4), poutine.mask(mask=torch.arange(4)[:, None] < LENGTHS):
            pyro.sample("w", dist.Normal(z, 0.3))
            observe()


def two_data_plates():
    with pyro.plate("one", N):
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        observe()
    with pyro.plate("two", 10):
        pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        observe("y", 10)


def covariate_prior():
    with pyro.plate("data", N):
        z1 = pyro.sample("z1", dist.Normal(3 * COVARIATE, 0.1))
        pyro.sample("z2", dist.LogNormal(z1, 0.3 + COVARIATE.abs()))
        observe()


def weighted():
    with pyro.plate("data", N), poutine.scale(scale=WEIGHTS):
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        observe()


def weighted_covariates():
    with poutine.scale(scale=WEIGHTS):
        covariate_prior()


def chain(n=N):
    with pyro.plate("data", n):
        z1 = pyro.sample("z1", dist.Normal(0.0, 1.0))
        z2 = pyro.sample("z2", dist.Normal(z1, 0.2))
        pyro.sample("z3", dist.LogNormal(z2, 0.2))
        observe(n=n)


def carried_covariates():
    """The words' own prior does not vary with the covariate, but that of the document they carry along does."""
    with pyro.plate("documents", N):
        z = pyro.sample("z", dist.Normal(3 * COVARIATE, 0.1))
        with pyro.plate("words", 3):
            pyro.sample("w", dist.Normal(z, 1.0))
            observe()


def three_levels():
    shift = pyro.sample("shift", dist.Normal(0.0, 5.0))
    with pyro.plate("shelves", N, dim=-1):
        a = pyro.sample("a", dist.Normal(shift, 1.0))
        with pyro.plate("books", 3, dim=-2):
            b = pyro.sample("b", dist.Normal(a, 0.3))
            with pyro.plate("words", 2, dim=-3):
                pyro.sample("c", dist.Normal(b, 0.3))
                observe()


def sub_sampled_at_both_levels():
    with pyro.plate("documents", 3 * N, subsample_size=N) as index:
        z = pyro.sample("z", dist.Normal(COVARIATE.repeat(3)[index], 0.1))
        with pyro.plate("words", 9, subsample_size=3):
            pyro.sample("w", dist.Normal(z, 1.0))
            observe()


def unequal_sequences():
    with pyro.plate("data", N):
        z = torch.zeros(())
        for t in pyro.markov(range(4)):
            with poutine.mask(mask=t < LENGTHS):
                z = pyro.sample(f"z{t}", dist.Normal(z, 0.5))
                observe(f"x{t}")


def some_labels():
    with pyro.plate("data", N):
        y = pyro.sample("y", dist.Normal(0.0, 1.0), obs=LABELS, obs_mask=LABELLED)
        pyro.sample("z", dist.Normal(y, 0.5))
        observe()


def unequal_slots():
    data = pyro.plate("data", N, dim=-1)
    with (
        data,
        pyro.plate("slots", 4, dim=-2),
        poutine.mask(mask=torch.arange(4)[:, None] < LENGTHS),
    ):
        pyro.sample("part", dist.Dirichlet(torch.ones(3)))
    with data:
        observe()


def globals_above():
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    with pyro.plate("groups", 2):
        group = pyro.sample("group", dist.Normal(mean, 2.0))
    with pyro.plate("data", N):
        pyro.sample("z", dist.Normal(group[..., torch.arange(N) % 2], 0.5))
        observe()


PROGRAMS = [
    unequal_lengths,
    two_data_plates,
    covariate_prior,
    weighted,
    weighted_covariates,
    chain,
    carried_covariates,
    three_levels,
    sub_sampled_at_both_levels,
    unequal_sequences,
    some_labels,
    unequal_slots,
    globals_above,
]


@pytest.mark.parametrize("model", PROGRAMS, ids=lambda model: model.__name__)
def test_the_match_of_a_guide_that_is_the_prior_is_zero_on_average(model, prior_as_guide, z_scores, too_far):
    scores = z_scores(model, prior_as_guide(model))
    assert scores
    for group, score in scores.items():
        assert abs(score) < too_far, group


@pytest.mark.parametrize("model", [chain, carried_covariates, some_labels], ids=lambda model: model.__name__)
def test_it_is_without_vectorised_particles(model, prior_as_guide, z_scores, too_far):
    for group, score in z_scores(model, prior_as_guide(model), n=100, particles=1).items():
        assert abs(score) < too_far, group


# And what is wrong is seen, also where only some slices or some sites of a group count.


def wrong_document():
    """The words of another document."""
    with pyro.plate("documents", N):
        pyro.sample("z", dist.Normal(3 * COVARIATE, 0.1))
        other = pyro.sample("other", dist.Normal(3 * COVARIATE.flip(0), 0.1), infer={"is_auxiliary": True})
        with pyro.plate("words", 3):
            pyro.sample("w", dist.Normal(other, 1.0))


def wrong_in_short_sequences():
    with pyro.plate("data", N):
        z = torch.zeros(())
        for t in range(4):
            z = pyro.sample(f"z{t}", dist.Normal(z + 2.0 * (LENGTHS < 3), 0.5))


def wrong_where_labelled():
    with pyro.plate("data", N):
        y = pyro.sample("y_unobserved", dist.Normal(0.0, 1.0))
        pyro.sample("z", dist.Normal(torch.where(LABELLED, -LABELS, y), 0.5))


def chain_cut(n):
    """The right z1 and z2, the right law of z3, but of a z2 of its own."""
    with pyro.plate("data", n):
        z1 = pyro.sample("z1", dist.Normal(0.0, 1.0))
        pyro.sample("z2", dist.Normal(z1, 0.2))
        other = pyro.sample("other", dist.Normal(0.0, 1.04**0.5), infer={"is_auxiliary": True})
        pyro.sample("z3", dist.LogNormal(other, 0.2))


@pytest.mark.parametrize(
    ("model", "guide", "group", "args"),
    [
        (carried_covariates, wrong_document, "w", ()),
        (unequal_sequences, wrong_in_short_sequences, "z0, z1, z2, z3", ()),
        (some_labels, wrong_where_labelled, "y_unobserved, z", ()),
        (chain, chain_cut, "z1, z2, z3", (32,)),
    ],
    ids=["carried covariates", "short sequences", "labelled rows", "chain"],
)
def test_a_wrong_guide_is_seen(model, guide, group, args, z_scores, too_far):
    assert z_scores(model, guide, *args, match_size=16 if args else 4)[group] > too_far
