"""Which modules a model can reach, and how a program borrows them."""

import copy
import functools
import sys
import types
from contextlib import suppress

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.nn import PyroModule
from torch import nn

from pyro_sinkhorn.modules import (
    Owned,
    copied_initial_values,
    find_modules,
    shared_copy,
    training_mode,
)
from pyro_sinkhorn.recovery import kept_on_error

NET, OTHER = nn.Linear(2, 2), nn.Linear(3, 3)
TABLE = {"first": [NET, (OTHER,)]}
ITSELF = []
ITSELF.append(ITSELF)


def uses_global(x):
    return NET(x)


def calls_another(x):
    return uses_global(x)


def uses_container(x):
    return TABLE["first"][0](x)


def nested(x):
    def inner():
        return [NET(row) for row in x]

    return inner()


def with_default(x, net=NET, *, other=OTHER):
    return other(net(x))


def with_attribute(x):
    return with_attribute.net(x)


with_attribute.net = NET


def refers_to_itself(x):
    return refers_to_itself(ITSELF)


class Holder:
    """Methods and attributes of every kind."""

    shared = OTHER

    def __init__(self):
        self.net = NET

    def model(self, x):
        return self.net(x)

    def helper_uses_a_global(self, x):
        return self.helper(x)

    def helper(self, x):
        return OTHER(x)

    @staticmethod
    def static(x):
        return NET(x)

    @classmethod
    def of_class(cls, x):
        return cls.shared(x)

    @property
    def decoder(self):
        return NET


class Caller:
    __slots__ = ("net",)

    def __init__(self, net):
        self.net = net

    def __call__(self, x):
        return self.net(x)


class Unregistered(nn.Module):
    def __init__(self):
        super().__init__()
        self.own = nn.Linear(1, 1)
        self.hidden = [NET]

    def forward(self, x):
        return OTHER(self.hidden[0](x))


def closure():
    net = NET
    return lambda x: net(x)


def decorated():
    def decorator(fn):
        @functools.wraps(fn)
        def wrapper(*args):
            return fn(*args)

        return wrapper

    return decorator(uses_global)


def in_module(name, value):
    module = types.ModuleType(name)
    module.thing = value
    return module


def network_elsewhere(x):
    return elsewhere.thing(x)  # noqa: F821 put into the globals by a test


FINDS = {
    "global": (uses_global, {NET}),
    "closure": (closure(), {NET}),
    "function that it calls": (calls_another, {NET}),
    "container": (uses_container, {NET, OTHER}),
    "nested function": (nested, {NET}),
    "defaults": (with_default, {NET, OTHER}),
    "attribute of the function": (with_attribute, {NET}),
    "method": (Holder().model, {NET, OTHER}),
    "global in a helper method": (Holder().helper_uses_a_global, {NET, OTHER}),
    "static method": (Holder.static, {NET}),
    "class method": (Holder.of_class, {NET, OTHER}),
    "callable object": (Caller(NET), {NET}),
    "partial": (functools.partial(uses_container, net=OTHER), {NET, OTHER}),
    "partial of a method": (functools.partial(Holder.model, Holder()), {NET, OTHER}),
    "cached": (functools.cache(uses_global), {NET}),
    "functools.wraps": (decorated(), {NET}),
    "no_grad": (torch.no_grad()(uses_global), {NET}),
    "condition": (pyro.condition(uses_global, data={"x": torch.zeros(1)}), {NET}),
    "scale": (poutine.scale(closure(), 0.5), {NET}),
    "mask of block": (poutine.mask(poutine.block(uses_global), mask=True), {NET}),
    "enumerate": (config_enumerate(uses_global), {NET}),
    "handler of a method": (poutine.uncondition(Holder().model), {NET, OTHER}),
    "handler of a module": (poutine.scale(NET, 2.0), {NET}),
    "nothing": (lambda x: dist.Normal(x, 1), set()),
    "itself": (refers_to_itself, set()),
}


@pytest.mark.parametrize(("fn", "expected"), FINDS.values(), ids=FINDS)
def test_every_module_within_reach_is_found(fn, expected):
    assert set(find_modules(fn).values()) == expected


@pytest.mark.parametrize("value", [NET, lambda x: NET(x)], ids=["module", "function"])
def test_attributes_of_python_modules_are_found(monkeypatch, value):
    module = in_module("elsewhere", value)
    monkeypatch.setitem(globals(), "elsewhere", module)
    assert NET in find_modules(network_elsewhere).values()
    package = in_module("package", None)
    package.elsewhere = module
    monkeypatch.setitem(globals(), "elsewhere", package)
    monkeypatch.setitem(sys.modules, "package", package)

    def imports_inside(x):
        import package

        return package.elsewhere.thing(x)

    assert NET in find_modules(imports_inside).values()


def test_a_module_is_found_with_what_it_does_not_register():
    module = Unregistered()
    found = find_modules(module)
    assert found == {"model": module, "model.hidden.0": NET, "OTHER": OTHER}


def test_names_are_those_of_the_users_and_unlike_each_other():
    def make():
        decoder, encoder, preset = nn.Linear(2, 2), [nn.Linear(2, 2)], nn.Linear(3, 3)

        def inner(decoder=preset):
            return decoder

        return lambda x: inner(decoder(encoder[0](x)))

    assert set(find_modules(make())) == {"decoder", "encoder.0", "default0"}

    def first(net=NET):
        return net

    def second(net=OTHER):
        return net

    assert find_modules((first, second)) == {"default0": NET, "default0_": OTHER}


def test_a_bound_method_is_named_by_its_function():
    class Net(PyroModule):
        def model(self, x):
            return x

    net = Net()
    assert find_modules(net.model) == {"model": net}


def test_a_variable_not_assigned_yet_is_passed_over():
    def make():
        def model(x):
            return later(x)

        found = find_modules(model)
        later = NET
        return found, model, later

    found, model, _ = make()
    assert found == {} and find_modules(model) == {"later": NET}


def test_large_and_odd_data_in_a_closure_do_no_harm():
    rows = [[float(i)] * 5 for i in range(2000)]

    class Odd:
        def __getattr__(self, name):
            raise RuntimeError(name)

        def __eq__(self, other):
            raise RuntimeError("==")

        __hash__ = None

    odd = Odd()
    deep = NET
    for _ in range(5):
        deep = {"in": deep}
    cyclic = {}
    cyclic["self"] = cyclic

    def model(x):
        return rows, odd, deep, cyclic

    assert list(find_modules(model).values()) == [NET]


# Owning.


def test_originals_hold_the_copies_tensors_inside_and_their_own_outside():
    norm = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    before = copy.deepcopy(norm.state_dict())
    mine = norm[0].weight
    owned = Owned({"norm": norm})
    owned.copies["norm"].eval()
    with owned.active(), torch.no_grad():
        assert norm[0].weight is owned.copies["norm"][0].weight and not norm[1].training
        norm[0].weight.fill_(3.0)
        norm.train()(torch.randn(8, 2))
        with owned.active():
            assert float(norm[0].weight.mean()) == 3.0
        norm[0].weight = nn.Parameter(torch.full((2, 2), 4.0))  # replaced, not changed
    assert norm[0].weight is mine and norm.training and norm[1].training
    assert all(norm.state_dict()[name].equal(value) for name, value in before.items())
    assert float(owned.copies["norm"][0].weight.detach().mean()) == 4.0
    assert int(owned.copies["norm"][1].num_batches_tracked) == 1


def test_an_error_inside_puts_everything_back():
    net = nn.Linear(2, 2)
    owned = Owned({"net": net})
    weight = net.weight
    pyro.param("outside", torch.zeros(1))
    with suppress(KeyError), owned.active():
        pyro.param("inside", torch.ones(1))
        raise KeyError
    assert net.weight is weight and list(pyro.get_param_store().keys()) == ["outside"]
    assert list(owned.store["params"]) == ["inside"]
    with owned.active():
        assert list(pyro.get_param_store().keys()) == ["inside"]


def test_modules_that_share_weights_share_them_in_the_copies():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.weight = first.weight
    owned = Owned({"first": first, "second": second, "both": nn.Sequential(first, second)})
    copies = owned.copies
    assert copies["first"].weight is copies["second"].weight is copies["both"][0].weight
    assert copies["first"] is copies["both"][0]
    with owned.active():
        pass
    assert copies["first"].weight is not first.weight and first.weight is second.weight


def test_an_entry_made_inside_goes_to_the_copy_alone():
    net = nn.Linear(2, 2)
    owned = Owned({"net": net})
    with owned.active():
        net.register_parameter("extra", nn.Parameter(torch.ones(1)))
        net.register_buffer("seen", torch.ones(1))
    assert not hasattr(net, "extra") and not hasattr(net, "seen")
    assert float(owned.copies["net"].extra.detach()) == 1
    with owned.active():
        assert hasattr(net, "extra") and hasattr(net, "seen")


def test_shared_copy_keeps_and_replaces():
    kept, old, new = nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1)
    guide = {"kept": kept, "old": [old], "own": nn.Linear(1, 1)}
    made = shared_copy(guide, kept, replaced=[(old, new)])
    assert made["kept"] is kept and made["old"][0] is new and made["own"] is not guide["own"]


def test_mode_inside_and_every_mode_put_back():
    net = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.Dropout(), nn.Dropout()))
    net[1][0].eval()
    before = [module.training for module in net.modules()]
    with suppress(KeyError), training_mode([net], False):
        assert not any(module.training for module in net.modules())
        net.append(nn.Dropout().eval())
        raise KeyError
    assert [module.training for module in net.modules()] == [*before, True]


@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
def test_buffers_go_back_after_an_error_and_stay_without_one(error):
    norm = nn.BatchNorm1d(2)
    with kept_on_error([norm]):
        norm(torch.randn(5, 2))
    mean = norm.running_mean.clone()
    held = norm.running_mean
    with suppress(error), kept_on_error([norm]):
        norm(torch.full((5, 2), torch.nan))
        norm.running_var = torch.full((2,), torch.nan)
        raise error
    assert norm.running_mean is held and held.equal(mean) and norm.running_var.isfinite().all()
    assert int(norm.num_batches_tracked) == 1


def test_initial_values_are_copied_inside_only():
    value, store = torch.zeros(2), pyro.get_param_store()
    with copied_initial_values(), copied_initial_values():
        inside = pyro.param("inside", value)
        parameter = nn.Parameter(torch.zeros(2))
        assert pyro.param("module's", parameter) is parameter
        assert pyro.param("made", lambda: value) is not value
        assert pyro.param("inside", lambda: 1 / 0) is inside
        positive = pyro.param("positive", torch.ones(2), constraint=dist.constraints.positive)
        torch.testing.assert_close(positive, torch.ones(2))
    assert inside is not value and not value.requires_grad
    assert "setdefault" not in vars(store)
    assert pyro.param("outside", value) is value  # as ever
