"""The match of two clouds: its unit, its size, its units of splitting, and what it says of clouds it cannot compare."""

import math

import pytest
import torch

from pyro_sinkhorn.errors import NonFiniteError, ProgramError
from pyro_sinkhorn.losses.clouds import Cloud
from pyro_sinkhorn.losses.latent_match import LatentMatch
from pyro_sinkhorn.losses.matching import MatchOptions, MatchState, match, mean_cost
from pyro_sinkhorn.ot import ConvergenceWarning, sinkhorn_divergence

ONE = torch.tensor(1.0, dtype=torch.float64)


def cloud(n=16, d=2, particles=1, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return Cloud(torch.randn(particles, n, d, generator=generator, dtype=torch.float64), **options)


def run(x, y, mean=ONE, seed=0, options=None, **keywords):
    options = MatchOptions(match_size=4) if options is None else options
    generator = torch.Generator().manual_seed(seed)
    return match(x, y, mean, options, group="latent group (z)", generator=generator, **keywords)


@pytest.mark.parametrize("debias", ["independent", "self", None])
@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean"])
def test_the_match_is_the_divergence_in_units_of_the_mean_cost(debias, cost):
    x, y, mean = cloud(), cloud(seed=1), torch.tensor(3.0, dtype=torch.float64)
    options = MatchOptions(
        debias, relative_epsilon=0.2, match_size=4, cost=cost, tolerance=1e-6, max_iters=2000
    )
    expected = sinkhorn_divergence(
        x.points,
        y.points,
        0.2 * 3.0,
        cost=cost,
        debias=debias,
        match_size=4,
        tolerance=1e-6,
        generator=torch.Generator().manual_seed(0),
    ).value
    assert torch.allclose(run(x, y, mean, options=options), expected / 3)


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_the_match_has_no_unit(factor):
    x, y = cloud(), cloud(seed=1)
    scaled = [Cloud(factor * c.points) for c in (x, y)]
    assert torch.allclose(run(*scaled, factor**2 * ONE), run(x, y), rtol=1e-6)


def test_there_is_a_value_for_every_particle():
    x, y = cloud(particles=3), cloud(particles=3, seed=1)
    values = run(x, y)
    assert values.shape == (3,)
    for i in range(3):
        alone = run(Cloud(x.points[i : i + 1]), Cloud(y.points[i : i + 1]))
        # The batch stops when its slowest problem does.
        assert torch.allclose(values[i], alone[0], atol=0.02)
    # A guide without noise has one cloud for all particles of the prior.
    assert run(Cloud(x.points[:1]), y).shape == (3,)


def test_a_paired_match_never_compares_a_row_with_itself():
    """Of two equal clouds every pairing that is used costs the same, and those of a row with itself cost nothing."""
    x = Cloud(100.0 * torch.arange(16, dtype=torch.float64)[None, :, None])
    for seed in range(5):
        assert run(x, x, 1e4 * ONE, seed, paired=True) == pytest.approx(0, abs=1e-3)
    assert max(float(run(x, x, 1e4 * ONE, seed).abs()) for seed in range(5)) > 1


def test_units_are_not_separated():
    """Two points a unit, always at opposite places: each half is balanced exactly when units stay whole."""
    signs = torch.tensor([-50.0, 50.0], dtype=torch.float64).repeat(8)[None, :, None]
    units = torch.arange(8).repeat_interleave(2)
    whole = Cloud(signs, units)
    for seed in range(5):
        assert run(whole, Cloud(signs.clone(), units), 1e3 * ONE, seed) == pytest.approx(0, abs=1e-9)
    assert max(float(run(Cloud(signs), Cloud(signs), 1e3 * ONE, seed).abs()) for seed in range(20)) > 0.01


def test_points_of_vanishing_weight_do_not_count():
    x, y = cloud(n=8), cloud(n=8, seed=1)
    weights = torch.tensor([1.0, 1.0, 1.0, 1.0, 1e-12, 1e-12, 1e-12, 1e-12], dtype=torch.float64)[
        torch.randperm(8)
    ]
    moved = Cloud(torch.where(weights[:, None] < 1e-6, x.points + 100, x.points), weights=weights)
    options = MatchOptions(None, tolerance=1e-8)
    with_weights = Cloud(x.points, weights=weights)
    assert torch.allclose(run(moved, y, options=options), run(with_weights, y, options=options), atol=1e-6)
    # Weights are relative.
    doubled = Cloud(x.points, weights=2 * weights)
    assert torch.allclose(run(doubled, y, options=options), run(with_weights, y, options=options))


# Small batches


@pytest.mark.parametrize("units", [None, torch.zeros(6, dtype=torch.long)], ids=["one point", "one unit"])
def test_one_unit_cannot_be_split(units):
    x = cloud(n=1 if units is None else 6, units=units)
    with pytest.raises(
        ProgramError, match=r"latent group \(z\): a batch of 1 cannot be split .* at least 2 data"
    ):
        run(x, x)
    assert run(x, x, options=MatchOptions("self")) == pytest.approx(0, abs=1e-6)


def test_a_batch_below_the_match_size_warns_once_a_group():
    warned = set()
    with pytest.warns(
        UserWarning, match=r"\(z\): a batch of 6 gives halves of 3, below match_size=4.* at least 8"
    ):
        run(cloud(6), cloud(6, seed=1), warned=warned)
    run(cloud(6), cloud(6, seed=1), warned=warned)  # warnings are errors here
    run(cloud(8), cloud(8, seed=1), warned=set())
    run(cloud(6), cloud(6, seed=1), options=MatchOptions("self"), warned=set())


def test_a_transport_that_does_not_converge_warns_once_a_group():
    x, y = Cloud(cloud().points + 30), cloud(seed=1)
    warned, options = set(), MatchOptions(match_size=4, max_iters=5)
    with pytest.warns(
        ConvergenceWarning, match=r"\(z\): the transport stopped after .* raise relative_epsilon"
    ) as record:
        run(x, y, warned=warned, options=options)
    assert len(record) == 1
    run(x, y, warned=warned, options=options)
    with pytest.warns(UserWarning, match="below match_size"):  # another matter, of which nothing was said yet
        run(cloud(6), cloud(6, seed=1), warned=warned)


# Numbers that are none


@pytest.mark.filterwarnings("ignore")
def test_an_infinite_transport_is_reported_with_its_group():
    x = Cloud(torch.full((1, 8, 1), 1e200, dtype=torch.float64) * torch.arange(8)[None, :, None])
    message = r"\(z\): .* \(1, 8, 1\) and \(1, 8, 1\): .* largest coordinates are 7e\+200"
    with pytest.raises(NonFiniteError, match=message):
        run(x, cloud(8, 1))


# Estimated once


def test_the_mean_cost_of_gaussians_is_twice_their_dimension():
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(1024, 3, generator=generator, dtype=torch.float64)
    costs = mean_cost("sqeuclidean", reference)
    # Mean over 512 x 512 pairs of independent halves; a row mean has variance 2 * 3 around 6.
    assert abs(float(costs) - 6) < 5 * math.sqrt(2 * 6 / 512)
    assert mean_cost("euclidean", reference) < costs
    assert mean_cost(lambda x, y: torch.cdist(x, y).square() / 2, reference) == pytest.approx(
        float(costs) / 2, rel=0.1
    )


def test_a_prior_without_spread_is_normalised_by_one():
    assert mean_cost("sqeuclidean", torch.ones(20, 3, dtype=torch.float64)) == 1


def test_a_fresh_match_has_the_options_and_forgets_the_prior():
    old = LatentMatch(MatchOptions(match_size=7), "marginal", 3)
    old.state.units["z"] = ONE
    new = old.fresh()
    assert (new.options, new.grouping, new.num_prior_batches) == (old.options, "marginal", 3)
    assert new.state == MatchState()
    assert old.state.units
