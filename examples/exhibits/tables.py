"""Programs of numbers: wines of scikit-learn's, and data drawn from the programs themselves, whose truth is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.datasets import load_wine
from sklearn.metrics import adjusted_rand_score
from sklearn.mixture import GaussianMixture
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from exhibits.base import Exhibit, fitted_by, rms, scatter, simulate
from pyro_sinkhorn import TraceEnum_Sinkhorn, models


def gaussian_mixture() -> Exhibit:
    """178 wines of three cultivars, 13 measurements each, standardised."""
    data = load_wine()
    x = torch.tensor(data.data, dtype=torch.get_default_dtype())
    x = (x - x.mean(0)) / x.std(0)
    centres, _ = models.spread_points(x, 3, generator=torch.Generator().manual_seed(0))
    program = fitted_by(
        models.gaussian_mixture(3, 13, start=centres), loss=TraceEnum_Sinkhorn(prior_weight=10.0)
    )

    def found() -> Tensor:
        return program.encode(x, seed=1)["z"][0]

    def check() -> str:
        sizes = sorted(found().bincount(minlength=3).tolist())
        alone = GaussianMixture(3, covariance_type="diag", random_state=0).fit_predict(x)
        return (
            f"adjusted Rand index with the cultivars {adjusted_rand_score(data.target, found()):.2f}, by EM "
            f"{adjusted_rand_score(data.target, alone):.2f}; sizes {sizes}"
        )

    def draw(axes: Any) -> None:
        with program.active():
            middles = pyro.param("centres").detach()
        for cultivar, marker in enumerate("os^"):
            part = torch.tensor(data.target == cultivar)
            axes.scatter(*x[part][:, [0, 6]].T, c=[f"C{k}" for k in found()[part]], marker=marker, s=9)
        axes.plot(*middles[:, [0, 6]].T, "k+", ms=9)
        axes.set(xlabel="alcohol; markers are cultivars", ylabel="flavanoids; colours clusters")

    return Exhibit(program, (x,), check, draw, lr=1e-2)


def spike_and_slab() -> Exhibit:
    """1500 data drawn from the program with loadings of its own."""
    loadings = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    truth = simulate(models.spike_and_slab(), torch.empty(1500, 12), loadings=loadings)
    x = truth["x"]
    program = fitted_by(models.spike_and_slab(), loss=TraceEnum_Sinkhorn(prior_weight=100.0))

    def matched() -> tuple[Tensor, Tensor]:
        with program.active():
            learned = pyro.param("loadings").detach()
        cosines = normalize(loadings, dim=-1) @ normalize(learned, dim=-1).mT
        _, columns = linear_sum_assignment(-cosines.abs())
        signs = cosines[torch.arange(4), columns].sign()
        return signs.unsqueeze(-1) * learned[columns], torch.as_tensor(columns)

    def likeliest() -> Tensor:
        patterns = torch.cartesian_prod(*[torch.arange(2.0)] * 4)
        active = patterns.unsqueeze(-1) * loadings
        covariance = active.mT @ active + 0.2**2 * torch.eye(12)
        law = torch.distributions.MultivariateNormal(torch.zeros(12), covariance)
        prior = torch.distributions.Bernoulli(torch.tensor(0.4)).log_prob(patterns).sum(-1)
        posterior = (law.log_prob(x.unsqueeze(1)) + prior).softmax(-1)
        return (posterior @ patterns > 0.5).to(x.dtype)

    def check() -> str:
        learned, columns = matched()
        cosine = cosine_similarity(learned, loadings, dim=-1).min()
        switches = program.encode(x, seed=1)["switches"][0][:, columns]
        right, exact = ((one == truth["switches"]).to(x.dtype).mean() for one in (switches, likeliest()))
        return (
            f"worst cosine of a loading with the truth {cosine:.3f}; switches right {right:.1%}, by the exact posterior at "
            f"the true loadings {exact:.1%}"
        )

    def draw(axes: Any) -> None:
        axes.imshow(
            torch.cat([loadings, torch.full((1, 12), torch.nan), matched()[0]]), cmap="RdBu", vmin=-3, vmax=3
        )
        axes.set_yticks([1.5, 6.5], ["true", "learned"])
        axes.set_xticks([])

    return Exhibit(program, (x,), check, draw, lr=1e-2)


def sun_sensors() -> Exhibit:
    """1000 directions drawn from the program, read by cells whose gains differ."""
    model, gains = models.sun_sensors(), torch.linspace(0.6, 1.5, 12)
    truth = simulate(model, torch.empty(1000, 12), gains=gains)
    program, z, x = fitted_by(model), truth["z"], truth["x"]

    def check() -> str:
        angle = (program.encode(x, seed=1)["z"][0] * z).sum(-1).clamp(-1, 1).acos().rad2deg().mean()
        with program.active():
            off = rms(pyro.param("gains").detach() / gains - 1)
        return f"mean angle to the truth {angle:.1f}°; gains off by {off:.1%}"

    def draw(axes: Any) -> None:
        some, found = z[:150], program.encode(x[:150], seed=1)["z"][0]
        for one, other in zip(some, found, strict=True):
            axes.plot([one[0], other[0]], [one[1], other[1]], color="0.6", lw=0.7)
        axes.plot(*some[:, :2].T, ".", ms=3, label="true")
        axes.plot(*found[:, :2].T, ".", ms=3, label="encoded")
        axes.set_aspect("equal")
        axes.legend(frameon=False, fontsize=7)

    return Exhibit(program, (x,), check, draw)


def circular_walk() -> Exhibit:
    """1000 series drawn from the program."""
    steps = 6
    model = models.circular_walk(steps)
    truth = simulate(model, torch.empty(1000, steps))
    z, x = (torch.stack([truth[f"{name}_{t}"] for t in range(steps)], 1) for name in "zx")
    program = fitted_by(model, lambda x: torch.cat([x.cos(), x.sin()], -1))

    def found() -> Tensor:
        codes = program.encode(x, seed=1)
        return torch.stack([codes[f"z_{t}"][0] for t in range(steps)], 1)

    def offset(angles: Tensor) -> Tensor:
        return torch.atan2((angles - z).sin(), (angles - z).cos()).rad2deg()

    def check() -> str:
        return f"mean error {offset(found()).abs().mean():.0f}°; of the observations {offset(x).abs().mean():.0f}°"

    def draw(axes: Any) -> None:
        path = torch.as_tensor(np.unwrap(z.numpy())).rad2deg()  # no jump where a line crosses the seam
        for values, style in ((z, "-"), (x, "x"), (found(), "o")):
            for i in range(3):
                axes.plot((path + offset(values))[i], style, ms=4, color=f"C{i}")
        axes.set(xlabel="step", ylabel="degrees; line true, × observed, • encoded")

    return Exhibit(program, (x,), check, draw, num_steps=300)


def growth_curves() -> Exhibit:
    """500 subjects drawn from the program with globals that are known."""
    n, times = 500, torch.arange(6.0) - 2.5
    fixed = {"mean": torch.tensor([3.0, -1.0]), "spread": torch.tensor([1.0, 0.5])}
    model = models.growth_curves()
    truth = simulate(model, torch.empty(n, 6), times, given=fixed)
    program, effects, x = fitted_by(model), truth["effects"], truth["x"]

    def check() -> str:
        codes = program.encode(x, times, num_samples=100, seed=1)
        mean, spread = (codes[name].mean(0).flatten() for name in ("mean", "spread"))
        return (
            f"mean {mean[0]:.2f}, {mean[1]:.2f} and spread {spread[0]:.2f}, {spread[1]:.2f}; of the true effects "
            f"{effects[:, 0].mean():.2f}, {effects[:, 1].mean():.2f} and {effects[:, 0].std():.2f}, "
            f"{effects[:, 1].std():.2f}"
        )

    def draw(axes: Any) -> None:
        found = program.encode(x, times, seed=1)["effects"][0]
        for i in range(6):
            axes.plot(times, x[i], ".", color=f"C{i}")
            axes.plot(times, found[i, 0] + found[i, 1] * times, color=f"C{i}", lw=1)
        axes.set(xlabel="time", ylabel="measurement, and encoded line")

    return Exhibit(program, (x, times), check, draw, num_steps=1000, lr=1e-2)


def lkj_covariance() -> Exhibit:
    """1000 groups of 20 observations drawn from the program."""
    model = models.lkj_covariance()
    truth = simulate(model, torch.empty(1000, 20, 3))
    x = truth["x"]
    program = fitted_by(model, lambda x: (x.mT @ x).flatten(1))

    def correlations(factor: Tensor) -> Tensor:
        covariance = factor @ factor.mT
        scale = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
        return (covariance / scale.unsqueeze(-1) / scale.unsqueeze(-2))[..., [1, 2, 2], [0, 0, 1]]

    def check() -> str:
        z = correlations(truth["tril"])
        found, sample = correlations(program.encode(x, seed=1)["tril"][0]), correlations(x.mT)
        return f"correlations off by {rms(found - z):.2f}; those of the sample by {rms(sample - z):.2f}"

    def draw(axes: Any) -> None:
        scatter(
            axes,
            correlations(truth["tril"]),
            correlations(program.encode(x, seed=1)["tril"][0]),
            "correlation",
        )

    return Exhibit(program, (x,), check, draw)


def state_space() -> Exhibit:
    """1000 paths of 15 steps drawn from the program."""
    steps = 15
    z, x = models.simulate_state_space(1000, steps)
    program = fitted_by(models.state_space(steps), lambda x: x)

    def found() -> Tensor:
        codes = program.encode(x, seed=1)
        return torch.stack([codes[f"z_{t}"][0] for t in range(steps)], 1)

    def check() -> str:
        error = found() - z
        return (
            f"position off by {rms(error[..., 0]):.2f}, observations by {rms(x[..., 0] - z[..., 0]):.2f}; velocity, "
            f"never observed, by {rms(error[..., 1]):.2f} of {float(z[..., 1].std()):.2f}"
        )

    def draw(axes: Any) -> None:
        codes = found()
        for i in range(3):
            axes.plot(*z[i].T, color=f"C{i}", lw=1)
            axes.plot(*codes[i].T, ".", color=f"C{i}", ms=4)
        axes.set(xlabel="position", ylabel="velocity; lines true")

    return Exhibit(program, (x,), check, draw, num_steps=300)
