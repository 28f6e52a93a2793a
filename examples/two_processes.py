"""One fit shared by several processes: the same program, the same batch size, a part of the work each.

    torchrun --nproc-per-node 2 examples/two_processes.py
    python examples/two_processes.py                # alone: the same fit in one process
    python examples/two_processes.py --smoke-test   # starts a second process by itself; a few steps

Nothing in the program knows of processes. `distributed.processes()` joins those that torchrun started, and `fit` then takes
this process's part of every minibatch, matches the latents of all, and adds the gradients up.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys

import pyro
import pyro.distributions as dist
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from pyro_sinkhorn import SinkhornProgram, Trace_Sinkhorn, distributed

torch.set_num_threads(1)  # one core a process
torch.manual_seed(0)
decoder = nn.Sequential(nn.Linear(10, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, 64))


def digits(x: Tensor) -> None:
    """Ten archetypes, mixed; pixel noise of standard deviation .2."""
    pyro.module("decoder", decoder)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Dirichlet(torch.full((10,), 0.5)))
        pyro.sample("x", dist.Normal(decoder(z).sigmoid(), 0.2).to_event(1), obs=x)


def main() -> None:
    """Fit, and say what every process has done."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-steps", type=int, default=500)
    parser.add_argument("--smoke-test", action="store_true")
    options = parser.parse_args()
    num_steps = 5 if options.smoke_test else options.num_steps

    # Every process reads all data; fit shares them out.
    x = torch.tensor(load_digits().data / 16, dtype=torch.get_default_dtype())
    program = SinkhornProgram(digits, loss=Trace_Sinkhorn(prior_weight=100.0))
    with distributed.processes(timeout=120) as rank:
        program.fit(x, num_steps=num_steps, batch_size=256, lr=2e-3, seed=0, progress=not options.smoke_test)
        weights = sum(float(p.detach().double().sum()) for p in program.modules["decoder"].parameters())
        print(
            f"rank {rank} of {distributed.size()}: loss {program.history.loss[-1]:.4f}, sum of weights {weights:.6f}",
            flush=True,
        )
        if (
            distributed.is_first() and not options.smoke_test
        ):  # diagnosing, plotting, saving: one process is enough
            program.diagnose(x, seed=1)


def start_two() -> int:
    """What torchrun does: start this script twice and tell each who it is."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    where = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen([sys.executable, *sys.argv], env=os.environ | where | {"RANK": str(rank)})
        for rank in range(2)
    ]
    return max(abs(process.wait()) for process in started)


if __name__ == "__main__":
    if "--smoke-test" in sys.argv and "WORLD_SIZE" not in os.environ:
        sys.exit(start_two())
    main()
