"""The ways people already work: notebooks, scikit-learn, plain loops, Pyro's and torch's own tools."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive
from pyro.infer.elbo import ELBOModule
from pyro.nn import PyroModule, PyroSample
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from pyro_sinkhorn import AutoImplicit, SinkhornProgram, Trace_Sinkhorn
from pyro_sinkhorn.errors import ProgramError

pytestmark = pytest.mark.filterwarnings("ignore:latent group")
X = torch.randn(64, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def loss():
    return Trace_Sinkhorn(match_size=16)


def make_model(net):
    def model(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Dirichlet(torch.ones(3)))
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(net(z) + w.unsqueeze(-1), 0.5).to_event(1), obs=x)

    return model


def fitted(steps=3):
    program = SinkhornProgram(make_model(nn.Linear(3, 3)), loss=loss())
    return program.fit(X, num_steps=steps, batch_size=64, seed=0, progress=False)


def test_a_notebook_shows_the_program_and_its_reports():
    shown = fitted()._repr_html_()
    for said in (
        "SinkhornProgram",
        "AutoImplicit",
        "match_size=16",
        "net 12",
        "last loss",
        "<svg",
        "encode()",
    ):
        assert said in shown, said
    fresh = SinkhornProgram(make_model(nn.Linear(3, 3)))._repr_html_()
    assert "<svg" not in fresh and "nan" not in fresh
    report = fitted().diagnose(X, seed=0)
    assert report._repr_html_().startswith("<pre") and "match at size 16" in report._repr_html_()


def test_codes_are_a_matrix_for_scikit_learn():
    program = fitted()
    codes = program.transform(X)
    draws = program.encode(X, seed=0)
    np.testing.assert_array_equal(codes[:, :3], draws["z"][0].numpy())
    np.testing.assert_array_equal(codes[:, 3], draws["w"][0].numpy())
    np.testing.assert_array_equal(codes, program.transform(X))
    labels = (X[:, 0] > 0).long().numpy()
    assert KNeighborsClassifier(1).fit(codes, labels).score(codes, labels) == 1.0
    assert program.transform(X.numpy()).shape == (64, 4)


def test_inner_plates_become_columns():
    def nested(x):
        with pyro.plate("groups", 5, dim=-2):
            a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            with pyro.plate("items", 4, dim=-1):
                b = pyro.sample("b", dist.Normal(a[..., 0], 1.0))
                pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    program = SinkhornProgram(nested, loss=Trace_Sinkhorn(match_size=2))
    x = torch.randn(5, 4)
    program.encode(x)  # which makes its networks
    codes = program.transform(x)
    draws = program.encode(x, seed=0)
    np.testing.assert_array_equal(codes[:, :2], draws["a"][0, :, 0].numpy())
    np.testing.assert_array_equal(codes[:, 2:], draws["b"][0].numpy())


def test_globals_alone_make_no_matrix():
    def line(x):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(slope, 1.0), obs=x[:, 0])

    with pytest.raises(ProgramError, match=r"'slope'.*none of them lies in a data plate"):
        SinkhornProgram(line).transform(X)


def test_a_plain_torch_loop():
    net = nn.Linear(3, 3)
    model = make_model(net)
    guide = AutoImplicit(model)
    guide(X)  # makes its networks
    before = net.weight.detach().clone()
    optim = torch.optim.Adam([*net.parameters(), *guide.parameters()], lr=1e-2)
    objective = loss()
    for _ in range(3):
        optim.zero_grad()
        objective.differentiable_loss(model, guide, X).backward()
        optim.step()
    assert not torch.equal(net.weight, before) and all(p.grad is not None for p in guide.parameters())


def test_a_loss_as_a_module_and_pyro_modules():
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.net = PyroModule[nn.Linear](3, 3)
            self.z = PyroSample(dist.Dirichlet(torch.ones(3)))

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(self.net(self.z), 0.5).to_event(1), obs=x)

    model = Model()
    guide = AutoImplicit(model)
    module = loss()(model, guide)
    assert isinstance(module, ELBOModule)
    module(X).backward()
    assert model.net.weight.grad is not None
    program = SinkhornProgram(model, loss=loss()).fit(X, num_steps=2, batch_size=64, seed=0, progress=False)
    assert program.encode(X)["z"].shape == (1, 64, 3)


def test_parameters_of_modules_stay_local_where_pyro_is_told_so():
    with pyro.settings.context(module_local_params=True):
        model = make_model(nn.Linear(3, 3))

        class Owner(PyroModule):
            def __init__(self):
                super().__init__()
                self.net = nn.Linear(3, 3)

            def forward(self, x):
                with pyro.plate("data", len(x)):
                    z = pyro.sample("z", dist.Dirichlet(torch.ones(3)))
                    pyro.sample("x", dist.Normal(self.net(z), 0.5).to_event(1), obs=x)

        model = Owner()
        guide = AutoImplicit(model)
        module = loss()(model, guide)
        module(X)
        optim = torch.optim.Adam(module.parameters(), lr=1e-2)
        module(X).backward()
        optim.step()
        assert len(list(pyro.get_param_store().keys())) == 0


def test_predictive_and_svi():
    model = make_model(nn.Linear(3, 3))
    guide = AutoImplicit(model)
    SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss()).step(X)
    drawn = Predictive(model, guide=guide, num_samples=2)(X)
    assert drawn["z"].shape == (2, 64, 3)
    program = fitted()
    assert Predictive(program, num_samples=2)(X)["z"].shape[:2] == (2, 64)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, while it traces
def test_a_compiled_network():
    net = nn.Linear(3, 3)
    compiled = torch.compile(
        net, backend="eager"
    )  # what inductor makes of it needs a compiler, which not all have

    def model(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Dirichlet(torch.ones(3)))
            pyro.sample("x", dist.Normal(compiled(z), 0.5).to_event(1), obs=x)

    pyro.clear_param_store()
    guide = AutoImplicit(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss())
    before = net.weight.detach().clone()
    svi.step(X)
    assert not torch.equal(net.weight, before)
