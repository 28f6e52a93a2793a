"""A cost that learns: two players that leave each other alone, a bound that holds, a state that continues to the bit."""

import pyro
import pytest
import torch
from pyro.infer import SVI
from pyro.optim import Adam
from torch import nn

from pyro_sinkhorn import Implicit, SinkhornProgram, Trace_DataSinkhorn, Trace_Sinkhorn
from pyro_sinkhorn.errors import NonFiniteError, ProgramError
from pyro_sinkhorn.losses import LearnedCost
from pyro_sinkhorn.ot import sinkhorn


def nothing(*_args):
    """An empty guide."""


def model(x):
    scale = pyro.param("scale", torch.full((2,), 0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("x", Implicit(scale * torch.randn(len(x), 2), event_dim=1), obs=x)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 4))


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()]).clone()


def loss_with(cost, **options):
    return Trace_DataSinkhorn(cost=cost, **({"match_size": 16} | options))


# The cost itself


@pytest.mark.parametrize("power", [1, 2])
def test_it_is_the_distance_between_features(power):
    net = network()
    cost = LearnedCost(net, power=power)
    x, y = torch.randn(5, 2), torch.randn(7, 2)
    expected = (net(x)[:, None] - net(y)).norm(dim=-1) ** power
    assert torch.allclose(cost(x, y), expected)
    assert sinkhorn(x, y, 1.0, cost=cost).plan().shape == (5, 7)


def test_particles_are_rows_to_the_network():
    cost = LearnedCost(network())
    x = torch.randn(3, 5, 2)
    assert torch.allclose(cost.features(x)[1], cost.features(x[1]))


@pytest.mark.parametrize(
    ("constraint", "bound"), [("spectral", 1.0), ("spectral", 0.5), ("clip", 0.01), (None, None)]
)
def test_the_bound_holds_after_every_step(constraint, bound):
    net = nn.Sequential(nn.Conv1d(1, 4, 2), nn.Flatten(), nn.Linear(4, 8))

    wrapped = nn.Sequential(Reshape(), net)
    cost = LearnedCost(
        wrapped, constraint=constraint, bound=bound, optim=lambda p: torch.optim.SGD(p, lr=0.3)
    )
    before = weights(net)
    for _ in range(30):
        cost.ascend(cost(torch.randn(8, 2), torch.randn(8, 2)).mean())
        if constraint == "clip":
            assert all(p.abs().max() <= bound for p in net.parameters())
        elif constraint == "spectral":
            norms = [torch.linalg.matrix_norm(p.flatten(1), 2) for p in net.parameters() if p.dim() > 1]
            assert max(norms) <= bound * 1.05  # the power iteration follows weights that move
    if constraint is None:
        assert weights(net).norm() > before.norm()


class Reshape(nn.Module):
    def forward(self, x):
        return x[:, None, :]


def test_a_step_goes_up():
    torch.manual_seed(1)
    x, y = torch.randn(64, 2), torch.randn(64, 2) * torch.tensor([1.0, 3.0])
    cost = LearnedCost(network(), constraint=None, optim=lambda p: torch.optim.SGD(p, lr=1e-3))
    before = cost(x, y).mean()
    cost.ascend(before)
    assert cost(x, y).mean() > before.detach()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LearnedCost(lambda x: x), "is a function: expected an nn.Module"),
        (lambda: LearnedCost(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))), "has BatchNorm.*LayerNorm"),
        (lambda: LearnedCost(nn.Linear(2, 2), optim=torch.optim.SGD([torch.ones(1)], 0.1)), "optim is a SGD"),
        (lambda: LearnedCost(nn.GRU(2, 2)).features(torch.zeros(4, 2)), "returned a tuple"),
        (lambda: LearnedCost(nn.ReLU()), "no parameters that require a gradient"),
        (lambda: LearnedCost(nn.Linear(2, 2), constraint="wgan"), "constraint is 'wgan'"),
        (lambda: LearnedCost(nn.Linear(2, 2), power=3), "power is 3: expected 1 or 2"),
        (lambda: LearnedCost(nn.Linear(2, 2), bound=-1.0), "bound is -1.0"),
        (lambda: LearnedCost(nn.Linear(2, 2), num_steps=-1), "num_steps is -1"),
        (
            lambda: LearnedCost(nn.Linear(3, 2)).features(torch.zeros(4, 2)),
            r"does not take rows of shape \(4, 2\)",
        ),
        (
            lambda: LearnedCost(Reshape1()).features(torch.zeros(4, 2)),
            r"returned \(8,\): expected \(4, number",
        ),
    ],
)
def test_wrong_input(make, message):
    with pytest.raises(ProgramError, match=message):
        make()


class Reshape1(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.w * x.flatten()


def test_nan_leaves_the_network_alone():
    net = network()
    cost = LearnedCost(net)
    before = weights(net)
    with pytest.raises(NonFiniteError, match="the divergence that the cost ascends is nan"):
        cost.ascend(cost(torch.zeros(2, 2), torch.full((2, 2), torch.nan)).sum())
    with pytest.raises(NonFiniteError, match=r"the gradient of '.*' of the cost's network"):
        cost.ascend((cost(torch.zeros(2, 2), torch.ones(2, 2)) * 0).sqrt().sum())
    assert torch.equal(weights(net), before)
    assert all(p.grad is None or bool((p.grad == 0).all()) for p in net.parameters())


# Two players


def test_each_step_moves_its_own_player():
    net = network()
    loss = loss_with(LearnedCost(net))
    svi = SVI(model, nothing, Adam({"lr": 0.01}), loss)
    x = torch.randn(64, 2)
    svi.step(x)
    scale, critic = pyro.param("scale").detach().clone(), weights(net)
    assert isinstance(loss.cost_step(model, nothing, x), float)
    assert torch.equal(pyro.param("scale"), scale)
    assert pyro.param("scale").grad is None or not pyro.param("scale").grad.any()
    assert not torch.equal(weights(net), critic)
    critic = weights(net)
    svi.step(x)
    assert torch.equal(weights(net), critic)
    assert all(p.grad is None or not p.grad.any() for p in net.parameters())
    assert not torch.equal(pyro.param("scale"), scale)
    assert all(p.requires_grad for p in net.parameters())


def test_the_cost_learns_to_see_what_a_fixed_one_does_not():
    """The first column is noise a hundred times the size; only the second tells the laws apart."""

    def shifted(x):
        with pyro.plate("data", len(x)):
            noise = torch.randn(len(x), 2) * torch.tensor([100.0, 1.0])
            pyro.sample("x", Implicit(noise + torch.tensor([0.0, 4.0]), event_dim=1), obs=x)

    torch.manual_seed(0)
    cost = LearnedCost(
        nn.Linear(2, 4), optim=lambda p: torch.optim.RMSprop(p, lr=0.02), power=2, constraint="spectral"
    )
    loss = loss_with(cost, match_size=64, relative_epsilon=1.0, scale="site")

    def match():
        x = torch.randn(128, 2) * torch.tensor([100.0, 1.0])
        values = [loss.loss(shifted, nothing, x) / 128 for _ in range(20)]
        return sum(values) / len(values)

    before = match()
    for _ in range(200):
        loss.cost_step(shifted, nothing, torch.randn(128, 2) * torch.tensor([100.0, 1.0]))
    assert match() > before + 0.01


def test_a_fixed_cost_has_no_step():
    with pytest.raises(ValueError, match="does not learn"):
        Trace_DataSinkhorn().cost_step(model, nothing, torch.randn(64, 2))


def test_fit_makes_the_steps_of_a_loop():
    """``fit`` and a loop by hand draw the same minibatches and end with the same weights."""
    x = torch.randn(32, 2)  # one batch, so that both see the same data in the same order
    program = SinkhornProgram(model, loss=loss_with(LearnedCost(network(), num_steps=2)))
    program.fit(x, num_steps=5, lr=0.01, batch_size=None, seed=3, progress=False)

    net = network()
    loss = loss_with(LearnedCost(net, num_steps=2))
    svi = SVI(model, nothing, Adam({"lr": 0.01}), loss)
    loss._checked_registration = program.loss._checked_registration
    torch.manual_seed(3)
    for _ in range(5):
        for _ in range(2):
            loss.cost_step(model, nothing, x)
        svi.step(x)
    assert torch.equal(weights(net), weights(program.loss.learned_cost.network))
    with program.active():
        theirs = pyro.param("scale").detach().clone()
    assert torch.equal(theirs, pyro.param("scale").detach())


def test_a_program_trains_a_copy_of_its_own():
    net = network()
    cost = LearnedCost(net)
    before = weights(net)
    one, two = (SinkhornProgram(model, loss=loss_with(cost)) for _ in range(2))
    one.fit(torch.randn(64, 2), num_steps=2, batch_size=32, seed=0, progress=False)
    assert torch.equal(weights(net), before)
    assert torch.equal(weights(two.loss.learned_cost.network), before)
    assert not torch.equal(weights(one.loss.learned_cost.network), before)
    one.reset()
    assert torch.equal(weights(one.loss.learned_cost.network), before)


def test_it_is_saved_cloned_and_continued_to_the_bit(tmp_path):
    x = torch.randn(128, 2)
    loss = loss_with(LearnedCost(network()))
    program = SinkhornProgram(model, loss=loss).fit(x, num_steps=3, batch_size=32, seed=0, progress=False)
    program.save(tmp_path / "program.pt")
    loaded = SinkhornProgram.load(tmp_path / "program.pt", model, loss=loss)
    clone = program.clone()
    for one in (program, clone, loaded):
        one.fit(x, num_steps=3, batch_size=32, progress=False)
    for other in (clone, loaded):
        assert other.history.loss == program.history.loss
        assert torch.equal(
            weights(other.loss.learned_cost.network), weights(program.loss.learned_cost.network)
        )


def test_a_saved_cost_needs_its_network(tmp_path):
    x = torch.randn(64, 2)
    program = SinkhornProgram(model, loss=loss_with(LearnedCost(network())))
    program.fit(x, num_steps=1, batch_size=32, progress=False).save(tmp_path / "program.pt")
    with pytest.raises(ValueError, match="with a cost of its own: pass it as loss="):
        SinkhornProgram.load(tmp_path / "program.pt", model, loss=loss_with("sqeuclidean"))
    with pytest.raises(ValueError, match="the loss differs from the saved one"):
        SinkhornProgram.load(tmp_path / "program.pt", model, loss=loss_with(LearnedCost(nn.Linear(2, 3))))


def test_dtypes_that_differ_are_explained():
    program = SinkhornProgram(model, loss=loss_with(LearnedCost(network().float())))
    with pytest.raises(ProgramError, match=r"the network of the cost is torch.float32"):
        program.fit(torch.randn(64, 2), num_steps=1, batch_size=32, progress=False)


def test_covariates_reach_the_network():
    def conditional(t, x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", Implicit(pyro.param("b", torch.tensor(1.0)) * t + torch.randn(len(x))), obs=x)

    loss = loss_with(LearnedCost(nn.Linear(2, 3)), covariates="auto")
    assert isinstance(loss.cost_step(conditional, nothing, torch.randn(32), torch.randn(32)), float)
    with pytest.raises(ProgramError, match=r"does not take rows of shape \(32, 2\)"):
        loss_with(LearnedCost(nn.Linear(1, 3)), covariates="auto").cost_step(
            conditional, nothing, torch.randn(32), torch.randn(32)
        )


def test_every_step_has_a_minibatch_of_its_own():
    drawn = []

    def draw():
        drawn.append(torch.randn(32, 2))
        return (drawn[-1],), {}

    loss = loss_with(LearnedCost(network(), num_steps=3))
    loss.before_step(model, nothing, draw)
    assert len(drawn) == 3


def test_a_masked_batch_teaches_nothing():
    def masked(x, mask):
        with pyro.plate("data", len(x)), pyro.poutine.mask(mask=mask):
            pyro.sample("x", Implicit(pyro.param("s", torch.tensor(1.0)) * torch.randn(len(x), 2), 1), obs=x)

    net = network()
    before = weights(net)
    loss = loss_with(LearnedCost(net))
    assert loss.cost_step(masked, nothing, torch.randn(32, 2), torch.zeros(32, dtype=torch.bool)) == 0
    assert torch.equal(weights(net), before)


def test_a_step_of_the_cost_leaves_the_simulator_alone():
    norm = nn.BatchNorm1d(2)

    def normed(x):
        pyro.module("norm", norm)
        with pyro.plate("data", len(x)):
            pyro.sample("x", Implicit(norm(torch.randn(len(x), 2)), event_dim=1), obs=x)

    loss = loss_with(LearnedCost(network()))
    with pyro.poutine.trace(param_only=True) as outside:
        loss.cost_step(normed, nothing, torch.randn(32, 2))
    assert norm.num_batches_tracked == 0
    assert not [name for name, site in outside.trace.nodes.items() if site["type"] == "param"]


def test_an_error_leaves_the_cost_as_it_was():
    calls = []

    def failing(x):
        calls.append(1)
        scale = pyro.param("scale", torch.ones(2))
        with pyro.plate("data", len(x)):
            simulated = scale * torch.randn(len(x), 2)
            pyro.sample("x", Implicit(simulated * (torch.nan if len(calls) > 20 else 1), event_dim=1), obs=x)

    program = SinkhornProgram(failing, loss=loss_with(LearnedCost(network(), num_steps=2)))
    cost, seen = program.loss.learned_cost, []

    def train():
        while True:
            seen.append(weights(cost.network))
            program.fit(torch.randn(64, 2), num_steps=1, batch_size=32, progress=False)

    with pytest.raises(NonFiniteError, match="of the simulated data"):
        train()
    assert torch.equal(weights(cost.network), seen[-1])
    assert not torch.equal(seen[-1], seen[-2])


def test_what_a_learned_cost_is_not_for():
    with pytest.raises(ValueError, match="trained by Trace_DataSinkhorn alone"):
        Trace_Sinkhorn(cost=LearnedCost(network()))

    def nested(a, b):
        n, m = b.shape
        with pyro.plate("outer", n, dim=-2):
            pyro.sample("a", Implicit(pyro.param("s", torch.tensor(1.0)) * torch.randn(n, 1)), obs=a)
            with pyro.plate("inner", m, dim=-1):
                pyro.sample("b", Implicit(torch.randn(n, m)), obs=b)

    with pytest.raises(
        ProgramError, match=r"one network, but the observed sites \['a', 'b'\] are in different plates"
    ):
        loss_with(LearnedCost(nn.Linear(1, 2))).cost_step(
            nested, nothing, torch.randn(8, 1), torch.randn(8, 3)
        )
