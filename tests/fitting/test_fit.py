"""What people expect of a training loop: held-out data, callbacks, sources of data, clipping, Ctrl-C."""

import os
import signal

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.sparse
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from pyro_sinkhorn import SinkhornProgram, Trace_Sinkhorn
from pyro_sinkhorn.errors import NonFiniteError, ProgramError
from pyro_sinkhorn.fitting import log_to
from pyro_sinkhorn.fitting.validation import Validation, learned_tensors

X = torch.randn(100, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
pytestmark = pytest.mark.filterwarnings("ignore:latent group")
QUIET = {"progress": False, "seed": 0}


def make(loss=None, **parts):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    def model(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 0.5).to_event(1), obs=x)

    return SinkhornProgram(model, loss=loss or Trace_Sinkhorn(match_size=8), **parts)


def losses(*args, **options):
    return make().fit(*args, **{"num_steps": 4, "batch_size": 32} | QUIET | options).history.loss


# Sources of data.


def test_memory_maps_and_sparse_matrices_are_the_arrays_they_hold(tmp_path):
    np.save(tmp_path / "x.npy", X.numpy())
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    expected = losses(X)
    assert losses(mapped) == expected
    for kind in (scipy.sparse.csr_matrix, scipy.sparse.coo_array):
        assert losses(kind(X.numpy())) == expected
    program = make().fit(mapped, num_steps=1, batch_size=32, **QUIET)
    for given in (mapped, scipy.sparse.csr_matrix(X.numpy())):
        assert torch.equal(program.encode(given, seed=0)["z"], program.encode(X, seed=0)["z"])


def test_only_the_rows_of_a_batch_are_read(tmp_path):
    class Watched(np.memmap):
        read = 0

        def __getitem__(self, index):
            found = super().__getitem__(index)
            if isinstance(index, np.ndarray):
                Watched.read += len(found)
            return found

    np.save(tmp_path / "x.npy", X.numpy())
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r").view(Watched)
    make().fit(mapped, num_steps=2, batch_size=16, **QUIET)
    assert 0 < Watched.read < 100


class Rows(Dataset):
    """Named columns."""

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        return {"x": X[i]}


class Stream(IterableDataset):
    """Data without end or length."""

    def __iter__(self):
        while True:
            yield torch.randn(2)


@pytest.mark.parametrize(
    "source",
    [
        DataLoader(TensorDataset(X), batch_size=32),
        DataLoader(X, batch_size=32, shuffle=True),
        DataLoader(Rows(), batch_size=32),
        Rows(),
        Stream(),
        DataLoader(Stream(), batch_size=32),
    ],
    ids=["tuples", "tensors", "dictionaries", "data set", "stream", "loaded stream"],
)
def test_batches_are_the_arguments(source):
    program = make().fit(source, num_steps=5, batch_size=32, **QUIET)
    assert program.num_steps == 5 and np.isfinite(program.history.loss).all()


def test_epochs_are_counted():
    assert make().fit(X, num_epochs=2, batch_size=25, **QUIET).num_steps == 8
    loader = DataLoader(X, batch_size=30)
    assert make().fit(loader, num_epochs=2, **QUIET).num_steps == 6  # the last ten are left out
    assert make().fit(DataLoader(X, batch_size=50), num_epochs=2, **QUIET).num_steps == 4
    with pytest.raises(ProgramError, match="Stream does not say how long a pass is"):
        make().fit(Stream(), num_epochs=2, batch_size=30, **QUIET)
    with pytest.raises(ProgramError, match="give one of them"):
        make().fit(X, num_epochs=2, num_steps=3, **QUIET)


def test_a_loaded_batch_stands_for_all_data():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x[:, 0])

    def fitted(*args, **options):
        program = SinkhornProgram(model, loss=Trace_Sinkhorn(match_size=8))
        return program.fit(*args, num_steps=1, **QUIET, **options).history.loss[0]

    loader = DataLoader(X, batch_size=25)
    assert fitted(loader) == pytest.approx(fitted(X[:25].repeat(4, 1), batch_size=25), rel=0.5)
    with pytest.raises(ProgramError, match=r"'mu' lies outside the data.*__len__"):
        fitted(Stream(), batch_size=25)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (DataLoader(X, batch_size=None), "hands out single data"),
        (DataLoader(X[:0], batch_size=4), "gave no batch"),
        (DataLoader(["a", "b"], batch_size=2), "no tensor with rows"),
    ],
)
def test_loaders_that_cannot_be_used(source, words):
    with pytest.raises(ProgramError, match=words):
        make().fit(source, num_steps=1, **QUIET)


# Held-out data.


def test_held_out_data_are_not_trained_on_and_the_best_state_is_kept():
    seen, measured = set(), []

    def watch(program, values):
        if "validation" in values:
            measured.append((values["validation"], program.modules["net"].weight.detach().clone()))
        if values["step"] == 12:
            program.modules["net"].weight.data.mul_(30)  # which the rest does not make good again

    def model(x):
        if torch.is_grad_enabled():
            seen.update(x[:, 0].tolist())
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 0.5).to_event(1), obs=x)

    net = nn.Linear(2, 2)
    program = SinkhornProgram(model, loss=Trace_Sinkhorn(match_size=8))
    options = {"num_steps": 20, "batch_size": 32, "lr": 0.02, "validate_every": 2, "callbacks": [watch]}
    program.fit(X, validation=0.4, **options, **QUIET)
    assert len(seen) == 60
    values = [value for value, _ in measured]
    assert values == program.history.validation and program.history.validated_at[:2] == [2, 4]
    best = min(range(len(values)), key=values.__getitem__)
    assert best == 5
    assert torch.equal(program.modules["net"].weight, measured[best][1])


def test_networks_are_measured_as_they_will_be_used():
    modes = []
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(0.5))

    def model(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            modes.append((torch.is_grad_enabled(), net.training))
            pyro.sample("x", dist.Normal(net(z), 0.5).to_event(1), obs=x)

    program = SinkhornProgram(model, loss=Trace_Sinkhorn(match_size=8))
    program.fit(X, num_steps=2, batch_size=32, validation=X[:40], validate_every=2, **QUIET)
    assert modes[-1] == (False, False) and (True, True) in modes
    statistics = program.modules["net"][1].running_mean.clone()
    again = SinkhornProgram(model, loss=Trace_Sinkhorn(match_size=8))
    again.fit(X, num_steps=2, batch_size=32, **QUIET)
    assert torch.equal(again.modules["net"][1].running_mean, statistics)


def test_measurements_have_the_same_noise():
    program = make().fit(
        X, num_steps=2, batch_size=32, validation=X[:40], validate_every=1, lr=1e-12, **QUIET
    )
    # BatchNorm's statistics move, the weights hardly.
    assert program.history.validation[0] == pytest.approx(program.history.validation[1], rel=1e-2)
    assert losses(X, validation=X[:40], validate_every=1) == losses(X)


def test_patience_ends_a_fit(capsys):
    options = {"validation": X[:40], "validate_every": 1, "patience": 3, "batch_size": 32, "seed": 0}
    program = make().fit(X, num_steps=500, lr=0.5, **options)
    values = program.history.validation
    assert program.num_steps == len(values) < 500
    assert len(values) - 1 - int(np.argmin(values)) == 3
    assert f"stopped after {program.num_steps} steps: the held-out loss was least" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("held_out", "words"),
    [
        (torch.full((40, 2), float("nan")), "the held-out data, after 1 steps: argument 0 .* NaN"),
        (torch.randn(40, 3), "the held-out data, after 1 steps: latent group .* now gets 3"),
        (X[:1], "the held-out data, after 1 steps: .* a batch of 1"),
    ],
)
def test_held_out_data_that_cannot_be_measured(held_out, words):
    with pytest.raises((ProgramError, NonFiniteError), match=words):
        make().fit(X, num_steps=2, batch_size=32, validation=held_out, validate_every=1, **QUIET)


def test_what_can_be_read_once_only():
    with pytest.raises(ProgramError, match="a generator, which can be read once only"):
        make().fit((x for x in X), num_steps=1, **QUIET)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"validation": 1.5}, "expected a share between 0 and 1"),
        ({"validation": 0.001}, "leaves at least 2 on each side"),
        ({"validation": 0.1, "batch_size": None}, "batch_size=None"),
        ({"validation": True}, "validation is True: expected a share"),
        ({"validation": "x"}, "validation is 'x': expected a share"),
        ({"callbacks": print}, "callbacks is a builtin_function_or_method: expected a list"),
        ({"patience": 3}, "there are none"),
        ({"checkpoint": "."}, "is a folder"),
        ({"checkpoint": 3}, "checkpoint is a int"),
        ({"validation": 0.1, "patience": 0}, "patience is 0"),
        ({"validate_every": 0}, "validate_every is 0"),
        ({"max_grad_norm": -1.0}, "max_grad_norm is -1"),
        ({"autocast": torch.int64}, "autocast is torch.int64"),
        ({"callbacks": ["tensorboard"]}, "cannot be called"),
        ({"num_epochs": 0}, "num_epochs is 0"),
    ],
)
def test_arguments_that_make_no_sense(options, words):
    with pytest.raises(ProgramError, match=words):
        make().fit(X, **{"num_steps": 1 if "num_epochs" not in options else None} | QUIET | options)


# Callbacks.


def test_a_callback_sees_every_step_and_may_stop():
    told = []

    def callback(program, values):
        told.append(values)
        return values["step"] == 3

    program = make().fit(X, num_steps=10, batch_size=32, callbacks=[callback], **QUIET)
    assert program.num_steps == 3 and [v["step"] for v in told] == [1, 2, 3]
    assert told[0]["loss"] == program.history.loss[0] and {"reconstruction", "match", "match/z"} <= set(
        told[0]
    )


def test_figures_go_to_tensorboard_and_wandb():
    class Writer:
        def __init__(self):
            self.rows = []

        def add_scalar(self, name, value, step):
            self.rows.append((name, step))

    class Run:
        def __init__(self):
            self.rows = []

        def log(self, values, step):
            self.rows.append((sorted(values), step))

    writer, run = Writer(), Run()
    make().fit(X, num_steps=4, batch_size=32, callbacks=[log_to(writer, 2), log_to(run, 4, "a/")], **QUIET)
    assert ("loss", 2) in writer.rows and ("loss", 3) not in writer.rows
    assert [step for _, step in run.rows] == [4] and "a/match/z" in run.rows[0][0]
    with pytest.raises(ProgramError, match="neither add_scalar"):
        log_to(object())


# Steps.


def test_gradients_are_scaled_down_together():
    seen = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            seen.append(torch.cat([p.grad.flatten() for g in self.param_groups for p in g["params"]]))

    optim = pyro.optim.PyroOptim(Watched, {"lr": 0.0})
    make().fit(X, num_steps=1, batch_size=32, optim=optim, max_grad_norm=0.25, **QUIET)
    clipped = torch.cat(seen)
    seen.clear()
    make().fit(X, num_steps=1, batch_size=32, optim=optim, **QUIET)
    free = torch.cat(seen)
    assert clipped.norm() == pytest.approx(0.25, rel=1e-4) and free.norm() > 0.25
    torch.testing.assert_close(clipped / clipped.norm(), free / free.norm())


def test_networks_compute_in_bfloat16():
    seen = []
    net = nn.Linear(2, 2).float()

    def model(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            seen.append(net(z).dtype)
            pyro.sample("x", dist.Normal(net(z).float(), 0.5).to_event(1), obs=x)

    torch.set_default_dtype(torch.float32)
    program = SinkhornProgram(model, loss=Trace_Sinkhorn(match_size=8))
    program.fit(X.float(), num_steps=3, batch_size=32, autocast=torch.bfloat16, **QUIET)
    assert torch.bfloat16 in seen and np.isfinite(program.history.loss).all()
    assert all(p.dtype == torch.float32 for p in program.guide.parameters())


def test_ctrl_c_waits_for_the_step_and_leaves_a_usable_program():
    whole = make().fit(X, num_steps=6, batch_size=32, **QUIET)
    program = make()

    def interrupt(program, values):
        if values["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        program.fit(X, num_steps=6, batch_size=32, callbacks=[interrupt], **QUIET)
    assert program.num_steps == len(program.history) == 3
    program.encode(X)
    program.fit(X, num_steps=3, batch_size=32, progress=False)
    assert program.history.loss == whole.history.loss
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_does_not_wait():
    program, calls = make(), []

    def interrupt(program, values):
        for _ in range(2):
            calls.append(1)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        program.fit(X, num_steps=6, batch_size=32, callbacks=[interrupt], **QUIET)
    assert program.num_steps == 1 and len(calls) == 2


def test_the_best_state_covers_all_that_is_learned():
    program = make()
    program.fit(X, num_steps=1, batch_size=32, **QUIET)
    with program.active():
        before = {name: value.clone() for name, value in learned_tensors(program).items()}
    kept = Validation(None, None, True, type("Best", (), {"tensors": before})())
    program.fit(X, num_steps=2, batch_size=32, **QUIET)
    with program.active():
        kept.restore(program)
        now = learned_tensors(program)
    assert any(name.startswith("net:1.running") for name in now)
    assert all(torch.equal(now[name], value) for name, value in before.items())
