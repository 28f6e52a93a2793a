"""One Adam for all parameters does what Pyro's own do one by one, and leaves their states where they were."""

import copy

import pyro
import pytest
import torch

from pyro_sinkhorn.optimiser import Together


def made(num: int = 3) -> list[torch.Tensor]:
    """Parameters known to Pyro by name."""
    store = pyro.get_param_store()
    torch.manual_seed(0)
    for i in range(num):
        store[f"p{i}"] = torch.randn(i + 1)
    return [store[f"p{i}"].unconstrained() for i in range(num)]


def steps(update, parameters: list[torch.Tensor], num: int = 4, seed: int = 1) -> None:
    torch.manual_seed(seed)
    for _ in range(num):
        for p in parameters:
            p.grad = torch.randn_like(p)
        update(parameters)


def both(script) -> tuple[list[torch.Tensor], dict, list[torch.Tensor], dict]:
    """Parameters and state after a script, with Pyro's optimiser as it is and with its steps together."""
    found = []
    for wrapped in (False, True):
        pyro.clear_param_store()
        optim = pyro.optim.Adam({"lr": 0.1, "betas": (0.8, 0.95)})
        parameters = made()
        script(Together(optim) if wrapped else optim, optim, parameters)
        found += [[p.detach().clone() for p in parameters], copy.deepcopy(optim.get_state())]
    return tuple(found)


def plain(update, _optim, parameters):
    steps(update, parameters)


def one_comes_late(update, _optim, parameters):
    steps(update, parameters[:2])
    steps(update, parameters)


def learning_rate_changes(update, optim, parameters):
    steps(update, parameters)
    for one in optim.optim_objs.values():
        one.param_groups[0]["lr"] = 0.01
    steps(update, parameters)


def state_is_loaded(update, optim, parameters):
    steps(update, parameters)
    saved = copy.deepcopy(optim.get_state())
    steps(update, parameters)
    for p, state in zip(parameters, saved.values(), strict=True):
        optim.optim_objs[p].load_state_dict(state)
    steps(update, parameters, seed=5)


def one_has_no_gradient(update, _optim, parameters):
    steps(update, parameters)
    parameters[1].grad = None
    update(parameters)
    steps(update, parameters)


@pytest.mark.parametrize(
    "script", [plain, one_comes_late, learning_rate_changes, state_is_loaded, one_has_no_gradient]
)
def test_equal_to_pyros_bit_by_bit(script):
    values, state, together, state_together = both(script)
    assert all(torch.equal(a, b) for a, b in zip(values, together, strict=True))
    for name, one in state.items():
        other = state_together[name]
        assert one["param_groups"] == other["param_groups"]
        for key, value in one["state"][0].items():
            assert torch.equal(value, other["state"][0][key]), key


def test_adam_is_joined_after_its_first_step():
    parameters, update = made(), Together(pyro.optim.Adam({"lr": 0.1}))
    steps(update, parameters, num=1)
    joint = update.joint
    assert joint is not None
    steps(update, parameters, num=2)
    assert update.joint is joint


@pytest.mark.parametrize(
    "optim",
    [
        pyro.optim.SGD({"lr": 0.1}),
        pyro.optim.ClippedAdam({"lr": 0.1}),
        pyro.optim.PyroOptim(torch.optim.Adam, {"lr": 0.1}, {"clip_norm": 1.0}),
        pyro.optim.PyroOptim(torch.optim.Adam, lambda name: {"lr": 0.1 if name == "p0" else 0.2}),
        pyro.optim.ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.9}),
    ],
    ids=["sgd", "clipped adam", "clipping", "unlike settings", "schedule"],
)
def test_other_optimisers_are_left_to_pyro(optim):
    parameters, update = made(), Together(optim)
    before = [p.detach().clone() for p in parameters]
    steps(update, parameters, num=3)
    assert update.joint is None
    assert not any(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
