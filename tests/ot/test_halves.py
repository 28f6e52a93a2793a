"""The split: equal halves, at random, by unit. Each rule broken biases the divergence (see test_divergence.py)."""

import pytest
import torch

from pyro_sinkhorn.ot.halves import draw_halves


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def points(half):
    """The indices really present in a half, over all its blocks."""
    index = half.index.flatten() if half.weight is None else half.index[half.weight > 0]
    return index.tolist()


def halves_of(halves):
    return halves.x1, halves.x2, halves.y1, halves.y2


@pytest.mark.parametrize(("n", "m", "k"), [(2, 2, 1), (8, 8, 4), (9, 9, 4), (9, 20, 4), (7, 3, 1)])
def test_the_four_halves_are_equal_and_disjoint(n, m, k):
    halves = draw_halves(n, m, generator=seeded())
    for half in halves_of(halves):
        assert half.index.shape == (1, k)
        assert half.weight is None
    for one, two, size in [(halves.x1, halves.x2, n), (halves.y1, halves.y2, m)]:
        chosen = points(one) + points(two)
        assert len(set(chosen)) == 2 * k
        assert set(chosen) <= set(range(size))


def test_every_point_is_as_likely_in_either_half_and_as_likely_to_be_dropped():
    n, draws = 7, 2_000
    counts = torch.zeros(3, n)
    rng = seeded()
    for _ in range(draws):
        halves = draw_halves(n, n, generator=rng)
        counts[0, points(halves.x1)] += 1
        counts[1, points(halves.x2)] += 1
    counts[2] = draws - counts[0] - counts[1]
    probability = torch.tensor([[3.0], [3.0], [1.0]]) / n
    z = (counts - draws * probability) / (draws * probability * (1 - probability)).sqrt()
    assert z.abs().max() < 5


def test_the_clouds_are_split_independently_of_each_other():
    rng = seeded()
    together = sum(
        0 in points(h.x1) and 0 in points(h.y1)
        for h in (draw_halves(4, 4, generator=rng) for _ in range(2_000))
    )
    assert abs(together - 500) < 5 * (2_000 * 3 / 16) ** 0.5


def test_points_of_a_unit_stay_together():
    ids = torch.tensor([7, 3, 7, 3, 9, 9, 5, 5])  # neither sorted nor contiguous
    for seed in range(20):
        halves = draw_halves(8, 8, units_x=ids, units_y=ids.flip(0), generator=seeded(seed))
        for one, two, unit in [(halves.x1, halves.x2, ids), (halves.y1, halves.y2, ids.flip(0))]:
            first, second = unit[points(one)].tolist(), unit[points(two)].tolist()
            assert not set(first) & set(second)
            assert len(set(first)) == len(set(second)) == 2
            assert sorted(points(one) + points(two)) == list(range(8))


def test_units_of_uneven_size_are_padded_with_weight_zero():
    ids_x, ids_y = torch.tensor([0, 0, 0, 1, 2, 3]), torch.arange(4)
    halves = draw_halves(6, 4, units_x=ids_x, units_y=ids_y, generator=seeded())
    for half in halves_of(halves):
        assert half.index.shape == (1, 2 * 3)  # two units of at most three points: one size for all
        assert ((half.index >= 0) & (half.index < 6)).all()
    assert sorted(points(halves.x1) + points(halves.x2)) == list(range(6))
    assert sorted(points(halves.y1) + points(halves.y2)) == list(range(4))


def test_large_clouds_are_cut_into_disjoint_blocks():
    halves = draw_halves(23, 31, size=3, generator=seeded())
    for half in halves_of(halves):
        assert half.index.shape == (3, 3)
    for one, two in [(halves.x1, halves.x2), (halves.y1, halves.y2)]:
        assert len(set(points(one) + points(two))) == 18


def test_a_match_size_beyond_half_the_smaller_cloud_is_capped():
    assert draw_halves(10, 30, size=50, generator=seeded()).y1.index.shape == (1, 5)


def test_shared_units_split_alike_so_that_opposite_halves_share_nothing():
    ids = torch.tensor([4, 4, 2, 8, 8, 6])
    shuffled = torch.tensor([8, 2, 6, 4, 2])
    for seed in range(10):
        halves = draw_halves(6, 5, units_x=ids, units_y=shuffled, shared=True, generator=seeded(seed))
        x1, x2 = set(ids[points(halves.x1)].tolist()), set(ids[points(halves.x2)].tolist())
        y1, y2 = set(shuffled[points(halves.y1)].tolist()), set(shuffled[points(halves.y2)].tolist())
        assert (x1, x2) == (y1, y2)
        assert not x1 & y2
        assert not x2 & y1


def test_a_generator_makes_the_split_reproducible_and_leaves_the_global_one_alone():
    before = torch.get_rng_state()
    one, two, other = (draw_halves(50, 50, generator=seeded(s)) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(p.index, q.index) for p, q in zip(halves_of(one), halves_of(two), strict=True))
    assert not torch.equal(one.x1.index, other.x1.index)


def test_without_a_generator_the_global_one_decides():
    torch.manual_seed(3)
    one = draw_halves(50, 50)
    two = draw_halves(50, 50)
    torch.manual_seed(3)
    again = draw_halves(50, 50)
    assert torch.equal(one.x1.index, again.x1.index)
    assert not torch.equal(one.x1.index, two.x1.index)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"n_x": 1, "n_y": 5},
            "clouds of 1 and 5 independent units cannot be split.*at least 2.*debias='self'",
        ),
        (
            {"n_x": 5, "n_y": 5, "units_y": torch.zeros(5, dtype=torch.long)},
            "clouds of 5 and 1 independent units",
        ),
        ({"n_x": 5, "n_y": 5, "units_x": torch.arange(4)}, r"shape \(4,\): expected \(5,\)"),
        ({"n_x": 5, "n_y": 5, "units_x": torch.arange(5).unsqueeze(0)}, r"shape \(1, 5\): expected \(5,\)"),
        ({"n_x": 5, "n_y": 5, "size": 0}, "match_size is 0: expected a positive number"),
        ({"n_x": 5, "n_y": 6, "shared": True}, "same units: given 5 and 6 of them, 5 in common"),
        (
            {
                "n_x": 3,
                "n_y": 3,
                "units_x": torch.tensor([1, 2, 3]),
                "units_y": torch.tensor([2, 3, 4]),
                "shared": True,
            },
            "same units: given 3 and 3 of them, 2 in common",
        ),
    ],
)
def test_clouds_that_cannot_be_split_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        draw_halves(**arguments)
