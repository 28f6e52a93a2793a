"""Auxiliary runs: out of sight, no further than needed, without a mark on module buffers."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from pyro_sinkhorn import runs
from pyro_sinkhorn.errors import NonFiniteError, ProgramError
from pyro_sinkhorn.runs import preserved_buffers, run_model, subsamples

X = torch.randn(8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Counter:
    """A decoder that counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, z):
        self.calls += 1
        return z


@pytest.fixture
def decoder():
    return Counter()


@pytest.fixture
def model(decoder):
    def program(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            w = pyro.sample("w", dist.Normal(z, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(w), 1.0).to_event(1), obs=x)

    return program


def test_a_run_goes_to_the_end_unless_told_where_to_stop(model, decoder):
    assert set(run_model(model, (X,), {}).nodes) >= {"data", "z", "w", "x"}
    assert decoder.calls == 1
    trace = run_model(model, (X,), {}, stop_after=("w", "z"))
    assert "w" in trace.nodes
    assert "x" not in trace.nodes
    assert decoder.calls == 1
    assert "w" not in run_model(model, (X,), {}, stop_after=["z"]).nodes


def test_a_site_to_stop_after_that_never_comes_lets_the_model_end(model, decoder):
    assert "x" in run_model(model, (X,), {}, stop_after=["z", "never"]).nodes
    assert decoder.calls == 1


def test_runs_are_hidden_from_handlers_outside(model):
    with poutine.trace() as outer, poutine.scale(scale=2.0), pyro.plate("outer", 3, dim=-2):
        inner = run_model(model, (X,), {})
    assert [name for name, site in outer.trace.nodes.items() if site["type"] == "sample"] == ["outer"]
    assert inner.nodes["z"]["value"].shape == (8, 2)
    assert inner.nodes["z"]["scale"] == 1


def test_handlers_around_the_model_itself_count(model):
    inner = run_model(poutine.scale(model, scale=2.0), (X,), {})
    assert inner.nodes["z"]["scale"] == 2


def test_leaving_a_model_early_leaves_no_handler_behind(model):
    for _ in range(3):
        run_model(model, (X,), {}, stop_after=["z"])
    assert not pyro.poutine.runtime._PYRO_STACK
    with pyro.plate("data", 4) as index:  # its dimension is free again
        assert pyro.sample("z", dist.Normal(0.0, 1.0)).shape == (4,)
        assert len(index) == 4


def test_values_are_put_in_for_latents_and_sub_samples_but_not_for_data():
    def model(x):
        with pyro.plate("data", 8, subsample_size=3) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index, 0])

    index, z = torch.tensor([5, 1, 7]), torch.tensor([1.0, 2.0, 3.0])
    trace = run_model(model, (X,), {}, values={"data": index, "z": z, "x": torch.zeros(3)})
    assert torch.equal(trace.nodes["z"]["value"], z)
    assert torch.equal(trace.nodes["x"]["value"], X[index, 0])
    assert torch.equal(subsamples(trace)["data"], index)
    assert not torch.equal(subsamples(run_model(model, (X,), {}))["data"], index)


def test_a_graph_is_kept_only_on_request():
    def model():
        loc = pyro.param("loc", torch.tensor(1.0))
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(loc, 1.0))

    assert not run_model(model, (), {}).nodes["z"]["value"].requires_grad
    assert run_model(model, (), {}, grad=True).nodes["z"]["value"].requires_grad
    with torch.no_grad():
        assert not run_model(model, (), {}, grad=True).nodes["z"]["value"].requires_grad


def batch_norm_state(module):
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def assert_same(before, module):
    for name, buffer in module.named_buffers():
        assert torch.equal(before[name], buffer), name


def test_buffers_are_put_back():
    norm = nn.BatchNorm1d(2)
    before, tensors = batch_norm_state(norm), dict(norm.named_buffers())
    with preserved_buffers():
        norm(X)
        norm(3 * X)
        assert norm.num_batches_tracked == 2
    assert_same(before, norm)
    assert all(tensors[name] is buffer for name, buffer in norm.named_buffers())
    norm(X)
    assert norm.num_batches_tracked == 1


def test_buffers_are_put_back_when_the_model_fails_or_is_left_early():
    norm = nn.BatchNorm1d(2)
    before = batch_norm_state(norm)

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(norm(x), 1.0).to_event(1))
        raise KeyError("later")

    run_model(model, (X,), {}, stop_after=["z"])
    with pytest.raises(KeyError):
        run_model(model, (X,), {})
    assert_same(before, norm)


def test_a_graph_built_through_preserved_buffers_can_be_differentiated():
    norm = nn.BatchNorm1d(2).eval()  # in eval mode the graph refers to the buffers
    with preserved_buffers():
        inside = norm(X).sum()
    norm.train()(X)
    norm.zero_grad()
    inside.backward()
    assert norm.weight.grad.isfinite().all()


def test_nested_preservation():
    norm = nn.BatchNorm1d(2)
    before = batch_norm_state(norm)
    with preserved_buffers():
        norm(X)
        with preserved_buffers():
            norm(X)
            assert norm.num_batches_tracked == 2
        assert norm.num_batches_tracked == 1
    assert_same(before, norm)


# Errors inside a run are explained


def test_an_empty_plate():
    def model(x, names):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(
        ProgramError, match=r"plate of the model has size 0.*argument 0 \(0, 2\), argument 'names'\['a'\]"
    ):
        run_model(model, (X[:0],), {"names": {"a": torch.zeros(3), "b": "c"}})


def test_a_prior_that_cannot_be_sampled():
    class Unsampled(dist.Normal):
        def rsample(self, sample_shape=()):
            raise NotImplementedError("no sampler yet")

    def model():
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("z", Unsampled(torch.zeros(2), 1.0).to_event(1))

    with pytest.raises(ProgramError, match=r"'z': its Unsampled cannot be sampled \(no sampler yet\)"):
        run_model(model, (), {})


@pytest.mark.parametrize("n", [4, 2000])  # of a long tensor, torch's message shows no NaN
def test_nan_is_traced_to_its_cause(n):
    x = torch.zeros(n)
    bad = x.clone()
    bad[n // 2] = torch.nan

    def model(x, offset):
        with pyro.plate("data", n):
            z = pyro.sample("z", dist.Normal(x, 1.0))
            pyro.sample("w", dist.Normal(z + offset, 1.0))

    with pytest.raises(NonFiniteError, match=rf"^argument 0 of the model.* in 1 rows \(first: {n // 2}\)"):
        run_model(model, (bad, 0.0), {})
    with pytest.raises(NonFiniteError, match=r"^site 'z' of the model.* in 1 rows"):
        run_model(model, (x, 0.0), {}, values={"z": bad})
    with pytest.raises(
        NonFiniteError, match=r"^the model made NaN after its sites \['z'\], of finite arguments"
    ):
        run_model(lambda x: model(x, bad), (x,), {})


def test_parameters_that_are_not_valid_though_finite():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("w", dist.Normal(z, -torch.ones(len(x))))

    with pytest.raises(
        ProgramError, match=r"after its sites \['z'\] that is not valid: parameter scale.*GreaterThan"
    ):
        run_model(model, (X,), {})


def test_errors_of_the_users_own_pass_unchanged():
    def model():
        _ = 1 / 0

    with pytest.raises(ZeroDivisionError, match="division by zero"):
        run_model(model, (), {})

    def other():
        raise NotImplementedError("later")

    with pytest.raises(NotImplementedError, match="later"):
        run_model(other, (), {})


class Faulty(dist.Normal):
    """Draws NaN the first few times."""

    failures = 0

    def rsample(self, sample_shape=()):
        value = super().rsample(sample_shape)
        if Faulty.failures:
            Faulty.failures -= 1
            value = torch.where(torch.arange(len(value)) == 0, torch.nan, value)
        return value


def test_a_prior_that_draws_nan_now_and_then_is_drawn_again(monkeypatch):
    monkeypatch.setattr(runs, "_WARNED", set())

    def model():
        with pyro.plate("data", 5):
            pyro.sample("z", Faulty(torch.zeros(5), 1.0, validate_args=False))

    Faulty.failures = 1
    with pytest.warns(UserWarning, match="the prior of 'z', a Faulty in torch.float64, drew NaN"):
        assert run_model(model, (), {}, stop_after=["z"]).nodes["z"]["value"].isfinite().all()
    Faulty.failures = 5
    # said once; and given up after three runs
    assert not run_model(model, (), {}, stop_after=["z"]).nodes["z"]["value"].isfinite().all()
    Faulty.failures = 0
    given = {"z": torch.full((5,), torch.nan)}
    assert run_model(model, (), {}, values=given, stop_after=["z"]).nodes["z"]["value"].isnan().all()
