"""The posterior guide against exact answers, on programs that have them.

    python benchmarks/posterior_exact.py
    python benchmarks/posterior_exact.py --smoke-test

Each program is calibrated by ``SinkhornProgram.calibrate`` with one recipe, on data of which it uses only the shape (save
the hierarchy, which is told to simulate near its one data set). The guide's draws for data that it has never seen are then
compared with the exact posterior, number by number:

- *mean error*: root mean square over data sets and numbers of guide mean - exact mean, in exact posterior standard deviations
  and in prior ones;
- *sd ratio*: mean over data sets and numbers of guide sd / exact sd, and their root mean square distance from 1;
- *covariance error*: |guide - exact| covariance over sqrt(S_ii S_jj): mean over data, then the largest of all entries;
- *responsibilities*: |guide probability - exact probability| of a state, which the guide tells without draws.

A run that is killed goes on where it stopped.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from _resume import Rows
from globals_and_dependence import EXACT_MEAN, EXACT_SD, PRECISION, N, hierarchy
from pyro import poutine
from torch import Tensor

from pyro_sinkhorn import SinkhornProgram
from pyro_sinkhorn.refinement import refine

#: Mean error in prior sds, |sd ratio - 1|, covariance error, error of a probability: what each program is to reach.
TARGET = {"mean_in_prior_sds": 0.05, "sd": 0.1, "covariance": 0.1, "responsibility": 0.02, "mean": 0.01}


@dataclass(frozen=True)
class Exact:
    """An exact posterior: ``mean (datasets, k)``, ``cov (datasets, k, k)``, or state probabilities ``(datasets, S)``."""

    mean: Tensor
    cov: Tensor


@dataclass(frozen=True)
class Problem:
    """A program with a known posterior.

    model:    the program
    observe:  data sets to be tested on, made with a generator: arguments of one call each
    exact:    their posteriors; of local latents, one a datum
    columns:  latents as numbers, ``(..., k)``, of draws by site
    prior_sd: of these numbers, ``(k,)``
    options:  of ``calibrate``, besides the number of steps
    num_draws: guide draws of each data set
    refined:  steps of refinement to report beside; 0 for none
    """

    model: Callable[..., Any]
    observe: Callable[[torch.Generator], list[Tensor]]
    exact: Callable[[Tensor], Exact]
    columns: Callable[[dict[str, Tensor]], Tensor]
    prior_sd: Tensor
    num_draws: int = 4000
    options: dict[str, Any] = field(default_factory=dict)
    refined: int = 0
    targets: tuple[str, ...] = ("mean_in_prior_sds", "sd")


def linear_gaussian(d: int, n_tests: int) -> Problem:
    """z ~ N(0, I), x ~ N(Az, .25 I), A with independent N(0, 1/d) entries; z is local."""
    a = torch.randn(d, d, generator=torch.Generator().manual_seed(d)) / d**0.5

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(d), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ a.T, 0.5).to_event(1), obs=x)

    def observe(rng: torch.Generator) -> list[Tensor]:
        z = torch.randn(n_tests, d, generator=rng)
        return [z @ a.T + 0.5 * torch.randn(n_tests, d, generator=rng)]

    def exact(x: Tensor) -> Exact:
        cov = torch.linalg.inv(torch.eye(d, dtype=torch.float64) + 4 * a.double().T @ a.double())
        return Exact(4 * x.double() @ a.double() @ cov, cov.expand(len(x), d, d))

    targets = ("mean_in_prior_sds", "covariance")
    return Problem(model, observe, exact, lambda z: z["z"], torch.ones(d), refined=100, targets=targets)


def beta_bernoulli(n_tests: int) -> Problem:
    """p ~ Beta(2, 2), a global, and 20 tosses."""

    def model(x: Tensor) -> None:
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Bernoulli(p), obs=x)

    def observe(rng: torch.Generator) -> list[Tensor]:
        # Beta(2, 2) is the middle of three uniforms.
        p = torch.rand(n_tests, 3, generator=rng).median(-1).values
        return list((torch.rand(n_tests, 20, generator=rng) < p.unsqueeze(-1)).float())

    def exact(x: Tensor) -> Exact:
        law = dist.Beta(2 + x.double().sum(), 2 + (1 - x.double()).sum())
        return Exact(law.mean.reshape(1, 1), law.variance.reshape(1, 1, 1))

    return Problem(model, observe, exact, lambda z: z["p"].reshape(-1, 1, 1), torch.tensor([0.05**0.5]))


def gamma_poisson(n_tests: int) -> Problem:
    """rate ~ Gamma(2, 1), a global, and 20 counts."""

    def model(x: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Poisson(rate), obs=x)

    def observe(rng: torch.Generator) -> list[Tensor]:
        rate = -torch.rand(n_tests, 2, generator=rng).log().sum(-1)
        return list(torch.poisson(rate.unsqueeze(-1).expand(-1, 20), generator=rng))

    def exact(x: Tensor) -> Exact:
        law = dist.Gamma(2 + x.double().sum(), torch.tensor(21.0, dtype=torch.float64))
        return Exact(law.mean.reshape(1, 1), law.variance.reshape(1, 1, 1))

    return Problem(model, observe, exact, lambda z: z["rate"].reshape(-1, 1, 1), torch.tensor([2**0.5]))


def dirichlet_multinomial(n_tests: int) -> Problem:
    """theta ~ Dirichlet(.5, 1, 1, 2), local, and 30 counts a document in 4 categories."""
    concentration = torch.tensor([0.5, 1.0, 1.0, 2.0])

    def model(x: Tensor) -> None:
        with pyro.plate("documents", len(x)):
            theta = pyro.sample("theta", dist.Dirichlet(concentration))
            pyro.sample("x", dist.Multinomial(30, theta), obs=x)

    def observe(rng: torch.Generator) -> list[Tensor]:
        # Gamma(k / 2) is half the sum of k squared normals.
        gammas = torch.stack(
            [torch.randn(n_tests, int(2 * c), generator=rng).square().sum(-1) for c in concentration], -1
        )
        words = torch.multinomial(gammas / gammas.sum(-1, keepdim=True), 30, True, generator=rng)
        return [torch.nn.functional.one_hot(words, 4).sum(1).float()]

    def exact(x: Tensor) -> Exact:
        c = concentration.double() + x.double()
        mean = c / c.sum(-1, keepdim=True)
        cov = torch.diag_embed(mean) - mean.unsqueeze(-1) * mean.unsqueeze(-2)
        return Exact(mean, cov / (c.sum(-1) + 1).reshape(-1, 1, 1))

    prior_sd = dist.Dirichlet(concentration).variance.sqrt()
    return Problem(model, observe, exact, lambda z: z["theta"], prior_sd)


def normal_gamma(n_tests: int) -> Problem:
    """tau ~ Gamma(3, 3), mu ~ N(0, 1/tau), globals, and 20 data from N(mu, 1/tau)."""

    def model(x: Tensor) -> None:
        tau = pyro.sample("tau", dist.Gamma(3.0, 3.0))
        mu = pyro.sample("mu", dist.Normal(0.0, tau.rsqrt()))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, tau.rsqrt()), obs=x)

    def observe(rng: torch.Generator) -> list[Tensor]:
        tau = -torch.rand(n_tests, 3, 1, generator=rng).log().sum(1) / 3
        mu = torch.randn(n_tests, 1, generator=rng) * tau.rsqrt()
        return list(mu + torch.randn(n_tests, 20, generator=rng) * tau.rsqrt())

    def exact(x: Tensor) -> Exact:
        x = x.double()
        n, mean = len(x), x.mean()
        k, a = 1 + n, 3 + n / 2
        b = 3 + 0.5 * (x - mean).square().sum() + n * mean.square() / (2 * k)
        moments = torch.stack([n * mean / k, a / b])
        return Exact(moments.unsqueeze(0), torch.stack([b / (k * (a - 1)), a / b**2]).diag().unsqueeze(0))

    def columns(z: dict[str, Tensor]) -> Tensor:
        return torch.stack([z["mu"].reshape(-1, 1), z["tau"].reshape(-1, 1)], -1)

    return Problem(model, observe, exact, columns, torch.tensor([1.5**0.5, 3**-0.5]))


def global_mean() -> Problem:
    """The global of benchmarks/globals_and_dependence.py, 200 local latents below it, one data set."""

    def observe(rng: torch.Generator) -> list[Tensor]:
        x = 3 + 0.7 * torch.randn(N, generator=torch.Generator().manual_seed(0))
        return [x + EXACT_MEAN * PRECISION / (N / 0.5) - x.mean()]

    def exact(x: Tensor) -> Exact:
        return Exact(torch.full((1, 1), EXACT_MEAN), torch.full((1, 1, 1), EXACT_SD**2))

    return Problem(
        hierarchy, observe, exact, lambda z: z["mu"].reshape(-1, 1, 1), torch.tensor([5.0]),
        options={"num_rounds": 3}, refined=100, targets=("mean", "sd"),
    )  # fmt: skip


def mixture(n_tests: int) -> Problem:
    """c ~ (.3, .7), x ~ N(+1 or -1, 1) in 2 dimensions of which the second has a scale of its own; c is local."""
    means = torch.tensor([[-1.0, 0.0], [1.0, 0.5]])
    scales = torch.tensor([[1.0, 0.5], [1.0, 1.0]])
    weights = torch.tensor([0.3, 0.7])

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(means[c], scales[c]).to_event(1), obs=x)

    def observe(rng: torch.Generator) -> list[Tensor]:
        c = (torch.rand(n_tests, generator=rng) < weights[1]).long()
        return [means[c] + scales[c] * torch.randn(n_tests, 2, generator=rng)]

    def exact(x: Tensor) -> Exact:
        log_p = dist.Normal(means.double(), scales.double()).to_event(1).log_prob(x.double().unsqueeze(1))
        p = (log_p + weights.double().log()).softmax(-1)[:, 1:]
        return Exact(p, (p * (1 - p)).unsqueeze(-1))

    return Problem(
        model, observe, exact, lambda z: z["c"].unsqueeze(-1).double(), torch.tensor([0.21**0.5]),
        targets=("responsibility",),
    )  # fmt: skip


def problems(n: int) -> dict[str, Problem]:
    """All of them; local ones tested on 10 n data, global ones on n data sets."""
    return {
        "linear-Gaussian, d = 2": linear_gaussian(2, 10 * n),
        "linear-Gaussian, d = 10": linear_gaussian(10, 10 * n),
        "Dirichlet-multinomial": dirichlet_multinomial(10 * n),
        "mixture": mixture(10 * n),
        "Beta-Bernoulli": beta_bernoulli(n),
        "Gamma-Poisson": gamma_poisson(n),
        "normal-gamma": normal_gamma(n),
        "global mean above 200 locals": global_mean(),
    }


def measures(problem: Problem, draws: list[Tensor], exact: list[Exact]) -> dict[str, Any]:
    """Draws ``(num, datasets, k)`` of every call against the exact moments."""
    mean = torch.cat([d.double().mean(0) for d in draws])
    centred = [d.double() - d.double().mean(0) for d in draws]
    cov = torch.cat([torch.einsum("sni,snj->nij", c, c) / (len(c) - 1) for c in centred])
    true_mean = torch.cat([e.mean for e in exact]).double()
    true_cov = torch.cat([e.cov for e in exact]).double()
    sd, true_sd = (c.diagonal(dim1=-2, dim2=-1).sqrt() for c in (cov, true_cov))
    error, ratio = mean - true_mean, sd / true_sd
    scaled = (cov - true_cov).abs() / (true_sd.unsqueeze(-1) * true_sd.unsqueeze(-2))
    return {
        "mean_in_posterior_sds": float((error / true_sd).square().mean().sqrt()),
        "mean_in_prior_sds": float((error / problem.prior_sd.double()).square().mean().sqrt()),
        "mean": float(error.abs().max()),
        "sd_ratio": float(ratio.mean()),
        "sd_rms": float((ratio - 1).square().mean().sqrt()),
        "covariance": float(scaled.mean(0).max()),
        "covariance_of_any_datum": float(scaled.max()),
        # Of the exact posterior's own draws, as many: what would be measured if nothing were wrong.
        "mean_in_posterior_sds_by_chance": len(draws[0]) ** -0.5,
        "sd_rms_by_chance": (2 * len(draws[0])) ** -0.5,
    }


def responsibilities(program: SinkhornProgram, x: Tensor, exact: Exact) -> dict[str, Any]:
    """Probabilities of the second state as the guide tells them."""
    with program.active(), torch.no_grad():
        fn = poutine.trace(program.calibration.guide).get_trace(x).nodes["c"]["fn"]
    found = fn.log_prob(fn.enumerate_support(expand=False))[1].exp().double().unsqueeze(-1)
    error = (found - exact.mean).abs()
    return {
        "mean_responsibility_error": float(error.mean()),
        "99%_responsibility_error": float(error.flatten().quantile(0.99)),
        "responsibility": float(error.max()),
    }


def reached(problem: Problem, row: dict[str, Any]) -> dict[str, bool]:
    """Which of its targets a program reaches."""
    found = {"sd": abs(row.get("sd_ratio", 1) - 1)} | row
    return {name: bool(found[name] <= TARGET[name]) for name in problem.targets}


def run(problem: Problem, seed: int, steps: int, num_draws: int) -> dict[str, Any]:
    """One calibration and its measures, on data sets that are the same for all seeds."""
    pyro.set_rng_seed(seed)
    tests = problem.observe(torch.Generator().manual_seed(1234))
    exact = [problem.exact(x) for x in tests]
    program = SinkhornProgram(problem.model)
    # Shape alone counts, but of 256 rows a step so that few rows do not repeat.
    shape = (
        tests[0]
        if len(tests) > 1 or problem.options
        else tests[0][:1].repeat(256, *[1] * (tests[0].dim() - 1))
    )
    began = time.perf_counter(), time.process_time()
    program.calibrate(shape, num_steps=steps, seed=seed, progress=False, **problem.options)
    row: dict[str, Any] = {
        "seconds": time.perf_counter() - began[0],
        "cpu_seconds": time.process_time() - began[1],
    }
    assert program.calibration is not None
    row["simulations"] = program.calibration.num_simulations
    if "responsibility" in problem.targets:
        row |= responsibilities(program, tests[0], exact[0])
        return row | {"reached": reached(problem, row)}
    drawn = [program.posterior(x, num_samples=num_draws, seed=seed, check_range=False) for x in tests]
    row |= measures(problem, [problem.columns(z) for z in drawn], exact)
    row["reached"] = reached(problem, row)
    if problem.refined:
        began = time.perf_counter(), time.process_time()
        few = [{name: value[:1000] for name, value in z.items()} for z in drawn]
        better = [
            refine(problem.model, z, x, num_steps=problem.refined, seed=seed).draws
            for z, x in zip(few, tests, strict=True)
        ]
        row["refined"] = measures(problem, [problem.columns(z) for z in better], exact)
        row["refined"] |= {
            "steps": problem.refined,
            "seconds": time.perf_counter() - began[0],
            "cpu_seconds": time.process_time() - began[1],
            "reached": reached(problem, row["refined"]),
        }
    return row


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke-test", action="store_true")
    parser.add_argument("--steps", type=int, default=2000, help="of every calibration")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--problems", nargs="+", choices=list(problems(1)), help="some of them only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    smoke = options.smoke_test
    steps, seeds, num_draws, n = (4, [0], 20, 2) if smoke else (options.steps, options.seeds, 4000, 10)
    settings = {"num_draws": num_draws, "data_sets": n, "data": 10 * n, "targets": TARGET}
    rows = Rows("posterior_exact", settings, ["problem", "seed", "steps"], keep=not smoke)
    for seed in seeds:
        for name, problem in problems(n).items():
            if name not in (options.problems or [name]):
                continue
            rows.make(
                lambda p=problem, s=seed: run(p, s, steps, num_draws), problem=name, seed=seed, steps=steps
            )
    missed = {row["problem"] for row in rows.rows if not all(row["reached"].values())}
    print("all targets reached" if not missed else f"missed in some seed: {sorted(missed)}")


if __name__ == "__main__":
    main()
