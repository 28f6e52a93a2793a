"""A random stream of one's own, swapped in for torch's."""

from contextlib import suppress

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_sinkhorn.rng import RandomStream, undisturbed


def draw(stream, n=3):
    with stream.active():
        return torch.rand(n)


def test_a_stream_is_torchs_own_sequence_under_its_seed():
    torch.manual_seed(5)
    expected = torch.rand(6)
    stream = RandomStream(5)
    assert torch.cat([draw(stream), draw(stream)]).equal(expected)


def test_pyro_draws_from_the_active_stream():
    with RandomStream(5).active():
        inside = pyro.sample("x", dist.Dirichlet(torch.ones(3)))
    torch.manual_seed(5)
    assert pyro.sample("x", dist.Dirichlet(torch.ones(3))).equal(inside)


def test_outside_nothing_moves():
    before = pyro.util.get_rng_state()
    draw(RandomStream(0), 100)
    after = pyro.util.get_rng_state()
    assert after["torch"].equal(before["torch"]) and after["random"] == before["random"]
    assert (after["numpy"][1] == before["numpy"][1]).all()


def test_an_error_inside_puts_the_outside_back_and_keeps_what_was_drawn():
    stream, state = RandomStream(0), torch.get_rng_state()
    with suppress(KeyError), stream.active():
        torch.rand(3)
        raise KeyError
    assert torch.get_rng_state().equal(state)
    reference = RandomStream(0)
    draw(reference)
    assert draw(stream).equal(draw(reference))


def test_streams_that_alternate_equal_streams_alone():
    alone = [torch.cat([draw(RandomStream(seed), 6)]) for seed in (0, 1)]
    pair = [RandomStream(seed) for seed in (0, 1)]
    parts = [[draw(stream, 2) for stream in pair] for _ in range(3)]
    assert torch.cat([part[0] for part in parts]).equal(alone[0])
    assert torch.cat([part[1] for part in parts]).equal(alone[1])


def test_nested_uses_are_one():
    stream = RandomStream(0)
    with stream.active():
        first = torch.rand(3)
        with stream.active():
            second = torch.rand(3)
        third = torch.rand(3)
    assert torch.cat([first, second, third]).equal(draw(RandomStream(0), 9))


def test_one_stream_inside_another():
    inner, outer = RandomStream(0), RandomStream(1)
    with outer.active():
        first = torch.rand(3)
        within = draw(inner)
        second = torch.rand(3)
    assert torch.cat([first, second]).equal(draw(RandomStream(1), 6))
    assert within.equal(draw(RandomStream(0)))


def test_a_restored_stream_continues():
    stream, other = RandomStream(0), RandomStream(99)
    draw(stream)
    other.restore({name: value.clone() for name, value in stream.state().items()})
    assert draw(other, 50).equal(draw(stream, 50))
    assert set(stream.state()) == {"cpu"}  # no CUDA here, or none used


def test_without_a_seed_a_stream_follows_torchs():
    found = []
    for _ in range(2):
        pyro.set_rng_seed(3)
        found.append((draw(RandomStream()), draw(RandomStream())))
    assert found[0][0].equal(found[1][0]) and not found[0][0].equal(found[0][1])


def test_a_look_leaves_the_random_state_as_it_was():
    state = torch.get_rng_state()
    with undisturbed():
        torch.rand(3)
    assert torch.get_rng_state().equal(state)
    with suppress(KeyError), undisturbed():
        torch.rand(3)
        raise KeyError
    assert torch.get_rng_state().equal(state)


@pytest.mark.gpu
def test_a_stream_holds_cudas_state_too():
    torch.rand(1, device="cuda")
    outside = torch.cuda.get_rng_state()

    def draw(stream):
        with stream.active():
            return torch.rand(3, device="cuda")

    stream = RandomStream(0)
    first, state = draw(stream), stream.state()
    second = draw(stream)
    assert torch.cuda.get_rng_state().equal(outside)
    assert draw(RandomStream(0)).equal(first) and not second.equal(first)
    other = RandomStream(1)
    other.restore(state)
    assert draw(other).equal(second)
