"""A fit that stops anywhere goes on from its checkpoint to the same end, to the bit."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_sinkhorn import (
    Implicit,
    SinkhornProgram,
    Trace_DataSinkhorn,
    Trace_EnergyScore,
    Trace_JointSinkhorn,
    Trace_Sinkhorn,
    TraceEnum_Sinkhorn,
)
from pyro_sinkhorn.errors import NonFiniteError, ProgramError
from pyro_sinkhorn.losses import LearnedCost

X = torch.randn(90, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Stop(Exception):
    """What a callback raises to end a fit as a crash would."""


def network():
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Linear(4, 2))


def normal():
    net = network()

    def model(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 0.5).to_event(1), obs=x)

    return model


def hierarchical(x):
    scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, scale).to_event(1), obs=x)


def with_global(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1).expand(*z.shape, 2), 0.5).to_event(1), obs=x)


def discrete(x):
    loc = pyro.param("loc", torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(loc[k.long()], 0.5).to_event(1), obs=x)


def simulator(x):
    scale = pyro.param("scale", torch.tensor(2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", Implicit(scale * torch.randn(len(x), 2), event_dim=1), obs=x)


def normal_guide(x):
    loc = pyro.param("loc", torch.zeros(2))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x + loc, 0.5).to_event(1))


def schedule():
    return pyro.optim.ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 1e-2}, "gamma": 0.9})


def small(**options):
    return Trace_Sinkhorn(match_size=8, **options)


CASES = {
    "latent match": (normal, lambda: {"loss": small()}, {}),
    "held-out data": (
        normal,
        lambda: {"loss": small()},
        {"validation": 0.3, "validate_every": 3, "batch_size": 24},
    ),
    "two particles": (
        lambda: hierarchical,
        lambda: {"loss": small(num_particles=2, vectorize_particles=True)},
        {},
    ),
    "a global": (lambda: with_global, lambda: {"loss": small(groups="marginal")}, {}),
    "a schedule": (normal, lambda: {"loss": small()}, {"optim": schedule}),
    "discrete": (lambda: discrete, lambda: {"loss": TraceEnum_Sinkhorn(match_size=8)}, {}),
    "data": (lambda: simulator, lambda: {"loss": Trace_DataSinkhorn(match_size=8)}, {}),
    "learned cost": (
        lambda: simulator,
        lambda: {"loss": Trace_DataSinkhorn(match_size=8, cost=LearnedCost(nn.Linear(2, 3)))},
        {},
    ),
    "joint": (lambda: hierarchical, lambda: {"loss": Trace_JointSinkhorn(match_size=8)}, {}),
    "energy": (lambda: hierarchical, lambda: {"loss": Trace_EnergyScore(num_simulations=16)}, {}),
    "ELBO": (
        lambda: hierarchical,
        lambda: {"loss": pyro.infer.Trace_ELBO(), "guide": normal_guide},
        {},
    ),
}


def program_of(case):
    make, parts, _ = CASES[case]
    torch.manual_seed(3)  # the weights of a new process
    return SinkhornProgram(make(), **parts())


def fit(program, case, **options):
    given = {"batch_size": 32, **CASES[case][2], "num_steps": 8, "seed": 1, "progress": False}
    if "optim" in given:
        given["optim"] = given["optim"]()
    return program.fit(X, **given | options)


def stop_after(step):
    def callback(program, values):
        if values["step"] == step:
            raise Stop

    return callback


def learned(program):
    found = {f"{n}.{k}": v for n, m in program.modules.items() for k, v in m.state_dict().items()}
    if isinstance(program.guide, nn.Module):
        found |= {f"guide.{k}": v for k, v in program.guide.state_dict().items()}
    with program.active():
        found |= {k: v.detach().clone() for k, v in pyro.get_param_store().items()}
    return found | {"stream": program.stream.state()["cpu"]}


@pytest.mark.filterwarnings("ignore:latent group")
@pytest.mark.filterwarnings("ignore:.*gives halves of")
@pytest.mark.parametrize("case", CASES)
def test_a_stopped_fit_ends_as_one_that_was_not(case, tmp_path):
    whole = fit(program_of(case), case)
    with pytest.raises(Stop):
        fit(program_of(case), case, checkpoint=tmp_path / "fit.pt", every=3, callbacks=[stop_after(5)])
    again = fit(program_of(case), case, resume=tmp_path / "fit.pt")
    assert again.num_steps == whole.num_steps == 8
    mine, theirs = learned(again), learned(whole)
    assert set(mine) == set(theirs)
    for name, value in theirs.items():
        assert torch.equal(mine[name], value), name
    np.testing.assert_array_equal(vars(again.history)["loss"], whole.history.loss)
    assert again.history.validation == whole.history.validation
    # And what follows is equal, too.
    assert fit(again, case).history.loss[8:] == fit(whole, case).history.loss[8:]


@pytest.mark.filterwarnings("ignore:latent group")
def test_a_loader_is_taken_up_where_it_was(tmp_path):
    loader = DataLoader(TensorDataset(X), batch_size=20, shuffle=True)
    options = {"num_epochs": 3, "seed": 1, "progress": False}
    whole = program_of("latent match").fit(loader, **options)
    assert whole.num_steps == 12  # of 90 data, ten are left out in every pass
    with pytest.raises(Stop):
        program_of("latent match").fit(
            loader, **options, checkpoint=tmp_path / "fit.pt", every=1, callbacks=[stop_after(7)]
        )
    again = program_of("latent match").fit(loader, **options, resume=tmp_path / "fit.pt")
    assert again.history.loss == whole.history.loss


@pytest.mark.filterwarnings("ignore:latent group")
def test_resume_and_checkpoint_of_one_name_begin_and_go_on(tmp_path):
    path = tmp_path / "fit.pt"
    first = fit(program_of("latent match"), "latent match", checkpoint=path, resume=path)
    assert first.num_steps == 8 and path.exists()
    again = fit(program_of("latent match"), "latent match", checkpoint=path, resume=path)
    assert again.num_steps == 8 and again.history.loss == first.history.loss
    longer = fit(program_of("latent match"), "latent match", checkpoint=path, resume=path, num_steps=10)
    assert longer.num_steps == 10 and longer.history.loss[:8] == first.history.loss


@pytest.mark.filterwarnings("ignore:latent group")
def test_a_fit_that_patience_ended_stays_ended(tmp_path):
    path = tmp_path / "fit.pt"
    options = {"validation": 0.4, "validate_every": 1, "patience": 2, "num_steps": 200, "lr": 0.5}
    first = fit(program_of("latent match"), "latent match", checkpoint=path, resume=path, **options)
    assert first.num_steps < 200
    again = fit(program_of("latent match"), "latent match", checkpoint=path, resume=path, **options)
    assert again.num_steps == first.num_steps
    again.encode(X)  # whose guide makes its networks at its first call
    for name, value in learned(first).items():
        assert torch.equal(learned(again)[name], value), name


@pytest.mark.filterwarnings("ignore:latent group")
def test_a_checkpoint_is_a_saved_program(tmp_path):
    path = tmp_path / "fit.pt"
    fit(program_of("latent match"), "latent match", checkpoint=path)
    loaded = SinkhornProgram.load(path, normal())
    assert loaded.num_steps == 8 and loaded.encode(X)["z"].shape == (1, 90, 2)


@pytest.mark.filterwarnings("ignore:latent group")
def test_wrong_checkpoints_are_named(tmp_path):
    path = tmp_path / "fit.pt"
    program = fit(program_of("latent match"), "latent match", checkpoint=path)
    with pytest.raises(ProgramError, match="had 90 data, this one has 40"):
        program_of("latent match").fit(X[:40], resume=path, batch_size=32, progress=False)
    with pytest.raises(ProgramError, match="had 32 data a batch, this one has 16"):
        program_of("latent match").fit(X, resume=path, batch_size=16, progress=False)
    with pytest.raises(FileNotFoundError):
        fit(program, "latent match", resume=tmp_path / "none.pt")
    program.save(tmp_path / "saved.pt")
    with pytest.raises(ProgramError, match="not the checkpoint of a fit"):
        fit(program, "latent match", resume=tmp_path / "saved.pt")
    with pytest.raises(ProgramError, match="there is no folder"):
        fit(program, "latent match", checkpoint=tmp_path / "no" / "fit.pt")
    with pytest.raises(ValueError, match="loss"):
        fit(program_of("joint"), "joint", resume=path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="damaged, cut short"):
        fit(program, "latent match", resume=path)


@pytest.mark.filterwarnings("ignore:latent group")
def test_nan_leaves_the_last_good_state_on_disk(tmp_path):
    path = tmp_path / "fit.pt"
    bad = X.clone()
    bad[77] = float("nan")
    program = program_of("latent match")
    with pytest.raises(NonFiniteError, match=r"step [0-9]+: argument 0 .* NaN") as caught:
        program.fit(bad, num_steps=50, batch_size=16, seed=4, progress=False, checkpoint=path, every=1000)
    assert any("last good step" in note for note in caught.value.__notes__)
    left = SinkhornProgram.load(path, normal())
    assert 0 < left.num_steps == program.num_steps
    left.encode(X)  # whose guide makes its networks at its first call
    for mine, other in [(left.modules["net"], program.modules["net"]), (left.guide, program.guide)]:
        for name, value in other.state_dict().items():
            assert torch.equal(mine.state_dict()[name], value), name


SCRIPT = """
import sys, torch, pyro, pyro.distributions as dist
from torch import nn
from pyro_sinkhorn import SinkhornProgram, Trace_Sinkhorn

torch.set_num_threads(1)
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
x = torch.randn(64, 2, generator=torch.Generator().manual_seed(1))

def model(x):
    pyro.module("net", net)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(net(z), 0.5).to_event(1), obs=x)

def told(program, values):
    print(int(values["step"]), flush=True)

path, out, steps = sys.argv[1:4]
program = SinkhornProgram(model, loss=Trace_Sinkhorn(match_size=8))
program.fit(x, num_steps=int(steps), batch_size=32, seed=0, progress=False, checkpoint=path, resume=path, every=1,
            callbacks=[told])
state = {n: m.state_dict() for n, m in program.modules.items()} | {"loss": torch.tensor(program.history.loss)}
torch.save(state, out)
"""


def killed_runs(folder, steps, kills, seed):
    """Kill a fit at random moments until it has been killed so often, then let it end.

    :returns: what the run without kills learned, what the killed one did, the kills, and the steps that each lost
    """
    script = folder / "run.py"
    script.write_text(textwrap.dedent(SCRIPT))

    def start(name):
        paths = [str(folder / f"{name}.ckpt"), str(folder / f"{name}.out"), str(steps)]
        command = [sys.executable, str(script), *paths]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def finish(name):
        with start(name) as process:
            _, said = process.communicate(timeout=300)
            assert process.returncode == 0, said

    finish("whole")
    rng, done, lost = np.random.default_rng(seed), 0, []
    reached = 0
    while done < kills:
        with start("killed") as process:
            begun = process.stdout.readline()  # a first step, so that every life gets somewhere
            if not begun:
                break  # the fit was over
            time.sleep(rng.exponential(0.03))
            os.kill(process.pid, signal.SIGKILL)
            seen = [int(begun), *map(int, process.stdout.read().split())]
        done += 1
        # A step is told before it is written: the last one told may be lost, the one before may not.
        lost.append(reached + 1 - int(begun) if reached else 0)
        reached = max(seen)
    finish("killed")
    ends = [torch.load(folder / f"{name}.out", weights_only=True) for name in ("whole", "killed")]
    return ends[0], ends[1], done, lost


def check_equal(whole, killed):
    assert torch.equal(whole["loss"], killed["loss"])
    for name, value in whole["net"].items():
        assert torch.equal(value, killed["net"][name]), name


def test_killed_at_any_moment_it_ends_alike(tmp_path):
    whole, killed, done, lost = killed_runs(tmp_path, steps=120, kills=2, seed=0)
    assert done == 2 and set(lost) <= {0, 1}
    check_equal(whole, killed)
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.slow
def test_fifty_kills_lose_nothing(tmp_path):
    whole, killed, done, lost = killed_runs(tmp_path, steps=3000, kills=50, seed=1)
    assert done == 50
    assert set(lost) <= {0, 1}
    check_equal(whole, killed)
    assert not list(tmp_path.glob("*.part"))
