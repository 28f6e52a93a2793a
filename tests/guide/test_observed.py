"""What the encoder reads: observed values, without running the decoder where an argument tells them."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_sinkhorn import AutoImplicit
from pyro_sinkhorn.guide.observed import find_observed, read_observed
from pyro_sinkhorn.runs import run_model, subsamples
from pyro_sinkhorn.structure import structure_of

N, B = 12, 5


class Reader:
    """Reads the observed values of a model, as AutoImplicit does, and counts the calls of its decoder."""

    def __init__(self, model):
        self.model = model
        self.calls = 0

    def decoder(self, z):
        self.calls += 1
        return z

    def find(self, *args, **kwargs):
        trace = run_model(self.model, args, kwargs)
        self.observed = find_observed(trace, structure_of(trace), args, kwargs, subsamples(trace))
        self.calls = 0
        return self

    def read(self, *args, **kwargs):
        """What the encoder reads, and what the model observes."""
        trace = run_model(self.model, args, kwargs)
        indices = subsamples(trace)
        self.calls = 0
        values = read_observed(
            self.observed, args, kwargs, indices, lambda: run_model(self.model, args, kwargs, values=indices)
        )
        return values, {site.name: trace.nodes[site.name]["value"] for site in self.observed}


def data(seed, n=N, *shape):
    return torch.randn(n, *(shape or (4,)), generator=torch.Generator().manual_seed(seed))


def observe(decoder, x, name="x", plate="data"):
    with pyro.plate(plate, len(x)):
        z = pyro.sample(f"z_{name}", dist.Normal(0.0, 1.0))
        mean = decoder(z).reshape(-1, *[1] * (x.dim() - 1))
        pyro.sample(name, dist.Normal(mean, 1.0).expand(x.shape).to_event(x.dim() - 1), obs=x)


def same(values, truth):
    assert values.keys() == truth.keys()
    return all(torch.equal(values[name], truth[name]) for name in truth)


# Each: a model, and its arguments made of a seed and a number of data.
DIRECT = {
    "argument": (lambda r: lambda x: observe(r.decoder, x), lambda s, n: ((data(s, n),), {})),
    "keyword": (lambda r: lambda *, x: observe(r.decoder, x), lambda s, n: ((), {"x": data(s, n)})),
    "list": (
        lambda r: lambda xs: observe(r.decoder, xs[1]),
        lambda s, n: (([data(s + 1, n), data(s, n)],), {}),
    ),
    "dict": (lambda r: lambda d: observe(r.decoder, d["x"]), lambda s, n: (({"x": data(s, n), "n": n},), {})),
    "dict in a keyword": (
        lambda r: lambda batch=None: observe(r.decoder, batch["x"]),
        lambda s, n: ((), {"batch": {"y": data(s + 1, n), "x": data(s, n)}}),
    ),
    "reshaped": (
        lambda r: lambda x: observe(r.decoder, x.reshape(len(x), -1)),
        lambda s, n: ((data(s, n, 2, 3),), {}),
    ),
    "viewed": (lambda r: lambda x: observe(r.decoder, x.view(-1, 6)), lambda s, n: ((data(s, n, 2, 3),), {})),
    "folded": (
        lambda r: lambda x: observe(r.decoder, x.reshape(-1, 1, 2, 3)),
        lambda s, n: ((data(s, n, 6),), {}),
    ),
    "with a covariate": (
        lambda r: lambda c, x: observe(r.decoder, x),
        lambda s, n: ((data(s + 1, n), data(s, n)), {}),
    ),
}


@pytest.mark.parametrize("kind", DIRECT)
def test_a_value_that_is_an_argument_is_read_without_the_decoder(kind):
    make, arguments = DIRECT[kind]
    reader = Reader(None)
    reader.model = make(reader)
    first, rest = arguments(0, N)
    reader.find(*first, **rest)
    for seed, n in [(1, N), (2, B)]:  # other values, another batch size
        args, kwargs = arguments(seed, n)
        values, truth = reader.read(*args, **kwargs)
        assert same(values, truth)
        assert len(values["x"]) == n
        assert reader.calls == 0


def sub_sampled(reader, factor=None):
    def model(x):
        with pyro.plate("data", N, subsample_size=B) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            value = x[index] if factor is None else factor * x[index]
            event = reader.decoder(z).unsqueeze(-1).expand(B, 4)
            pyro.sample("x", dist.Normal(event, 1.0).to_event(1), obs=value)

    return model


def test_a_sub_sample_of_an_argument_is_read_without_the_decoder():
    reader = Reader(None)
    reader.model = sub_sampled(reader)
    reader.find(data(0))
    for seed in (0, 1):
        values, truth = reader.read(data(seed))
        assert same(values, truth)
        assert reader.calls == 0


# Each: an observed value that no argument is.
HIDDEN = {
    "computed": lambda r: lambda x: observe(r.decoder, x / 2),
    "a part": lambda r: lambda x: observe(r.decoder, x[:, :2]),
    "closed over": lambda r: lambda x: observe(r.decoder, CLOSED[: len(x)]),
    "conditioned": lambda r: poutine.condition(
        lambda x: observe_free(r.decoder, len(x)),
        data={"x": CLOSED[:N]},
    ),
    "scaled sub-sample": lambda r: sub_sampled(r, 2.0),
}
CLOSED = data(7, 100)


def observe_free(decoder, n):
    with pyro.plate("data", n):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(decoder(z).unsqueeze(-1), 1.0).expand([n, 4]).to_event(1))


@pytest.mark.parametrize("kind", HIDDEN)
def test_other_values_are_read_by_running_the_model(kind):
    reader = Reader(None)
    reader.model = HIDDEN[kind](reader)
    reader.find(data(0))
    values, truth = reader.read(data(1))
    assert same(values, truth)
    assert reader.calls == 1


def test_the_model_runs_once_for_several_hidden_sites():
    reader = Reader(None)
    reader.model = lambda x: (observe(reader.decoder, x / 2), observe(reader.decoder, 2 * x, "y", "other"))
    reader.find(data(0))
    values, truth = reader.read(data(1))
    assert same(values, truth)
    assert reader.calls == 2  # both decoders, once


def test_two_kinds_of_data_are_read_each_from_its_argument():
    reader = Reader(None)
    reader.model = lambda x, y: (observe(reader.decoder, x), observe(reader.decoder, y, "y", "other"))
    reader.find(data(0), data(1, 7, 2))
    values, truth = reader.read(data(2), data(3, 9, 2))
    assert same(values, truth)
    assert reader.calls == 0


def test_an_argument_left_out_later_is_read_by_running_the_model():
    reader = Reader(None)
    reader.model = lambda x=None: observe(reader.decoder, CLOSED if x is None else x)
    reader.find(CLOSED)
    values, truth = reader.read()
    assert same(values, truth)


@pytest.mark.parametrize("kind", ["argument", "reshaped", "keyword"])
def test_the_decoder_does_not_run_in_the_guide(kind):
    make, arguments = DIRECT[kind]
    reader = Reader(None)
    reader.model = make(reader)
    guide = AutoImplicit(reader.model)
    args, kwargs = arguments(0, N)
    guide(*args, **kwargs)
    reader.calls = 0
    args, kwargs = arguments(1, B)
    assert guide(*args, **kwargs)["z_x"].shape == (B,)
    assert reader.calls == 0
