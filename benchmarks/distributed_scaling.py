"""What a second process brings: CPU and wall time of a step at one global batch, and what is sent.

    python benchmarks/distributed_scaling.py                # goes on where it stopped
    python benchmarks/distributed_scaling.py --smoke-test   # seconds; writes nothing

``Trace_Sinkhorn`` by ``SVI`` on made-up images of 784 pixels, Dirichlet prior, float32, one thread a process, gloo on one
machine; every process has its part of the batch. CPU seconds are of the process, and do not count what else the machine
does. Wall time does, and waiting for the other process with it. The match is that of all data, made by every process. Bytes
are those that a process hands to ``torch.distributed`` in a step, by the collective.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections import defaultdict
from functools import partial
from statistics import median
from typing import Any
from unittest import mock

import pyro
import pyro.distributions as dist
import torch
import torch.distributed
from _resume import Rows
from pyro.infer import SVI
from pyro.optim import Adam
from torch import Tensor, nn

from pyro_sinkhorn import Implicit, Trace_Sinkhorn, distributed
from pyro_sinkhorn.losses import latent_match

PIXELS, LATENTS = 784, 10
CASES = [(width, batch) for width in (256, 1024) for batch in (256, 1024)]
COLLECTIVES = {"all_gather": 1, "all_reduce": 0, "broadcast": 0}

Record = dict[str, Any]


class Meter:
    """Bytes and wall time of the collectives, CPU time of the match."""

    def __init__(self) -> None:
        self.bytes: dict[str, int] = defaultdict(int)
        self.calls: dict[str, int] = defaultdict(int)
        self.waiting = self.match = 0.0

    def collective(self, name: str, function: Any) -> Any:
        """A collective that is counted."""

        def call(*args: Any, **kwargs: Any) -> Any:
            sent = args[COLLECTIVES[name]]
            self.bytes[name] += sent.numel() * sent.element_size()
            self.calls[name] += 1
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.waiting += time.perf_counter() - start
            return result

        return call

    def matching(self, *args: Any, **kwargs: Any) -> Any:
        """The match, timed."""
        start = time.process_time()
        result = MATCH(*args, **kwargs)
        self.match += time.process_time() - start
        return result


MATCH = latent_match.match


def program(width: int) -> tuple[Any, Any]:
    """A decoder and an encoder of two hidden layers."""
    decoder = nn.Sequential(
        nn.Linear(LATENTS, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, PIXELS)
    )
    encoder = nn.Sequential(
        nn.Linear(PIXELS, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, LATENTS)
    )

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Dirichlet(torch.full((LATENTS,), 0.5)))
            pyro.sample("x", dist.Normal(decoder(z), 0.2).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", Implicit(encoder(x).softmax(-1), event_dim=1))

    return model, guide


def worker(width: int, batch: int, warm_up: int, steps: int) -> Record:
    """Steps of one process; what each took, and this process of all."""
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    model, guide = program(width)
    with distributed.processes(timeout=300) as rank:
        x = torch.rand(batch, PIXELS, generator=torch.Generator().manual_seed(1))
        x = x.tensor_split(distributed.size())[rank]
        svi = SVI(model, guide, Adam({"lr": 1e-3}), loss=Trace_Sinkhorn())
        for _ in range(warm_up):
            svi.step(x)
        meter, wall, cpu = Meter(), [], []
        patches = [
            mock.patch.object(
                torch.distributed, name, meter.collective(name, getattr(torch.distributed, name))
            )
            for name in COLLECTIVES
        ]
        patches.append(mock.patch.object(latent_match, "match", meter.matching))
        for patch in patches:
            patch.start()
        for _ in range(steps):
            at = time.perf_counter(), time.process_time()
            svi.step(x)
            wall.append(time.perf_counter() - at[0])
            cpu.append(time.process_time() - at[1])
        for patch in patches:
            patch.stop()
        return {
            "cpu_ms": 1e3 * median(cpu),
            "wall_ms": 1e3 * median(wall),
            "match_cpu_ms": 1e3 * meter.match / steps,
            "in_collectives_wall_ms": 1e3 * meter.waiting / steps,
            "bytes": {name: count / steps for name, count in meter.bytes.items()},
            "calls": {name: count / steps for name, count in meter.calls.items()},
            "parameters": sum(p.numel() for _, p in pyro.get_param_store().named_parameters()),
        }


def measure(processes: int, width: int, batch: int, warm_up: int, steps: int) -> Record:
    """Start so many processes; the mean of what they took, and what the first one sent."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, __file__, "--worker", *map(str, (width, batch, warm_up, steps))]
    where = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        subprocess.Popen(
            command, env=os.environ | where | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(processes)
    ]
    said = [process.communicate(timeout=900)[0] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError(f"a process ended with {[process.returncode for process in started]}")
    found = [json.loads(text.strip().splitlines()[-1]) for text in said]
    timed = ("cpu_ms", "wall_ms", "match_cpu_ms", "in_collectives_wall_ms")
    means = {name: sum(one[name] for one in found) / processes for name in timed}
    return found[0] | means


def main() -> None:
    """Measure every case with one process and with two."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke-test", action="store_true")
    parser.add_argument("--worker", nargs=4, type=int, metavar=("WIDTH", "BATCH", "WARM_UP", "STEPS"))
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(worker(*options.worker)))
        return
    warm_up, steps = (1, 2) if options.smoke_test else (5, 25)
    settings = {
        "dtype": "float32",
        "pixels": PIXELS,
        "latents": LATENTS,
        "networks": "encoder and decoder of two hidden layers, SiLU",
        "match_size": 64,
        "backend": "gloo, one machine, one thread a process",
        "steps": steps,
        "note": "the cores are shared with other work: wall times include it, CPU times do not",
    }
    keys = ("width", "batch", "processes", "seed")
    rows = Rows("distributed_scaling", settings, keys, not options.smoke_test)
    for width, batch in [(32, 256)] if options.smoke_test else CASES:
        for processes in (1, 2):
            key = {"width": width, "batch": batch, "processes": processes, "seed": 0}
            rows.make(partial(measure, processes, width, batch, warm_up, steps), **key)


if __name__ == "__main__":
    main()
