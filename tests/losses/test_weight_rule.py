"""prior_weight="auto": it rises where the match is stuck above its floor, and only there."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_sinkhorn import SinkhornProgram, Trace_EnergyScore, Trace_Sinkhorn, TraceEnum_Sinkhorn
from pyro_sinkhorn.losses.weight_rule import WeightRule


def observed(values):
    rule = WeightRule()
    for value in values:
        rule.observe(float(value))
    return rule.weight


def test_noise_about_zero_leaves_the_weight():
    # 40 looks at pure noise: each rises with probability .0013, so a seed does with at most .05; four of 8 have p < 5e-4.
    rises = 0
    for seed in range(8):
        noise = 0.01 * torch.randn(40 * WeightRule.PERIOD, generator=torch.Generator().manual_seed(seed))
        rises += observed(noise) > WeightRule.START
    assert rises <= 3


def test_a_falling_match_leaves_the_weight_and_a_stuck_one_raises_it():
    falling = 0.5 ** (torch.arange(500) / 50)
    assert observed(falling) == WeightRule.START
    # Two periods a rise: one to settle, one to judge by.
    assert observed(torch.full((500,), 0.2)) == pytest.approx(WeightRule.START * 1.5**5)
    assert observed(torch.full((5000,), 0.2)) == WeightRule.MOST


def model(x):
    # Data of sd 1.3 want latents of that size, by a likelihood that a weight of 10 does not outweigh.
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.2).to_event(1), obs=x)


def guide(x):
    scale = pyro.param("scale", torch.tensor(1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Delta(scale * x, event_dim=1))


def test_the_weight_rises_until_the_match_is_at_its_floor(tmp_path):
    x = 1.3 * torch.randn(2000, 2)
    options = {"num_steps": 800, "batch_size": 64, "lr": 0.02, "seed": 0, "progress": False}

    def fitted(weight):
        return SinkhornProgram(model, guide, Trace_Sinkhorn(weight, match_size=32)).fit(x, **options)

    fixed, auto = fitted(10.0), fitted("auto")
    late = [torch.tensor(program.history.match[-200:]) for program in (fixed, auto)]
    z = [float(match.mean() / match.std() * 200**0.5) for match in late]
    assert auto.loss.weight > 30 and z[0] > 6 > z[1]
    scales = []
    for program in (fixed, auto):
        with program.active():
            scales.append(pyro.param("scale").item() * 1.3)
    assert abs(scales[1] - 1) < 0.6 * abs(scales[0] - 1)  # the prior's sd is 1
    # It is part of the state, and of what a new program begins without.
    auto.save(tmp_path / "auto.pt")
    loaded = SinkhornProgram.load(tmp_path / "auto.pt", model, guide)
    assert loaded.loss.weight == auto.loss.weight == auto.clone().loss.weight
    assert loaded.loss.prior_weight == "auto" and SinkhornProgram(auto).loss.weight == 10


def test_measuring_does_not_count():
    x = torch.randn(64, 2)
    loss = Trace_Sinkhorn("auto", match_size=16)
    for _ in range(WeightRule.PERIOD):
        loss.loss(model, guide, x)
    assert loss.state()["weight_rule"]["count"] == 0
    loss.loss_and_grads(model, guide, x)
    assert loss.state()["weight_rule"]["count"] == 1


def test_discrete_latents_have_it_too():
    assert TraceEnum_Sinkhorn("auto").weight == 10 == TraceEnum_Sinkhorn().weight
    assert "prior_weight='auto'" in repr(TraceEnum_Sinkhorn("auto"))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Trace_Sinkhorn("auto", debias="self"), "only independent halves"),
        (lambda: Trace_Sinkhorn("big"), "'big': expected a number of at least 0, or 'auto'"),
        (lambda: Trace_EnergyScore(prior_weight="auto"), "expected a number"),
    ],
)
def test_where_there_is_no_rule(make, words):
    with pytest.raises(ValueError, match=words):
        make()
