"""A process of its own for every method and cell, so that a slow or hungry one harms no other, and its parent's end of it.

The child takes one JSON line a request and answers in JSON lines. It stays between requests: the parent sweeps all methods
of a cell one after another, then times their chosen settings in turns.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import queue
import resource
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Message = dict[str, Any]
#: Share of the machine's memory that one process may ask for.
MEMORY_SHARE = 0.6
#: Seconds above which a call is timed once.
SLOW = 3.0


class Worker:
    """The parent's end."""

    def __init__(self, threads: int) -> None:
        environment = os.environ | {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        if threads == 1:  # JAX has threads of its own
            flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
            environment["XLA_FLAGS"] = flags
        environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed with the process
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
        )
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def send(self, request: Message) -> None:
        """A request; :meth:`answers` tells of a process that is no more."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()

    def answers(self, seconds: float) -> Iterator[Message]:
        """To the last request. The last one has ``end``: ``done``, or why there is no more."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                line = self._answers.get(timeout=max(deadline - time.monotonic(), 0.01))
            except queue.Empty:
                self.stop()
                yield {"end": f"stopped after {seconds:g} s"}
                return
            if not line:
                yield {"end": self._last_words()}
                return
            answer = json.loads(line)
            yield answer
            if "end" in answer:
                return

    def _last_words(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().strip().splitlines()
        return said[-1][:200] if said else f"its process ended with {code}"

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._errors.close()


# The child.


def _resident() -> float:
    """Megabytes now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def _pin(threads: int) -> None:
    """To as many cores as threads, pools that a library has made already included: JAX has one that no flag ends."""
    if not hasattr(os, "sched_getaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))[-threads:]
    tasks = Path("/proc/self/task")
    for task in [int(path.name) for path in tasks.iterdir()] if tasks.exists() else [0]:
        os.sched_setaffinity(task, cores)


def _give_back() -> None:
    """Return freed memory to the system, so that what a call asks for shows; glibc keeps some for later."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _forget_peak() -> bool:
    """Let the kernel count the peak anew, where it does."""
    _give_back()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak() -> float:
    """Megabytes at most since the start, or since :func:`_forget_peak`."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e3 * 1.024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3 * 1.024


def time_it(run: Any, seconds: float, most: int, least: int = 1) -> tuple[list[float], list[float]]:
    """Milliseconds of processor and of wall clock of every repetition, for about so many seconds."""
    cpu, wall = [], []
    stop = time.perf_counter() + seconds
    while len(wall) < least or (time.perf_counter() < stop and len(wall) < most):
        start, start_cpu = time.perf_counter(), time.process_time()
        run()
        cpu.append((time.process_time() - start_cpu) * 1e3)
        wall.append((time.perf_counter() - start) * 1e3)
    return cpu, wall


class _Child:
    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.attempts: dict[int, Any] = {}

    def prepare(self, request: Message) -> Iterator[Message]:
        """Import what a method needs, and run nothing."""
        import torch
        from _clouds import Cell
        from _peers import METHODS

        method, options = METHODS[request["method"]]
        next(iter(method(torch.zeros(2, 1), torch.ones(2, 1), 1.0, Cell(2, 1, 1.0), **options)))
        yield {"end": "done"}

    def sweep(self, request: Message) -> Iterator[Message]:
        """Every attempt of a method: error, first call, a few repetitions, memory; tighter ones until accurate enough."""
        import torch
        from _clouds import Cell, clouds, epsilon_of
        from _peers import METHODS

        cell, groups = Cell(**request["cell"]), request.get("groups")
        x, y = clouds(cell, groups)
        epsilon = epsilon_of(cell, x, y)
        _pin(self.threads)  # not before: all import at once, on whatever is free
        method, options = METHODS[request["method"]]
        options = options | request.get("options", {})
        deadline = time.perf_counter() + request["seconds"]
        held = torch.load(request["reference"], weights_only=True) if request.get("reference") else None
        start = time.perf_counter()
        offered = method(x, y, epsilon, cell, **options)
        enough: set[str] = set()
        seen: set[str] = set()
        before, cold = None, True
        for index, attempt in enumerate(offered):
            if before is None:
                imports = time.perf_counter() - start
                _give_back()  # of the clouds' making
                before = _resident()
            if request.get("only_default") and not attempt.default:
                continue
            if attempt.variant in enough and not attempt.default:
                continue
            resets = _forget_peak()
            first = time.perf_counter()
            value, gradient, passes = attempt.run()
            first = time.perf_counter() - first
            errors = _errors(value, gradient, held)
            left = deadline - time.perf_counter()
            # Slow calls are not repeated, but where they may have compiled.
            new, seen = attempt.variant not in seen, seen | {attempt.variant}
            again = request["repeat"] if first < left and (new or first < SLOW) else 0.0
            cpu, wall = time_it(attempt.run, again, 25) if again else ([], [])
            self.attempts[index] = attempt
            answer = {
                "index": index,
                "variant": attempt.variant,
                "knob": attempt.knob,
                "default": attempt.default,
                "tolerance": attempt.tolerance,
                "first_ms": first * 1e3,
                "cpu_ms": cpu or [first * 1e3],
                "wall_ms": wall or [first * 1e3],
                "repeated": bool(cpu),
                "passes": None if passes is None else int(passes),
                "peak_mb": max(_peak() - before, 0.0) if resets or cold else None,
                **errors,
            }
            if cold:
                answer |= {"cold_ms": first * 1e3, "setup_ms": imports * 1e3}
            cold = False
            yield answer
            if errors and attempt.in_order and errors["gradient_error"] <= request["target"]:
                enough.add(attempt.variant)
            if min(wall or [first * 1e3]) / 1e3 > deadline - time.perf_counter():
                yield {"end": f"no time for more in {request['seconds']:g} s"}
                return
        yield {"end": "done"}

    def time(self, request: Message) -> Iterator[Message]:
        """A settled attempt again."""
        cpu, wall = time_it(self.attempts[request["index"]].run, request["seconds"], 50)
        yield {"cpu_ms": cpu, "wall_ms": wall}
        yield {"end": "done"}


def _errors(value: Any, gradient: Any, held: Any) -> dict[str, float]:
    if held is None:
        return {}
    import numpy as np
    import torch

    found, truth = torch.as_tensor(np.asarray(gradient.cpu() if hasattr(gradient, "cpu") else gradient)), held
    error = (found.double() - truth["gradient"]).norm() / truth["gradient"].norm()
    finite = bool(error.isfinite())
    return {
        "gradient_error": error.item() if finite else 1e9,  # JSON has no NaN
        "value_error": abs(float(value) - truth["value"]) / abs(truth["value"]) if finite else 1e9,
    }


def main() -> None:
    threads = int(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print is no answer
    import torch
    from _peers import Missing

    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_DATA, (int(memory * MEMORY_SHARE),) * 2)
    child = _Child(threads)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            for answer in getattr(child, request["do"])(request):
                print(json.dumps(answer), file=answers, flush=True)
        except Missing as missing:
            print(json.dumps({"end": "skipped", "reason": str(missing)}), file=answers, flush=True)
        except (MemoryError, RuntimeError) as error:
            text = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
            reason = "out of memory" if isinstance(error, MemoryError) or "allocate" in text else text
            print(json.dumps({"end": reason}), file=answers, flush=True)


if __name__ == "__main__":
    main()
