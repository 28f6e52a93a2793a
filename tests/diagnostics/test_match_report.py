"""The match against its noise floor: no false alarm for an exact guide, an alarm for a bad one."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_sinkhorn import AutoImplicit, Trace_Sinkhorn
from pyro_sinkhorn.diagnostics import GroupReport, MatchReport, match_report
from pyro_sinkhorn.errors import ProgramError

LOSS = Trace_Sinkhorn(match_size=16)


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)


def guide_from(law):
    """A guide that draws z from a law that may look at the data."""

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", law(x))

    return guide


PRIOR = guide_from(lambda x: dist.Normal(torch.zeros_like(x), 1.0).to_event(1))
IDENTITY = guide_from(lambda x: dist.Delta(x, event_dim=1))
SHRUNK = guide_from(lambda x: dist.Normal(torch.zeros_like(x), 0.7).to_event(1))
HALF = guide_from(lambda x: dist.Normal(x * 0.5**0.5, 0.5**0.5).to_event(1))


def report(guide, n=64, **options):
    return match_report(model, guide, torch.randn(n, 2), loss=LOSS, **options)


def test_an_exact_aggregated_posterior_is_at_the_floor():
    zs = torch.tensor([report(guide).groups[0].z for guide in (PRIOR, HALF) for _ in range(8)])
    # About N(0, 1) each (Student with some 38 degrees of freedom; measured sd 1.0 to 1.2): the mean of 16 has
    # standard error .3, and a single one beyond 5 would come once in 1e5 reports.
    assert abs(float(zs.mean())) < 1.5
    assert float(zs.abs().max()) < 5
    assert 0.5 < float(zs.std()) < 2


def test_an_exact_deterministic_encoder_raises_no_alarm():
    # Every evaluation sees the same cloud; with 8 times the match size it weighs little.
    zs = [report(IDENTITY, n=256).groups[0].z for _ in range(4)]
    assert max(map(abs, zs)) < 5


def test_a_bad_guide_is_far_above_the_floor():
    found = report(SHRUNK, n=256)
    assert found.groups[0].z > 5
    assert found.groups[0].match > found.groups[0].floor + 3 * found.groups[0].floor_sd / 20**0.5
    assert any("the aggregated posterior is not the prior" in note for note in found.notes())


def test_the_floor_is_zero_in_expectation():
    values = torch.tensor([report(PRIOR, num_floor=40).groups[0].floor for _ in range(5)])
    sd = report(PRIOR, num_floor=40).groups[0].floor_sd
    assert abs(float(values.mean())) < 5 * sd / 200**0.5


@pytest.mark.parametrize(("guide", "expected"), [(IDENTITY, 0.0), (PRIOR, 1.0), (HALF, 0.5)])
def test_encoder_variance_is_the_share_of_noise(guide, expected):
    found = report(guide, n=256, num_floor=2, num_draws=8).groups[0].encoder_variance
    # A ratio of variances from 2 x 256 x 8 numbers: a standard error of 2% of either, and data that vary by 6%.
    assert found == pytest.approx(expected, abs=0.12 if expected == 0.5 else 0.06)
    assert (found == 0) == (expected == 0)


def test_reconstruction_is_the_mean_of_minus_the_log_likelihood():
    found = report(IDENTITY, num_floor=2)
    at_the_mode = -2 * float(dist.Normal(0.0, 0.5).log_prob(torch.tensor(0.0)))
    assert found.reconstruction == pytest.approx(at_the_mode)
    assert found.n_data == 64


def sub_sampling(x):
    with pyro.plate("data", len(x), subsample_size=32) as i:
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x[i])


def test_draws_of_one_datum_are_compared_where_the_model_sub_samples():
    def guide(x):
        with pyro.plate("data", len(x), subsample_size=32) as i:
            pyro.sample("z", dist.Delta(x[i], event_dim=1))

    found = match_report(sub_sampling, guide, torch.randn(200, 2), loss=LOSS, num_floor=2)
    assert found.groups[0].encoder_variance == 0
    assert found.n_data == 200
    at_the_mode = -2 * float(dist.Normal(0.0, 0.5).log_prob(torch.tensor(0.0)))
    assert found.reconstruction == pytest.approx(at_the_mode)  # per datum, whatever the sub-sample


def test_noise_of_globals_is_not_the_encoders():
    def with_global(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(x + mu))

    found = match_report(with_global, guide, torch.randn(64), loss=LOSS, num_floor=2)
    assert found.groups[0].encoder_variance == 0
    assert [group.name for group in found.groups] == ["z"]


def test_every_group_has_its_row():
    def nested(x):
        with pyro.plate("rows", x.shape[0], dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("columns", x.shape[1], dim=-1):
                a = pyro.sample("a", dist.Normal(z, 1.0))
                b = pyro.sample("b", dist.Dirichlet(x.new_ones(3)))
                pyro.sample("x", dist.Normal(a + b[..., 0], 0.5), obs=x)

    found = match_report(nested, AutoImplicit(nested), torch.randn(40, 3), loss=LOSS, num_floor=2)
    assert [group.name for group in found.groups] == ["z", "a, b"]
    assert found.n_data == 40 and found.match_size == 16


def test_a_model_without_local_latents_reports_its_reconstruction():
    def only_global(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    found = match_report(only_global, AutoImplicit(only_global), torch.randn(64), loss=LOSS, num_floor=2)
    assert found.groups == () and found.notes() == []
    assert str(found) == f"64 data, reconstruction {found.reconstruction:.4f} per datum; match at size 16"


def test_the_loss_that_reports_is_not_changed():
    loss = Trace_Sinkhorn(match_size=16)
    match_report(model, AutoImplicit(model), torch.randn(64, 2), loss=loss, num_floor=2)
    assert not loss.latent_match.state.units and not loss.latent_match.state.mean_costs


def test_the_size_that_small_data_leave_is_said():
    with pytest.warns(UserWarning, match="below match_size"):
        found = match_report(model, PRIOR, torch.randn(40, 2), num_floor=2)
    assert found.match_size == 20


@pytest.mark.parametrize("options", [{"num_floor": 1}, {"num_draws": 1}, {"num_floor": 2.5}])
def test_a_variance_needs_two(options):
    with pytest.raises(ProgramError, match=r"num_(floor|draws) is .*: expected an integer of at least 2"):
        report(PRIOR, **options)


def test_no_gradient_is_kept():
    x = torch.randn(64, 2, requires_grad=True)
    match_report(model, IDENTITY, x, loss=LOSS, num_floor=2)
    assert x.grad is None


TABLE = """\
1797 data, reconstruction -12.3457 per datum; match at size 64
group                     match     floor     ± sd       z  encoder var
z                        0.0712    0.0001   0.0042    51.2        0.004
z_what, z_how, z_else    0.0001    0.0001   0.0042     0.0        0.410
                      z: the aggregated posterior is not the prior; raise prior_weight or train on
                      z: the encoder is deterministic; its draws say nothing of uncertainty"""


def test_it_prints_as_a_table():
    groups = (
        GroupReport("z", 0.0712, 0.0001, 0.0042, 51.2, 0.004),
        GroupReport("z_what, z_how, z_else", 0.0001, 0.0001, 0.0042, 0.0, 0.41),
    )
    assert str(MatchReport(-12.34567, groups, 1797.0, 64)) == TABLE
