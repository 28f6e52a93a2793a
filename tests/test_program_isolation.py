"""Two programs in one process share nothing, and leave everything outside as it was."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_sinkhorn import SinkhornProgram, Trace_Sinkhorn, snapshot
from pyro_sinkhorn.errors import NonFiniteError, ProgramError

LOSS = Trace_Sinkhorn(match_size=8)


def make_model():
    decoder = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 0.5).to_event(1), obs=x)

    return model, decoder


def data(n=40):
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(1))


def fit(program, num_steps=3, **options):
    return program.fit(data(), **{"num_steps": num_steps, "batch_size": 16, "progress": False} | options)


def weights(program):
    state = snapshot.take(program)
    parts = [*state["modules"].values(), state["guide"], {k: v["value"] for k, v in state["params"].items()}]
    return torch.cat([part[key].flatten().double() for part in parts for key in sorted(part)])


def test_fits_that_alternate_equal_fits_alone():
    model, _ = make_model()
    alone = [weights(fit(SinkhornProgram(model, loss=LOSS), 6, seed=seed)) for seed in (0, 1)]
    pair = [SinkhornProgram(model, loss=LOSS) for _ in range(2)]
    for i in range(3):
        for seed, program in enumerate(pair):
            fit(program, 2, **({"seed": seed} if i == 0 else {}))
            program.encode(data(), seed=7)
            program.generate(2, data(), seed=8)
    assert weights(pair[0]).equal(alone[0]) and weights(pair[1]).equal(alone[1])


def test_programs_of_one_function_have_no_tensor_in_common():
    model, decoder = make_model()
    first, second = (fit(SinkhornProgram(model, loss=LOSS)) for _ in range(2))

    def tensors(program):
        modules = [*program.modules.values(), program.guide]
        found = [t for m in modules for t in (*m.parameters(), *m.buffers())]
        return {t.data_ptr() for t in (*found, *program.owned.store["params"].values()) if t.numel()}

    users = {t.data_ptr() for t in (*decoder.parameters(), *decoder.buffers())}
    assert not tensors(first) & tensors(second)
    assert not tensors(first) & users


def test_everything_outside_stays_as_it_was():
    model, decoder = make_model()
    encoder = nn.Linear(3, 4)
    decoder[1].eval()
    pyro.param("decoder$$$0.weight", torch.full((3, 2), 7.0))  # the very name that the model uses
    pyro.param("mine", torch.ones(2), constraint=dist.constraints.positive)
    store = {name: value.clone() for name, value in pyro.get_param_store().items()}
    state = copy.deepcopy({**decoder.state_dict(prefix="d."), **encoder.state_dict(prefix="e.")})
    identities = [id(p) for p in (*decoder.parameters(), *decoder.buffers(), *encoder.parameters())]
    random = pyro.util.get_rng_state()
    program = SinkhornProgram(model, loss=LOSS, encoder=encoder)
    fit(program, seed=0)
    program.encode(data(), seed=0)
    program.generate(3, data(), seed=0)
    program.diagnose(data(), num_floor=2, seed=0)
    program.clone()
    assert torch.get_rng_state().equal(random["torch"])
    assert (pyro.util.get_rng_state()["numpy"][1] == random["numpy"][1]).all()
    assert dict(pyro.get_param_store().items()).keys() == store.keys()
    assert all(pyro.param(name).equal(value) for name, value in store.items())
    now = {**decoder.state_dict(prefix="d."), **encoder.state_dict(prefix="e.")}
    assert all(now[name].equal(value) for name, value in state.items())
    assert [id(p) for p in (*decoder.parameters(), *decoder.buffers(), *encoder.parameters())] == identities
    assert (decoder[0].training, decoder[1].training) == (True, False)
    assert all(p.grad is None for p in (*decoder.parameters(), *encoder.parameters()))
    assert not program.modules["decoder"][1].training
    assert not program.modules["decoder"][0].weight.eq(7).any()


def test_everything_outside_stays_as_it_was_after_an_error():
    model, decoder = make_model()
    before = copy.deepcopy(decoder.state_dict())
    program = SinkhornProgram(model, loss=LOSS)
    random = torch.get_rng_state()
    bad = data()
    bad[3] = torch.nan
    with pytest.raises(NonFiniteError):
        program.fit(bad, num_steps=3, batch_size=40, seed=0, progress=False)
    assert all(decoder.state_dict()[name].equal(value) for name, value in before.items())
    assert len(pyro.get_param_store()) == 0
    assert torch.get_rng_state().equal(random)


def test_one_program_inside_another():
    model, _ = make_model()
    inner, outer = (SinkhornProgram(model, loss=LOSS) for _ in range(2))
    fit(inner, seed=0)
    kept = weights(inner)
    with inner.active():
        fit(outer, seed=1)
        assert pyro.get_param_store()["decoder$$$0.weight"] is inner.modules["decoder"][0].weight
        with inner.active():
            inner.encode(data())
    assert weights(inner).equal(kept)
    assert weights(outer).equal(weights(fit(SinkhornProgram(model, loss=LOSS), seed=1)))


# At this rate latents run to a hundred standard deviations, where transport at a fixed epsilon takes thousands of steps.
@pytest.mark.filterwarnings("ignore:.*the transport stopped")
def test_a_module_that_is_in_two_places_is_lent_once():
    decoder = nn.Linear(2, 3)
    both = nn.ModuleDict({"decoder": decoder, "other": nn.Linear(1, 1)})

    def model(x):
        pyro.module("decoder", both["decoder"])
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 0.5).to_event(1), obs=x)

    before = decoder.weight.detach().clone()
    program = fit(SinkhornProgram(model, loss=LOSS), lr=0.1)
    mine = program.modules["decoder"]
    assert mine is program.modules["both"]["decoder"]
    assert decoder.weight.equal(before) and decoder.weight is not mine.weight
    assert float((mine.weight - before).detach().abs().min()) > 0.05
    fit(program, lr=0.1)
    assert decoder.weight.equal(before)


def test_the_initial_value_of_a_parameter_is_not_trained():
    x = data()
    start = torch.zeros(3)

    def model(x):
        loc = pyro.param("loc", start)
        rows = pyro.param(
            "rows", x[:2]
        )  # a view of the data, as of the inducing points of a Gaussian process
        lazy = pyro.param("lazy", lambda: start)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(loc + lazy + rows.mean(0) * z[:, None], 1.0).to_event(1), obs=x)

    before = x.clone()
    programs = [SinkhornProgram(model, loss=LOSS) for _ in range(2)]
    programs[0].fit(x, num_steps=3, batch_size=None, seed=0, progress=False)
    assert x.equal(before) and start.equal(torch.zeros(3))
    assert not start.requires_grad and not x.requires_grad
    learned = programs[0].owned.store["params"]
    assert learned["loc"].detach().abs().min() > 0 and not learned["loc"].equal(learned["lazy"] + 1)
    programs[1].fit(x, num_steps=3, batch_size=None, seed=0, progress=False)
    assert weights(programs[0]).equal(weights(programs[1]))


def test_parameters_that_a_module_makes_at_first_use_stay_with_the_program():
    from pyro.nn import PyroModule, PyroParam

    class Net(PyroModule):
        @PyroParam(constraint=dist.constraints.positive)
        def scale(self):
            return torch.tensor(0.5)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z, self.scale).to_event(1), obs=x)

    net = Net()
    first, second = SinkhornProgram(net, loss=LOSS), SinkhornProgram(net, loss=LOSS)
    fit(first, seed=0)
    assert not net._pyro_params and not list(net.parameters())
    assert first.modules["model"].scale.item() != 0.5
    fit(second, seed=0)
    assert weights(first).equal(weights(second))
    assert weights(first.clone()).equal(weights(first))
    assert net.scale.item() == 0.5


def test_a_lazy_module_asks_to_be_run_first():
    decoder = nn.LazyLinear(3)

    def model(x):
        return decoder(x)

    with pytest.raises(ProgramError, match=r"module 'decoder' has lazy parameters.*run it once"):
        SinkhornProgram(model)
    decoder(torch.ones(1, 2))
    assert SinkhornProgram(model).modules["decoder"].weight.shape == (3, 2)


def test_a_module_changed_after_the_program_was_made_is_named():
    both = nn.Sequential(nn.Linear(2, 3))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(both(z), 0.5).to_event(1), obs=x)

    program = SinkhornProgram(model, loss=LOSS)
    both.append(nn.Tanh())
    with pytest.raises(ProgramError, match=r"module 'both' had 2 submodules .* now has 3: .*reset\(\)"):
        program.generate(1, data())
    assert program.reset().generate(1, data())["x"].shape == (1, 40, 3)


def test_a_module_that_torch_cannot_copy_is_reported():
    net = nn.Linear(2, 2)
    net.scratch = net.weight * 2  # part of a graph

    def model(x):
        return net(x)

    with pytest.raises(ProgramError, match=r"\['net'\] cannot be copied"):
        SinkhornProgram(model)


def test_diagnosing_does_not_change_what_training_does():
    model, _ = make_model()
    watched, alone = (SinkhornProgram(model, loss=LOSS) for _ in range(2))
    for program in (watched, alone):
        fit(program, 2, seed=0)
        if program is watched:
            program.diagnose(100 * data(), num_floor=2, seed=0)
            program.encode(data(5), seed=0)
        fit(program, 2)
    assert weights(watched).equal(weights(alone))
