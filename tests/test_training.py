"""Minibatches, history, the step, optimisers: the parts that fit is made of."""

import copy

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyro_sinkhorn import Implicit, Trace_DataSinkhorn, Trace_Sinkhorn, optimiser
from pyro_sinkhorn.errors import NonFiniteError, ProgramError
from pyro_sinkhorn.losses.trace_sinkhorn import Terms
from pyro_sinkhorn.training import (
    DataScale,
    Epoch,
    History,
    Minibatches,
    Trainer,
    as_tensor,
    data_scale,
    step,
)

# Data.


@pytest.mark.parametrize(("n", "batch_size"), [(10, 5), (10, 3), (7, 6), (5, 1)])
def test_every_datum_comes_once_an_epoch_in_full_batches(n, batch_size):
    batches = Minibatches((torch.arange(n),), {}, batch_size)
    drawn = [batches.draw()[0][0] for _ in range(4 * n)]
    assert all(len(batch) == batch_size for batch in drawn)
    stream = torch.cat(drawn)
    epochs = stream[: len(stream) // n * n].reshape(-1, n)
    assert epochs.sort(-1).values.equal(torch.arange(n).expand(len(epochs), n))
    assert n < 7 or len({tuple(epoch.tolist()) for epoch in epochs}) > 2  # and in a new order


def test_an_epoch_goes_on_in_the_next_minibatches():
    x = torch.arange(10)
    whole, epoch = Minibatches((x,), {}, 3), Epoch()
    torch.manual_seed(0)
    expected = [whole.draw()[0][0] for _ in range(6)]
    torch.manual_seed(0)
    parts = [Minibatches((x,), {}, 3, epoch).draw()[0][0] for _ in range(6)]
    assert torch.stack(parts).equal(torch.stack(expected))


def test_an_epoch_over_other_data_begins_anew():
    epoch = Epoch()
    Minibatches((torch.arange(100),), {}, 30, epoch).draw()
    batches = Minibatches((torch.arange(10),), {}, 5, epoch)
    assert torch.cat([batches.draw()[0][0] for _ in range(2)]).sort().values.equal(torch.arange(10))
    assert epoch.n == 10


def test_what_is_cut_and_what_is_passed_whole():
    x, y, table, scalar = torch.arange(10), torch.arange(20).reshape(10, 2), torch.arange(4), torch.tensor(3)
    args, kwargs = Minibatches((x, table, "text"), {"y": y, "scalar": scalar, "none": None}, 4).draw()
    assert (args[0] == kwargs["y"][:, 0] // 2).all() and kwargs["y"].shape == (4, 2)
    assert args[1] is table and args[2] == "text" and kwargs["scalar"] is scalar and kwargs["none"] is None


@pytest.mark.parametrize("batch_size", [None, 10, 11, np.int64(50)])
def test_all_data_at_once_are_passed_as_they_are(batch_size):
    x = torch.arange(10)
    batches = Minibatches((x,), {}, batch_size)
    state = torch.get_rng_state()
    assert batches.draw()[0][0] is x and batches.whole and batches.batch_size == 10
    assert torch.get_rng_state().equal(state)


@pytest.mark.parametrize("batch_size", [0, -3, 2.5, "all", torch.tensor(2.0)])
def test_a_batch_size_must_be_a_positive_integer(batch_size):
    with pytest.raises(ProgramError, match=r"batch_size is .*: expected an integer of at least 1"):
        Minibatches((torch.arange(10),), {}, batch_size)


@pytest.mark.parametrize("batch_size", [None, 4])
def test_empty_data_are_refused(batch_size):
    with pytest.raises(ProgramError, match=r"the data are empty: arguments of shape \[\(0, 3\), \(2,\)\]"):
        Minibatches((torch.zeros(0, 3),), {"y": torch.zeros(2)}, batch_size)


def test_arrays_become_tensors_of_the_default_dtype():
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    torch.testing.assert_close(as_tensor(x, None), torch.arange(6.0).reshape(2, 3))
    assert as_tensor(x, None).dtype == torch.get_default_dtype()
    assert as_tensor(np.arange(3), None).dtype == torch.int64
    assert as_tensor(np.array([True]), None).dtype == torch.bool
    assert as_tensor(x[::-1], None).equal(as_tensor(x, None).flip(0))
    x.flags.writeable = False
    assert as_tensor(x, None).shape == (2, 3)
    tensor = torch.zeros(2, dtype=torch.float32)
    assert as_tensor(tensor, None) is tensor and as_tensor("text", None) == "text"
    assert as_tensor(tensor, torch.device("cpu")).device.type == "cpu"
    assert not as_tensor(2 * torch.zeros(2, requires_grad=True), None).requires_grad


# History.


def test_history_appends_what_the_weight_multiplies():
    history = History()
    assert repr(history) == "History(no steps)" and len(history) == 0
    history.append(Terms(3.0, 1.0, {"a": 0.5, "b": -0.25}, total_match=0.25))
    assert (history.loss, history.reconstruction, history.match) == ([3.0], [1.0], [0.25])
    assert repr(history) == "History(1 steps, last: loss=3, reconstruction=1, match=0.25)"


# Scale.


def test_data_scale_multiplies_once_inside_the_plates():
    def model():
        a = pyro.sample("a", dist.Normal(0, 1))
        with pyro.plate("outer", 4, subsample_size=2, dim=-2), poutine.scale(scale=3.0):
            pyro.sample("b", dist.Normal(a, 1))
            with pyro.plate("inner", 5):
                pyro.sample("c", dist.Normal(a, 1))

    scaled = DataScale({"outer", "inner"}, 10.0)(model)
    trace = poutine.trace(scaled).get_trace()
    scales = {name: float(trace.nodes[name]["scale"]) for name in "abc"}
    assert scales == {"a": 1.0, "b": 60.0, "c": 60.0}


def locals_only(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.deterministic("twice", 2 * z)
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def with_global(x):
    pyro.sample("mu", dist.Normal(0.0, 1.0))
    locals_only(x)


def test_nothing_is_scaled_without_need():
    x = torch.zeros(20)
    assert data_scale(locals_only, Minibatches((x,), {}, 5)) is None
    assert data_scale(with_global, Minibatches((x,), {}, None)) is None
    assert data_scale(with_global, Minibatches((x,), {}, 40)) is None
    scale = data_scale(with_global, Minibatches((x,), {}, 5))
    assert scale.plates == {"data"} and scale.factor == 4.0


def test_a_plate_longer_than_the_batch_but_in_proportion_is_scaled():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 2 * len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x.flatten())

    assert data_scale(model, Minibatches((torch.zeros(20, 2),), {}, 5)).plates == {"data"}


def test_the_look_at_the_model_draws_nothing_and_moves_no_buffer():
    norm = nn.BatchNorm1d(1)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(norm(z[:, None])[:, 0], 1.0), obs=x)

    state = torch.get_rng_state()
    data_scale(model, Minibatches((torch.zeros(20),), {}, 5))
    assert torch.get_rng_state().equal(state) and int(norm.num_batches_tracked) == 0


# The step.


def guide(x):
    loc = pyro.param("loc", torch.tensor(0.3))
    scale = pyro.param("scale", torch.tensor(0.7), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, scale))


def test_a_step_is_svis():
    x, found = torch.randn(20), []
    for take in ("svi", "ours"):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        optim, loss = pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()
        svi = SVI(locals_only, guide, optim, loss)
        for _ in range(3):
            value = svi.step(x) if take == "svi" else step(loss, locals_only, guide, optim, (x,), {})
        found.append((value, pyro.param("loc").item(), pyro.param("scale").item()))
    assert found[0] == found[1]


class Broken(Trace_ELBO):
    """Gradients as usual, then an error, or a value that is not finite."""

    def __init__(self, outcome):
        super().__init__()
        self.outcome = outcome

    def loss_and_grads(self, *args, **kwargs):
        super().loss_and_grads(*args, **kwargs)
        if isinstance(self.outcome, float):
            return self.outcome
        raise self.outcome


@pytest.mark.parametrize(
    ("outcome", "error"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (NonFiniteError("x"), NonFiniteError),
        (float("nan"), NonFiniteError),
        (float("inf"), NonFiniteError),
    ],
    ids=str,
)
def test_a_step_that_fails_leaves_no_gradient_and_moves_nothing(outcome, error):
    x, optim = torch.randn(20), pyro.optim.Adam({"lr": 0.1})
    step(Trace_ELBO(), locals_only, guide, optim, (x,), {})
    before = {name: p.clone() for name, p in pyro.get_param_store()._params.items()}
    moments = copy.deepcopy(optim.get_state())
    with pytest.raises(error):
        step(Broken(outcome), locals_only, guide, optim, (x,), {})
    params = pyro.get_param_store()._params
    assert all(params[name].equal(value) for name, value in before.items())
    assert all(p.grad is None or not p.grad.any() for p in params.values())
    assert repr(optim.get_state()) == repr(moments)


class BadGradient(torch.autograd.Function):
    """The identity with a gradient that is NaN."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.nan


def test_a_gradient_that_is_not_finite_is_named():
    def bad_guide(x):
        loc = BadGradient.apply(pyro.param("loc", torch.tensor(0.3)))
        pyro.param("unused", torch.zeros(0))
        scale = pyro.param("scale", torch.tensor(0.7), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale))

    words = r"gradient of 'loc' \(1 of 3 parameters in all\) is NaN or infinite though the loss is finite"
    with pytest.raises(NonFiniteError, match=words):
        step(Trace_ELBO(), locals_only, bad_guide, pyro.optim.Adam({"lr": 0.1}), (torch.zeros(5),), {})
    assert pyro.param("loc").item() == 0.3 and pyro.param("scale").item() == pytest.approx(0.7)


def test_a_sparse_gradient_passes():
    table = nn.Embedding(5, 1, sparse=True)

    def sparse_guide(x):
        pyro.module("table", table)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(table(torch.zeros(len(x), dtype=torch.long))[:, 0]))

    step(Trace_ELBO(), locals_only, sparse_guide, pyro.optim.SparseAdam({"lr": 0.1}), (torch.ones(4),), {})


# Optimisers.


def test_the_default_is_adam_and_stays():
    first = optimiser.choose(None, {}, None, None)
    assert optimiser.name_of(first) == "Adam" and first.pt_optim_args == {"lr": 1e-3}
    assert optimiser.choose(first, {}, None, None) is first
    assert optimiser.choose(None, {}, None, 0.5).pt_optim_args == {"lr": 0.5}


def test_a_given_optimiser_is_copied_without_its_state():
    given = pyro.optim.ClippedAdam({"lr": 0.1})
    step(Trace_ELBO(), locals_only, guide, given, (torch.zeros(5),), {})
    chosen = optimiser.choose(None, {}, given, None)
    assert chosen is not given and given.optim_objs and not chosen.optim_objs
    assert optimiser.name_of(chosen) == "ClippedAdam"


@pytest.mark.parametrize(
    "given", [torch.optim.Adam, torch.optim.Adam([torch.zeros(1)]), "adam", 1e-3], ids=repr
)
def test_another_optimiser_than_pyros_is_refused(given):
    with pytest.raises(ProgramError, match=r"optim is a (Adam|str|float): expected one of pyro.optim"):
        optimiser.choose(None, {}, given, None)


def test_a_learning_rate_does_not_go_with_an_optimiser_or_a_schedule():
    adam = pyro.optim.Adam({"lr": 0.1})
    with pytest.raises(ProgramError, match=r"lr=0.2 is for the default optimiser, but optim is given"):
        optimiser.choose(None, {}, adam, 0.2)
    schedule = pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.SGD, "optim_args": {"lr": 1.0}, "gamma": 0.5}
    )
    for current in (schedule, pyro.optim.Adam(lambda name: {"lr": 0.1})):
        with pytest.raises(
            ProgramError, match=r"lr=0.2 .* (ExponentialLR\(SGD\)|Adam) sets the learning rate itself"
        ):
            optimiser.choose(current, {}, None, 0.2)


def test_moving_an_optimiser_moves_its_moments():
    optim = pyro.optim.Adam({"lr": 0.1})
    step(Trace_ELBO(), locals_only, guide, optim, (torch.zeros(5),), {})
    optimiser.move(optim, torch.device("meta"))
    states = [state for one in optim.optim_objs.values() for state in one.state.values()]
    assert states and all(state["exp_avg"].device.type == "meta" for state in states)
    assert all(state["step"].device.type == "cpu" for state in states)


def test_data_are_drawn_with_replacement_where_they_are_compared():
    """Also a batch that is all of them; but never along a dimension that is no data plate."""

    def model(x):
        with pyro.plate("data", len(x)):
            scale = pyro.param("scale", torch.tensor(1.0))
            pyro.sample("x", Implicit(scale * torch.randn(len(x))), obs=x)

    def series(x):
        with pyro.plate("data", x.shape[-1]):
            scale = pyro.param("scale", torch.tensor(1.0))
            pyro.sample("x", Implicit(scale * torch.randn(x.mT.shape), event_dim=1), obs=x.mT)

    def drawn(model, x, batch_size, loss):
        batches = Minibatches((x,), {}, batch_size)
        pyro.clear_param_store()
        Trainer(model, lambda x: None, loss, None, batches, [])
        return batches.draw()[0][0]

    x = torch.arange(64.0)
    for batch_size in (32, 64, 100):
        batch = drawn(model, x, batch_size, Trace_DataSinkhorn(match_size=8))
        assert len(batch) == min(batch_size, 64)
        assert len(batch.unique()) < len(
            batch
        )  # a bootstrap sample without a repetition has probability 1e-8
    assert drawn(model, x, None, Trace_DataSinkhorn(match_size=8)) is x
    assert drawn(model, x, 100, Trace_Sinkhorn()) is x
    rows = torch.randn(8, 40)
    assert drawn(series, rows, 100, Trace_DataSinkhorn(match_size=8)) is rows
