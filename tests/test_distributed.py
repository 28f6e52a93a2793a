"""Two processes that share one loss come to what one process does; one that is gone ends the run with an error.

The two run the cases of tests/distributed_cases.py once, side by side on gloo, in seconds; each test looks at one of them.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from filelock import FileLock

from pyro_sinkhorn import SinkhornProgram, Trace_Sinkhorn, distributed
from pyro_sinkhorn.errors import LostRankError, ProgramError

SCRIPT = Path(__file__).with_name("distributed_cases.py")

EQUAL_TO_ONE_PROCESS = [
    "joint_equal_shards",
    "joint_unequal_shards",
    "marginal_unequal_shards",
    "markov_and_self",
    "covariates_that_differ_between_ranks_only",
    "units_and_masks",
    "enumerated_states",
    "globals_and_factors_count_once",
    "particles_in_a_plate",
    "simulators_with_covariates",
]


def free_ports() -> int:
    """The first of three ports in a row that nobody listens at."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            first = probe.getsockname()[1]
        try:
            for port in range(first, first + 3):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError):
            continue
        return first


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """What each of two processes found; they run once, also where several workers share the tests."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "two_processes"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / "done").exists():
            run_two_processes(folder / "found")
            (folder / "done").touch()
    return [torch.load(folder / f"found.{rank}", weights_only=True) for rank in range(2)]


def run_two_processes(output):
    """Both are killed if they take long, so that nothing can hang."""
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports())}
    started = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(output)],
            env=os.environ | common | {"RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = []
    try:
        for process in started:
            said.append(process.communicate(timeout=500)[0])
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert [process.returncode for process in started] == [0, 17], "\n".join(said)


def both(pair, name):
    """What the ranks found in a case."""
    found = [results.get(name) for results in pair]
    for rank, one in enumerate(found):
        assert not isinstance(one, str), f"rank {rank}: {one}"
        assert one is not None, f"rank {rank} did not come so far"
    return found


@pytest.mark.parametrize("name", EQUAL_TO_ONE_PROCESS)
def test_loss_and_gradients_are_those_of_one_process(pair, name):
    for found, expected in both(pair, name):
        assert found.keys() == expected.keys()
        assert any(key.startswith("gradient") for key in found)
        assert any(key.startswith("match") for key in found)
        for key, value in expected.items():
            mine, value = (torch.as_tensor(one, dtype=torch.float64) for one in (found[key], value))
            torch.testing.assert_close(mine, value, rtol=1e-6, atol=1e-6, msg=f"{name}: {key}")


def test_every_case_is_looked_at(pair):
    seen = {
        *EQUAL_TO_ONE_PROCESS,
        "own_noise_and_common_noise",
        "fit_shares_the_data_out",
        "svi_with_batch_norm",
    }
    seen |= {
        "resumed",
        "a_parameter_that_comes_late",
        "own_loop",
        "refused_losses",
        "other_programs",
        "other_data",
        "globals_that_read_the_data",
    }
    assert set(pair[0]) == seen | {"plates_that_all_ranks_have", "work_of_one_rank", "silent", "dead"}


def test_ranks_draw_their_own_noise_under_one_seed_and_split_alike(pair):
    first, second = both(pair, "own_noise_and_common_noise")
    for name in ("own", "local"):
        assert not torch.isclose(first[name], second[name]).any(), name
    for name in ("common", "split"):
        assert torch.equal(first[name], second[name]), name
    assert torch.equal(first["after"], second["after"])  # the state outside goes on alike


def test_fit_leaves_equal_parameters_and_learns(pair):
    first, second = both(pair, "fit_shares_the_data_out")
    assert first.keys() == second.keys()
    for name in first:
        if name != "rows":
            assert torch.equal(first[name], second[name]), name
    loss = first["loss"]
    assert len(loss) == 60
    # Per-datum losses of a step scatter by about 1; from start to end they fall by 6.
    assert loss[-10:].mean() < loss[:10].mean() - 3
    # Of every minibatch of 17, rank 0 takes 9 and rank 1 takes 8.
    assert first["rows"].tolist() == [9] * 60
    assert second["rows"].tolist() == [8] * 60


def test_a_shared_fit_is_resumed_to_the_bit(pair):
    for found, expected in both(pair, "resumed"):
        assert len(expected["value"]) == 10
        assert torch.equal(found["value"], expected["value"])


def test_parameters_and_statistics_of_batch_norm_stay_equal_in_svi(pair):
    first, second = both(pair, "svi_with_batch_norm")
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_parameters_that_come_late_are_those_of_rank_0(pair):
    first, second = both(pair, "a_parameter_that_comes_late")
    assert set(first) == set(second) == {"shift", "slope"}
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_a_loop_of_ones_own(pair):
    for found, expected in both(pair, "own_loop"):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(torch.as_tensor(found[name]), torch.as_tensor(value))


def test_work_of_one_rank_alone(pair):
    first, second = both(pair, "work_of_one_rank")
    assert torch.equal(first["value"], second["value"])


@pytest.mark.parametrize(
    ("case", "key", "expected"),
    [
        ("refused_losses", "Trace_EnergyScore", "Trace_EnergyScore compares what one process has"),
        ("refused_losses", "Trace_JointSinkhorn", "Trace_JointSinkhorn compares what one process has"),
        ("refused_losses", "Trace_DataSinkhorn", "LearnedCost has an optimiser of its own"),
        ("refused_losses", "Trace_ELBO", "Trace_ELBO is not one of pyro_sinkhorn"),
        ("other_programs", "message", "only rank 1 has 'decoder$$$0.bias (9,)"),
        ("other_data", "length", "rank 0: 61 data in batches of 61; rank 1: 60 data in batches of 60"),
        ("other_data", "values", "the ranks were given different data"),
        ("other_data", "too few", "batch_size=3 for 2 ranks"),
        ("other_data", "loader", "cannot share a DataLoader out"),
        ("globals_that_read_the_data", "message", "Their guide must not read the data"),
        ("plates_that_all_ranks_have", "message", "(w) are in the plates ['columns']"),
    ],
)
def test_what_cannot_be_shared_is_refused_on_both_ranks(pair, case, key, expected):
    for found in both(pair, case):
        assert expected in found[key]


def test_a_rank_that_does_not_answer_is_given_up_after_the_timeout(pair):
    found = pair[0]["silent"]
    assert "rank 0 of 2, evaluation 2 of a shared loss" in found["message"]
    assert "End all processes and start them again" in found["message"]
    assert 3 < found["seconds"] < 60  # told to wait for 4 seconds; the other would have come back after 60


def test_a_dead_rank_ends_the_fit_with_an_error(pair):
    found = pair[0]["dead"]
    assert "step 3: rank 0 of 2" in found["message"]
    assert "The program keeps the state of the step before" in found["message"]
    assert found["steps"] == 3
    assert found["seconds"] < 120  # the timeout was 240
    assert "dead" not in pair[1]


# In one process


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def test_alone_nothing_is_shared():
    with distributed.processes() as rank:
        assert rank == distributed.rank() == 0
        assert distributed.size() == 1
        assert distributed.is_first()
        assert not distributed.running()


def test_a_fit_under_torchrun_that_was_not_joined_says_so(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    program = SinkhornProgram(model, loss=Trace_Sinkhorn(match_size=4))
    with pytest.warns(UserWarning, match="fit runs alone in each of the 4 processes"):
        program.fit(torch.randn(16), num_steps=1, progress=False)


def test_joining_without_torchrun(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with (
        pytest.raises(ProgramError, match="are not set: start the script with torchrun"),
        distributed.processes(),
    ):
        pass
    with pytest.raises(ProgramError, match="timeout is 0"), distributed.processes(timeout=0):
        pass


def test_others_that_never_come(monkeypatch):
    for name, value in {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(
            LostRankError, match=r"rank 0 of 2 could not join the others at 127.0.0.1:0 within 1 s"
        ),
        distributed.processes(timeout=1),
    ):
        pass
