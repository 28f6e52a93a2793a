"""Networks that nobody would train, and encoders that would read the wrong tensor."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.nn import PyroModule
from pyro.optim import Adam
from torch import nn

from pyro_sinkhorn import AutoImplicit, Implicit, Trace_Sinkhorn
from pyro_sinkhorn.errors import ProgramError


def svi(model, guide):
    return SVI(model, guide, Adam({"lr": 1e-3}), Trace_Sinkhorn(match_size=8))


def make(register_decoder, register_encoder):
    decoder, encoder = nn.Linear(2, 3), nn.Linear(3, 4)

    def model(x):
        if register_decoder:
            pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x):
        if register_encoder:
            pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, scale = encoder(x).chunk(2, -1)
            pyro.sample("z", Implicit(loc + scale.exp() * torch.randn_like(scale), event_dim=1))

    return model, guide


@pytest.mark.parametrize(("decoder", "encoder"), [(False, True), (True, False), (False, False)])
def test_unregistered_networks_are_named_once(decoder, encoder):
    step = svi(*make(decoder, encoder))
    x = torch.randn(16, 3)
    expected = [name for name, given in (("decoder", decoder), ("encoder", encoder)) if not given]
    with pytest.warns(UserWarning, match="never train") as caught:
        step.step(x)
    assert len(caught) == 1
    assert str(expected) in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step.step(x)


def test_registered_networks_and_pyro_modules_are_quiet():
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.decoder = nn.Linear(2, 3)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    x = torch.randn(16, 3)
    model = Model()
    for pair in (make(True, True), (model, AutoImplicit(model))):
        pyro.clear_param_store()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            svi(*pair).step(x)


def test_the_look_at_networks_shifts_no_random_numbers():
    x = torch.randn(16, 3)
    values = []
    for checked in (False, True):
        pyro.clear_param_store()
        torch.manual_seed(0)
        model, guide = make(True, True)
        loss = Trace_Sinkhorn(match_size=8)
        loss._checked_registration = checked
        step = SVI(model, guide, Adam({"lr": 1e-3}), loss)
        values.append([step.step(x) for _ in range(2)])
    assert values[0] == values[1]


def test_an_encoder_that_reads_another_tensor_is_told():
    def model(x, y, swap=False):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=y if swap else x)

    step = svi(model, AutoImplicit(model))
    x, y = torch.randn(2, 16, 3)
    step.step(x, y)
    with pytest.raises(ProgramError, match="encoder_input"):
        step.step(x, y, swap=True)
    pyro.clear_param_store()
    chosen = svi(model, AutoImplicit(model, encoder_input=lambda x, y, swap=False: y if swap else x))
    chosen.step(x, y)
    chosen.step(x, y, swap=True)


def test_a_name_already_taken_is_told():
    x = torch.randn(16, 3)
    svi(*make(True, True)).step(x)
    with pytest.warns(UserWarning, match="clear_param_store"):
        svi(*make(True, True)).step(x)
