"""Peers that the studies of the papers bring themselves: the published cost, fixed targets, the von Mises-Fisher guide."""

import doctest
import importlib
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pyro_sinkhorn.distributions import VonMisesFisher
from pyro_sinkhorn.losses.matching import MatchOptions

FOLDER = Path(__file__).parents[1] / "benchmarks" / "papers"


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


@pytest.mark.parametrize("name", ["_matches", "_vmf_guide"])
def test_doctests(study, name):
    result = doctest.testmod(study(name))
    assert result.attempted
    assert not result.failed


def test_published_gradient_is_the_library_s(study):
    from pyro_sinkhorn.ot import sinkhorn

    x, y = torch.randn(2, 24, 4)
    x.requires_grad_()
    value, _ = study("_matches").published_sinkhorn(torch.cdist(x, y).square(), 0.7, 30)
    same = sinkhorn(y, x, 0.7, value="sharp", gradient="unrolled", tolerance=0, max_iters=30).value
    (mine,), (theirs,) = torch.autograd.grad(value, x), torch.autograd.grad(same, x)
    assert torch.allclose(mine, theirs, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("hungarian", [True, False])
def test_fixed_targets_are_swapped_but_stay(study, hungarian):
    """Targets move between the data of a batch; those drawn first are kept, and swapping brings them nearer."""
    match = study("_matches").FixedTargets(MatchOptions(relative_epsilon=0.05), 40, hungarian)
    codes, first, later = torch.randn(3, 1, 20, 3)
    match._index = torch.arange(10, 30)
    clouds = [SimpleNamespace(points=points) for points in (codes, first, later)]
    match.divergence(clouds[0], clouds[1], torch.tensor(6.0), "z", False)
    kept = match.targets[10:30].clone()
    assert match.targets[:10].isnan().all()
    assert match.targets[30:].isnan().all()
    assert torch.equal(kept.sort(0).values, first[0].sort(0).values)
    assert (codes[0] - kept).square().sum() < (codes[0] - first[0]).square().sum()
    match.divergence(clouds[0], clouds[2], torch.tensor(6.0), "z", False)
    assert torch.equal(match.targets[10:30], kept)  # already the best order


def test_gradient_in_the_mean_direction(study):
    r"""Of E<a,x>^2, known from the covariance; the standard error of the estimate is that of ten batches."""
    raw, a = torch.randn(6, requires_grad=True), torch.randn(6)
    kappa = torch.tensor(8.0)

    def second_moment(loc):
        q = VonMisesFisher(torch.eye(6)[0], kappa)
        across, along = q.variance[1], q.variance[0]
        return across * a @ a + (along - across + q.mean[0] ** 2) * (loc @ a) ** 2

    (exact,) = torch.autograd.grad(second_moment(raw / raw.norm()), raw)
    guide = study("_vmf_guide")
    found = []
    for _ in range(10):
        loc = (raw / raw.norm()).expand(1000, 6)
        x = guide.ReparametrisedVMF(loc, kappa).rsample()
        found.append(torch.autograd.grad((x @ a).square().mean(), raw)[0])
    estimate = torch.stack(found)
    error = estimate.std(0) / math.sqrt(10)
    # Student's t with 9 degrees of freedom passes 12 with a probability below 1e-6, in any of 6 coordinates below 5e-6.
    assert ((estimate.mean(0) - exact).abs() < 12 * error).all()
