"""The density-free distribution: draws, shapes, supports, and what it says when asked for a density."""

import copy
import pickle

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

from pyro_sinkhorn.distributions import Implicit


@pytest.mark.parametrize("event_dim", [0, 1, 2])
def test_draws_are_the_value(event_dim):
    value = torch.randn(4, 3)
    d = Implicit(value, event_dim=event_dim)
    assert d.has_rsample and not d.has_enumerate_support
    assert d.batch_shape + d.event_shape == (4, 3) and d.event_dim == event_dim
    assert d() is value and torch.equal(d.sample(), value) and d.mean is value
    assert torch.equal(d.sample((2, 5)), value.expand(2, 5, 4, 3))
    assert d.rsample((2,)).shape == d.shape((2,))


def test_gradients_flow_through_draws():
    raw = torch.randn(3, requires_grad=True)
    d = Implicit(raw.exp(), event_dim=1)
    (gradient,) = torch.autograd.grad(d.rsample((2,)).sum(), raw)
    torch.testing.assert_close(gradient, 2 * raw.exp())
    assert d().requires_grad and d.expand((5,))().requires_grad
    assert not d.sample().requires_grad  # torch's convention for sample


def test_expand_and_to_event():
    d = Implicit(torch.randn(4, 3), event_dim=1, support=constraints.simplex, validate_args=True)
    wide = d.expand((5, 4))
    assert isinstance(wide, Implicit) and wide.batch_shape == (5, 4) and wide.event_shape == (3,)
    assert wide._validate_args and wide.support is constraints.simplex
    assert torch.equal(wide(), d.value.expand(5, 4, 3))
    event = d.to_event(1)
    assert event.batch_shape == () and event.event_shape == (4, 3)
    assert event.support.event_dim == 2
    assert d.mask(False).log_prob(d.value).shape == (4,)  # a masked site needs no density


def test_support():
    assert Implicit(torch.zeros(3)).support is constraints.real
    vector = Implicit(torch.zeros(4, 3), event_dim=1).support
    assert vector.event_dim == 1 and vector.check(torch.zeros(4, 3)).shape == (4,)
    assert (
        Implicit(torch.ones(4, 3) / 3, event_dim=1, support=constraints.simplex).support
        is constraints.simplex
    )
    wrapped = Implicit(torch.ones(4, 3) / 3, event_dim=2, support=constraints.simplex).support
    assert wrapped.event_dim == 2 and wrapped.check(torch.ones(4, 3) / 3)
    positive = Implicit(torch.ones(4, 3), event_dim=1, support=constraints.positive).support
    assert positive.event_dim == 1 and not positive.check(-torch.ones(3))
    assert Implicit(torch.ones(2), support=dist.Uniform(0.0, 2.0).support).support.upper_bound == 2


def test_log_prob_explains_itself():
    d = Implicit(torch.zeros(4, 3), event_dim=1)
    for asker in (d, d.expand((5, 4)), d.to_event(1)):
        with pytest.raises(NotImplementedError) as error:
            asker.log_prob(d.value)
        message = str(error.value)
        for word in (
            "Implicit has no density",
            "Trace_ELBO",
            "pyro_sinkhorn.Trace_Sinkhorn",
            "event_shape (3,)",
        ):
            assert word in message
    for refused in (d.enumerate_support, d.entropy, lambda: d.variance):
        with pytest.raises(NotImplementedError):
            refused()


def test_integer_and_boolean_values():
    d = Implicit(torch.tensor([0, 2, 1]), support=constraints.nonnegative_integer)
    assert d().dtype == torch.int64 and d.support.is_discrete
    assert Implicit(torch.tensor([True])).sample((2,)).dtype == torch.bool


def test_copies():
    d = Implicit(torch.arange(3.0), event_dim=1, support=constraints.ordered_vector)
    for twin in (copy.deepcopy(d), pickle.loads(pickle.dumps(d))):
        assert torch.equal(twin(), d.value) and twin.support.event_dim == 1
    assert "Implicit" in repr(d)


def test_errors():
    with pytest.raises(TypeError, match="must be a torch.Tensor, but got float"):
        Implicit(1.0)
    with pytest.raises(ValueError, match=r"between 0 and 1, .* \(shape \(3,\)\), but got 2"):
        Implicit(torch.zeros(3), event_dim=2)
    with pytest.raises(ValueError, match="but got -1"):
        Implicit(torch.zeros(3), event_dim=-1)
    with pytest.raises(TypeError, match="event_dim must be an int, but got 1.0"):
        Implicit(torch.zeros(3), event_dim=1.0)
    with pytest.raises(TypeError, match="support must be a constraint such as .*, got 'simplex'"):
        Implicit(torch.zeros(3), event_dim=1, support="simplex")
    with pytest.raises(ValueError, match=r"events of 1 dimensions, but event_dim is 0; pass event_dim=1"):
        Implicit(torch.zeros(3), support=constraints.simplex)
    with pytest.raises(ValueError, match="depends on parameters"):
        Implicit(torch.zeros(3), support=dist.Uniform.support)
