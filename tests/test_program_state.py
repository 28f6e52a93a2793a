"""Saved, loaded, pickled: in a fresh process too, continued to the bit, and never running a stranger's code."""

import copy
import functools
import importlib
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import nn

from pyro_sinkhorn import AutoImplicit, SinkhornProgram, Trace_Sinkhorn, snapshot, state
from pyro_sinkhorn.errors import ProgramError

LOSS = Trace_Sinkhorn(match_size=8)

#: Models that a pickle can refer to, as a user would write them in a file of their own.
SOURCE = """
import functools
import pyro, pyro.distributions as dist, torch
from pyro.nn import PyroModule, PyroParam
from torch import nn
from pyro_sinkhorn import AutoImplicit, SinkhornProgram, Trace_Sinkhorn, sinkhorn_infer

torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)
torch.manual_seed(int(__import__("os").environ.get("USER_SEED", 0)))
decoder = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


def body(x, decoder):
    pyro.module("decoder", decoder)
    scale = pyro.param("scale", torch.tensor(0.5), constraint=dist.constraints.softplus_positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Dirichlet(torch.ones(2)))
        pyro.sample("x", dist.Normal(decoder(z), scale).to_event(1), obs=x)


@sinkhorn_infer(loss=Trace_Sinkhorn(prior_weight=3.0, match_size=8), guide=functools.partial(AutoImplicit, hidden=9))
def decorated(x):
    body(x, decoder)


def plain(x):
    body(x, decoder)


class Net(PyroModule):
    def __init__(self):
        super().__init__()
        self.decoder = PyroModule[nn.Linear](2, 3)
        self.scale = PyroParam(torch.tensor(0.5), constraint=dist.constraints.positive)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Dirichlet(torch.ones(2)))
            pyro.sample("x", dist.Normal(self.decoder(z), self.scale).to_event(1), obs=x)


class Vae:
    def __init__(self):
        self.decoder = nn.Linear(2, 3)

    def model(self, x):
        body(x, self.decoder)


def data():
    return torch.randn(40, 3, generator=torch.Generator().manual_seed(1))
"""


@pytest.fixture(scope="module")
def user_code(tmp_path_factory):
    """The module of :data:`SOURCE`, and the folder that another process finds it in."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "user_models.py").write_text(SOURCE)
    sys.path.insert(0, str(folder))
    try:
        yield importlib.import_module("user_models"), folder
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("user_models")


def in_another_process(folder, code, *args):
    """Run code that imports ``user_models``; other weights and another random state than here."""
    environment = os.environ | {"PYTHONPATH": f"{folder}", "USER_SEED": "12345"}
    command = [sys.executable, "-W", "error::UserWarning", "-c", textwrap.dedent(code), *map(str, args)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def make_model(width=3, **layers):
    decoder = nn.Sequential(nn.Linear(2, width), *layers.values())

    def model(x):
        pyro.module("decoder", decoder)
        scale = pyro.param("scale", torch.tensor(0.5), constraint=constraints.softplus_positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Dirichlet(x.new_ones(2)))
            pyro.sample("x", dist.Normal(decoder(z), scale).to_event(1), obs=x)

    return model


def data(n=40, width=3):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(1))


def fit(program, num_steps=3, **options):
    return program.fit(data(), **{"num_steps": num_steps, "batch_size": 16, "progress": False} | options)


def assert_same(first, second):
    """Equal state, and equal draws under one seed."""

    def compare(a, b, path):
        assert isinstance(b, float) if isinstance(a, float) else type(a) is type(b), path
        if isinstance(a, dict):
            assert a.keys() == b.keys(), path
            for key in a:
                compare(a[key], b[key], f"{path}[{key!r}]")
        elif isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype and a.equal(b), path
        elif isinstance(a, (list, tuple)):
            assert len(a) == len(b), path
            for i, pair in enumerate(zip(a, b, strict=True)):
                compare(*pair, f"{path}[{i}]")
        elif isinstance(a, constraints.Constraint):
            assert str(a) == str(b), path
        else:
            assert a == b, path

    compare(snapshot.take(first), snapshot.take(second), "state")
    for draw in (lambda p: p.encode(data(), seed=3), lambda p: p.generate(4, data(), seed=3)):
        a, b = draw(first), draw(second)
        assert a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


# Save and load.


def test_a_loaded_program_is_the_saved_one_and_continues_like_it(tmp_path):
    model = make_model(norm=nn.BatchNorm1d(3), drop=nn.Dropout(0.2))
    program = fit(SinkhornProgram(model, loss=Trace_Sinkhorn(prior_weight=3.0, match_size=8)), seed=0)
    program.save(tmp_path / "a.pt")
    loaded = SinkhornProgram.load(tmp_path / "a.pt", model)
    assert loaded.loss.config() == program.loss.config()
    assert_same(program, loaded)
    for one in (program, loaded):
        fit(one, 4)
    assert_same(program, loaded)
    assert loaded.num_steps == len(loaded.history) == 7


def test_an_untouched_loaded_program_saves_and_clones_what_it_was_loaded_from(tmp_path):
    model = make_model()
    program = fit(SinkhornProgram(model, loss=LOSS), seed=0)
    program.save(tmp_path / "a.pt")
    SinkhornProgram.load(tmp_path / "a.pt", model).save(tmp_path / "b.pt")
    again = SinkhornProgram.load(tmp_path / "b.pt", model).clone()
    for one in (program, again):
        fit(one, 2)
    assert_same(program, again)


def test_a_program_saves_before_any_step(tmp_path):
    model = make_model()
    SinkhornProgram(model, loss=LOSS).save(tmp_path / "a.pt")
    loaded = fit(SinkhornProgram.load(tmp_path / "a.pt", model))
    assert loaded.num_steps == 3


def test_another_process_loads_and_unpickles(tmp_path, user_code):
    module, folder = user_code
    names = {"decorated": module.decorated, "plain": SinkhornProgram(module.plain, loss=LOSS)}
    names["net"] = SinkhornProgram(module.Net(), loss=LOSS)
    names["vae"] = SinkhornProgram(module.Vae().model, loss=LOSS)
    names["guided"] = SinkhornProgram(net := module.Net(), AutoImplicit(net), LOSS)
    draws, later = {}, {}
    for name, program in names.items():
        fit(program.reset(), seed=0)
        draws[name] = {"z": program.encode(data(), seed=3)["z"], **program.generate(4, data(), seed=3)}
        (tmp_path / f"{name}.pickle").write_bytes(pickle.dumps(program))
    module.decorated.save(tmp_path / "decorated.pt")
    names["plain"].save(tmp_path / "plain.pt")
    for name, program in names.items():
        fit(program, 2)
        later[name] = program.generate(4, data(), seed=3)["x"]
    torch.save({"draws": draws, "later": later}, tmp_path / "expected.pt")
    code = """
        import pickle, sys, pathlib, torch, user_models
        from pyro_sinkhorn import SinkhornProgram
        folder = pathlib.Path(sys.argv[1])
        expected = torch.load(folder / "expected.pt")
        x = user_models.data()

        def check(name, program):
            draws = {"z": program.encode(x, seed=3)["z"], **program.generate(4, x, seed=3)}
            for site, value in expected["draws"][name].items():
                assert draws[site].equal(value), (name, site)
            program.fit(x, num_steps=2, batch_size=16, progress=False)
            assert program.generate(4, x, seed=3)["x"].equal(expected["later"][name]), name

        for name in ("decorated", "plain"):
            check(name, SinkhornProgram.load(folder / f"{name}.pt", getattr(user_models, name)))
        for name in expected["draws"]:
            program = pickle.loads((folder / f"{name}.pickle").read_bytes())
            assert program is not user_models.decorated
            check(name, program)
        assert user_models.decorated.num_steps == 0
    """
    in_another_process(folder, code, tmp_path)


CONSTRAINTS = {
    "real": (torch.randn(3), constraints.real),
    "positive": (torch.rand(3), constraints.positive),
    "greater_than": (torch.rand(3) + 2, constraints.greater_than(2.0)),
    "greater_than_tensor": (torch.rand(2) + 2, constraints.greater_than(torch.tensor([1.0, 2.0]))),
    "greater_than_eq": (torch.rand(3) + 2, constraints.greater_than_eq(2.0)),
    "less_than": (torch.rand(3) - 1, constraints.less_than(0.5)),
    "nonnegative": (torch.rand(3), constraints.nonnegative),
    "interval": (torch.rand(3) + 1, constraints.interval(1.0, 2.0)),
    "interval_tensor": (torch.rand(2) + 1, constraints.interval(torch.zeros(2), torch.full((2,), 3.0))),
    "half_open_interval": (torch.rand(3) + 1, constraints.half_open_interval(1.0, 2.0)),
    "unit_interval": (torch.rand(3), constraints.unit_interval),
    "simplex": (torch.rand(3).softmax(-1), constraints.simplex),
    "softplus_positive": (torch.rand(3), constraints.softplus_positive),
    "independent": (torch.rand(2, 3), constraints.independent(constraints.positive, 1)),
    "real_vector": (torch.rand(3), constraints.real_vector),
    "stack": (torch.rand(2, 3) / 2, constraints.stack([constraints.positive, constraints.unit_interval])),
    "cat": (
        torch.rand(3) / 2,
        constraints.cat([constraints.positive, constraints.unit_interval], -1, [1, 2]),
    ),
    "sphere": (torch.tensor([0.6, 0.8]), constraints.sphere),
    "ordered_vector": (torch.arange(3.0), constraints.ordered_vector),
    "positive_ordered_vector": (torch.arange(3.0) + 1, constraints.positive_ordered_vector),
    "lower_cholesky": (torch.eye(2) + torch.tensor([[0, 0], [0.3, 0]]), constraints.lower_cholesky),
    "softplus_lower_cholesky": (torch.eye(2), constraints.softplus_lower_cholesky),
    "unit_lower_cholesky": (torch.eye(2), constraints.unit_lower_cholesky),
    "corr_cholesky": (torch.eye(2), constraints.corr_cholesky),
    "positive_definite": (torch.eye(2) * 2, constraints.positive_definite),
}


def test_constraints_survive(tmp_path):
    def model(x):
        for name, (value, constraint) in CONSTRAINTS.items():
            pyro.param(name, value, constraint=constraint)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    program = SinkhornProgram(model, loss=LOSS)
    program.fit(torch.randn(20), num_steps=1, progress=False)
    program.save(tmp_path / "a.pt")
    loaded = SinkhornProgram.load(tmp_path / "a.pt", model)
    for one in (loaded, program.clone()):
        with one.active():
            store = pyro.get_param_store()
            for name, (value, constraint) in CONSTRAINTS.items():
                torch.testing.assert_close(store[name], value, rtol=1e-6, atol=1e-6)
                assert repr(store._constraints[name]) == repr(constraint)
    assert loaded.owned.store["constraints"]["positive"] is constraints.positive


class Even(constraints.Constraint):
    """A constraint that no other process knows by name."""


def test_what_cannot_be_read_back_is_refused_when_it_is_written(tmp_path):
    saved = snapshot.take(SinkhornProgram(make_model(), loss=LOSS))
    constraint = {"a": {"value": torch.zeros(1), "constraint": Even()}}
    with pytest.raises(ValueError, match=r"\['params'\]\['a'\]\['constraint'\].*'Even' is not a constraint"):
        state.write(saved | {"params": constraint}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"\['optim'\] cannot be saved: it is a function"):
        state.write(saved | {"optim": lambda: 0}, tmp_path / "a.pt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("make", "extra"),
    [
        (pyro.optim.CosineAnnealingLR, {"T_max": 6}),
        (pyro.optim.MultiStepLR, {"milestones": [1, 4], "gamma": 0.1}),
        (pyro.optim.OneCycleLR, {"max_lr": 0.1, "total_steps": 10}),
        (pyro.optim.LambdaLR, {"lr_lambda": lambda step: 0.5**step}),
        (pyro.optim.ReduceLROnPlateau, {"patience": 0}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_training_with_a_schedule_continues(tmp_path, make, extra):
    def optim():
        return make({"optimizer": torch.optim.Adam, "optim_args": {"lr": np.float64(0.01)}} | extra)

    model = make_model()
    program = fit(SinkhornProgram(model, loss=LOSS), seed=0, optim=optim())
    program.save(tmp_path / "a.pt")
    loaded = SinkhornProgram.load(tmp_path / "a.pt", model)
    with pytest.raises(ProgramError, match=rf"continues a {make.__name__}\(Adam\), not the default Adam"):
        fit(loaded)
    fit(program, 3)
    fit(loaded, 3, optim=optim())
    assert_same(program, loaded)


def test_a_learning_rate_given_after_loading_is_used(tmp_path):
    model = make_model()
    fit(SinkhornProgram(model, loss=LOSS), seed=0).save(tmp_path / "a.pt")
    loaded = SinkhornProgram.load(tmp_path / "a.pt", model)
    before = loaded.modules["decoder"][0].weight.detach().clone()
    fit(loaded, 1, lr=1e-12)
    torch.testing.assert_close(loaded.modules["decoder"][0].weight, before, rtol=0, atol=1e-10)


def test_a_loss_of_the_users_is_asked_for(tmp_path):
    class Mine(Trace_Sinkhorn):
        pass

    def cost(x, y):
        return torch.cdist(x, y)

    model = make_model()
    for loss, words in (
        (Mine(match_size=8), "saved with the loss Mine"),
        (Trace_Sinkhorn(match_size=8, cost=cost), "cost of its own"),
    ):
        program = fit(SinkhornProgram(model, loss=loss), 1, seed=0)
        program.save(tmp_path / "a.pt")
        with pytest.raises(ValueError, match=f"{words}.*loss="):
            SinkhornProgram.load(tmp_path / "a.pt", model)
        assert_same(program, SinkhornProgram.load(tmp_path / "a.pt", model, loss=loss))
        assert_same(program, SinkhornProgram.load(tmp_path / "a.pt", program))
        assert_same(program, program.clone())


def test_a_guide_and_an_encoder_of_the_users_are_given_again(tmp_path):
    model = make_model()

    def guide_function(encoder):
        def guide(x):
            pyro.module("encoder", encoder)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Delta(encoder(x).softmax(-1), event_dim=1))

        return guide

    makers = [
        lambda: {"guide": guide_function(nn.Linear(3, 2))},
        lambda: {"encoder": nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))},
        lambda: {"guide": AutoImplicit(model, noise_dim=2)},
        lambda: {"guide": functools.partial(AutoImplicit, noise_dim=2)},
    ]
    for make in makers:
        program = fit(SinkhornProgram(model, loss=LOSS, **make()), seed=0)
        program.save(tmp_path / "a.pt")
        assert_same(program, SinkhornProgram.load(tmp_path / "a.pt", model, **make()))


# What is refused.


def test_another_model_is_refused(tmp_path):
    fit(SinkhornProgram(make_model(), loss=LOSS), 1).save(tmp_path / "a.pt")
    with pytest.raises(
        ValueError, match=r"module 'decoder' differs from the saved one: .*size mismatch for 0.weight"
    ):
        SinkhornProgram.load(tmp_path / "a.pt", make_model(width=4))

    def other(x):
        return None

    with pytest.raises(
        ValueError, match=r"saved with the modules \['decoder'\], but this model refers to \[\]"
    ):
        SinkhornProgram.load(tmp_path / "a.pt", other)
    with pytest.raises(ValueError, match="the guide, a Linear, differs from the saved one"):
        SinkhornProgram.load(tmp_path / "a.pt", make_model(), guide=nn.Linear(3, 2))


def test_no_file_is_a_file_not_found(tmp_path):
    with pytest.raises(FileNotFoundError):
        SinkhornProgram.load(tmp_path / "none.pt", make_model())
    with pytest.raises(IsADirectoryError):
        SinkhornProgram.load(tmp_path, make_model())


@pytest.fixture(scope="module")
def saved_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "a.pt"
    fit(SinkhornProgram(make_model(), loss=LOSS), 1).save(path)
    return path


@pytest.mark.parametrize("length", [0, 1, 100, 0.5, -1])
def test_a_file_cut_short_is_refused(tmp_path, saved_file, length):
    whole = saved_file.read_bytes()
    cut = int(length * len(whole)) if isinstance(length, float) else length
    (tmp_path / "cut.pt").write_bytes(whole[:cut])
    with pytest.raises(ValueError, match=r"cut.pt' cannot be read as a saved program"):
        state.read(tmp_path / "cut.pt")


def test_a_damaged_file_is_refused_or_unharmed(tmp_path, saved_file):
    whole, expected = saved_file.read_bytes(), state.read(saved_file)
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        bad = bytearray(whole)
        for place in generator.integers(len(whole), size=10):
            bad[place] ^= 1 << generator.integers(8)
        (tmp_path / "bad.pt").write_bytes(bytes(bad))
        try:
            found = state.read(tmp_path / "bad.pt")
        except ValueError:
            refused += 1
            continue
        assert found.keys() == expected.keys()  # only padding was hit
        assert all(found["guide"][name].equal(value) for name, value in expected["guide"].items())
    assert refused > 55


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize("how", ["torch", "torch legacy", "pickle", "pickle 5", "inside"])
def test_a_hostile_file_runs_no_code(tmp_path, saved_file, how):
    mark, path = tmp_path / "executed", tmp_path / "evil.pt"
    payload = Hostile(str(mark))
    if how == "pickle":
        path.write_bytes(pickle.dumps(payload, protocol=2))
    elif how == "pickle 5":
        path.write_bytes(pickle.dumps({"format": state.FORMAT, "x": payload}, protocol=5))
    elif how == "inside":
        torch.save(torch.load(saved_file) | {"history": payload}, path)
    else:
        torch.save(payload, path, _use_new_zipfile_serialization=how == "torch")
    with pytest.raises(ValueError, match="cannot be read as a saved program"):
        SinkhornProgram.load(path, make_model())
    assert not mark.exists()
    # It would have.
    if how.startswith("pickle"):
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert mark.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"weights": torch.zeros(3)}, "not a saved program of pyro_sinkhorn"),
        (torch.zeros(3), "not a saved program of pyro_sinkhorn"),
        ({"format": state.FORMAT}, "not a saved program of pyro_sinkhorn"),
        ({"format": state.FORMAT, "version": "2"}, "not a saved program of pyro_sinkhorn"),
        (
            {"format": state.FORMAT, "version": state.VERSION + 1},
            "has state version 2, .*update pyro_sinkhorn",
        ),
        ({"format": state.FORMAT, "version": state.VERSION}, r"lacks \['epoch', 'guide', .*it is damaged"),
    ],
    ids=["dictionary", "tensor", "no version", "odd version", "later", "incomplete"],
)
def test_foreign_files_are_refused(tmp_path, content, words):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=words):
        SinkhornProgram.load(tmp_path / "a.pt", make_model())


def test_text_is_refused(tmp_path):
    (tmp_path / "a.pt").write_text("not a program at all")
    with pytest.raises(ValueError, match="cannot be read as a saved program"):
        SinkhornProgram.load(tmp_path / "a.pt", make_model())


# Writing.


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["torch.save", "os.replace", "os.fsync"])
def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, where, error):
    program = fit(SinkhornProgram(make_model(), loss=LOSS), 1)
    program.save(tmp_path / "a.pt")
    old = (tmp_path / "a.pt").read_bytes()

    def fail(value, file=None, *_):
        if hasattr(file, "write"):
            file.write(b"half a file")
        raise error

    monkeypatch.setattr(where, fail)
    with pytest.raises(type(error)):
        fit(program, 1).save(tmp_path / "a.pt")
    assert (tmp_path / "a.pt").read_bytes() == old
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_a_saved_file_has_the_permissions_of_any_other(tmp_path):
    (tmp_path / "other").touch()
    SinkhornProgram(make_model(), loss=LOSS).save(str(tmp_path / "a.pt"))
    assert (tmp_path / "a.pt").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_save_takes_a_bare_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    SinkhornProgram(make_model(), loss=LOSS).save("a.pt")
    assert SinkhornProgram.load("a.pt", make_model()).num_steps == 0


# Pickling.


def test_unpickling_in_one_process_makes_another_program(user_code):
    module, _ = user_code
    program = fit(module.decorated.reset(), seed=0)
    again = pickle.loads(pickle.dumps(program))
    assert again is not program and again.model is program.model
    assert again.loss.prior_weight == 3.0 and again.guide._hidden == 9
    assert_same(program, again)
    fit(again, 2)
    assert program.num_steps == 3 and again.num_steps == 5
    fit(program, 2)
    assert_same(program, again)


def test_modules_that_were_used_outside_pickle(user_code):
    module, _ = user_code
    vae = module.Vae()
    vae.model(data())  # Pyro leaves weak references, which nothing can pickle, on the parameters it has seen
    pyro.clear_param_store()
    program = fit(SinkhornProgram(vae.model, AutoImplicit(vae.model), LOSS), seed=0)
    again = pickle.loads(pickle.dumps(program))
    assert again.model.__self__ is not vae and again.guide.model is again.model
    assert_same(program, again)


def test_a_closure_cannot_be_pickled_and_the_error_says_what_to_do():
    def local(x):
        return None

    for model in (local, lambda x: None):
        with pytest.raises(
            pickle.PicklingError, match=r"'.*' of module .* top level .*save\(\) and load\(path, model\)"
        ):
            pickle.dumps(SinkhornProgram(model))


def test_a_program_copies_deeply():
    program = fit(SinkhornProgram(make_model(), loss=LOSS), seed=0)  # a closure, which a pickle could not
    other = copy.deepcopy({"program": program})["program"]
    assert other is not program
    assert_same(program, other)
