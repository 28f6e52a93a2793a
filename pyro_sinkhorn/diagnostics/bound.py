r"""What a program misses of the data, bounded by what its fit is made of.

Let G be the generator, the mean of the observed sites given the latents of a datum. If G is :math:`\gamma`-Lipschitz,

.. math:: W_2(P_X, G_\#P_Z) \;\le\; W_2(P_X, G_\#Q_Z) + \gamma\, W_2(Q_Z, P_Z)
                            \;\le\; \bigl(\mathbb E\|x-G(z)\|^2\bigr)^{1/2} + \gamma\, W_2(Q_Z, P_Z)

with :math:`P_X` the law of the data, :math:`Q_Z` the aggregated posterior, :math:`P_Z` the prior (Patrini et al. 2018,
*Sinkhorn AutoEncoders*): a datum and its own reconstruction are one coupling, of cost what is left after the
reconstruction. With any coupling of the latents, :math:`(\mathbb E\|G(z)-G(z')\|^2)^{1/2}` may stand for the last term,
which is at most :math:`\gamma` times the cost of that coupling and needs no :math:`\gamma`. Simulated data scatter around
G; coupled with their own means they are :math:`(\mathbb E\,\mathrm{tr}\,\mathrm{Cov}(x|z))^{1/2}` away.

Laws are known by clouds, compared by exact assignment. :math:`W_2^2` is jointly convex, so that its mean over clouds is
*at least* that of the laws: sampling makes the match, the bound and the distance that is measured for comparison too large,
never too small on average. The match of two prior clouds says by how much.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_sinkhorn.diagnostics.generator import Generator, generator_of
from pyro_sinkhorn.errors import NonFiniteError, checked_integer
from pyro_sinkhorn.ot import sinkhorn


@dataclass(frozen=True)
class Averaged:
    """Root of the mean of squares over clouds, and its standard error; of one cloud there is none."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:>10.4f} {self.error:>9.4f}"


@dataclass(frozen=True)
class BoundReport:
    r"""What :func:`wasserstein_bound` found; distances are in units of the data, or of the latents as they are.

    latents, data:    names of the sites
    n_data:           data given
    n_points:         points of each cloud
    n_clouds:         clouds compared
    reconstruction:   :math:`(\mathbb E\|x-G(z)\|^2)^{1/2}`
    match:            :math:`W_2(Q_Z,P_Z)` of clouds
    match_floor:      the same of two prior clouds, whose laws are equal
    gamma_layers:     Lipschitz constant by the spectral norms of layers, valid everywhere; infinite where an operation has
                      none that is known, then ``gamma_reason`` names it
    gamma_local:      largest slope at latents encoded and drawn: at most the Lipschitz constant
    gamma_typical:    root of their mean square
    decoded:          :math:`(\mathbb E\|G(z)-G(z')\|^2)^{1/2}` over the matched latents
    noise:            of simulated data around G; None where a distribution has no finite variance
    measured:         :math:`W_2(P_X,G_\#P_Z)` of the same clouds
    conditional_on:   globals, at one draw of the guide
    """

    latents: tuple[str, ...]
    data: tuple[str, ...]
    n_data: int
    n_points: int
    n_clouds: int
    reconstruction: Averaged
    match: Averaged
    match_floor: Averaged
    gamma_layers: float
    gamma_reason: str
    gamma_local: float
    gamma_typical: float
    decoded: Averaged
    noise: float | None
    measured: Averaged
    conditional_on: tuple[str, ...] = ()

    @property
    def by_layers(self) -> float:
        """Reconstruction plus match times the constant by layers: the theorem, infinite without a constant."""
        return self.reconstruction.value + (self.gamma_layers * self.match.value if self.match.value else 0.0)

    @property
    def by_slopes(self) -> float:
        """The same with the largest slope seen, which may be too small: an estimate of the bound, no bound."""
        return self.reconstruction.value + self.gamma_local * self.match.value

    @property
    def by_pairs(self) -> float:
        """Reconstruction plus matched latents decoded: the tightest, and a bound for these clouds."""
        return self.reconstruction.value + self.decoded.value

    def __str__(self) -> str:
        def line(text: str, value: Any, note: str = "") -> str:
            shown = f"{value:>10.4f} {'':>9}" if isinstance(value, float) else str(value)
            return f"{text:<36} {shown}  {note}".rstrip()

        of = ", ".join(self.data)
        layers = (
            f"unknown: {self.gamma_reason} has no bounded slope here"
            if self.gamma_reason
            else "holds everywhere"
        )
        lines = [
            f"W2 between the data and the means of {of}: {self.n_clouds} clouds of {self.n_points} of {self.n_data} data",
            f"{'':<36} {'value':>10} {'± se':>9}",
            line("reconstruction", self.reconstruction),
            line(
                f"match of {', '.join(self.latents)}",
                self.match,
                f"{self.match_floor.value:.4f} between prior clouds",
            ),
            line("gamma, product of layers", self.gamma_layers, layers),
            line("gamma, largest slope seen", self.gamma_local, "at most the true one"),
            line("gamma, typical slope", self.gamma_typical),
            line("matched latents decoded", self.decoded),
            line("bound, gamma of layers", self.by_layers),
            line("bound, largest slope seen", self.by_slopes, "an estimate, no bound"),
            line("bound, matched latents decoded", self.by_pairs),
            line("measured", self.measured),
        ]
        lines += [f"{'':<36} {note}" for note in self.notes()]
        return "\n".join(lines)

    def notes(self) -> list[str]:
        """What the numbers leave out, and which way they err."""
        notes = ["clouds are finite: match, bounds and measured are on average above those of the laws"]
        if self.noise is None:
            notes.append("the noise of the simulated data has no finite variance and is left out")
        else:
            notes.append(f"add {self.noise:.4f} to bound simulated data, which scatter around the means")
        if self.conditional_on:
            notes.append(f"given one draw of the globals {', '.join(self.conditional_on)}")
        return notes


@torch.no_grad()
def wasserstein_bound(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_clouds: int = 5,
    max_points: int = 500,
    **kwargs: Any,
) -> BoundReport:
    """The bound of Sinkhorn AutoEncoders on the distance between data and model, with its parts.

    Latents of a datum are compared jointly and as they are, in Euclidean distance, in which slopes are taken too. All of them
    must be continuous; priors and means must not differ between data (covariates). Globals stay at one draw of the guide.
    Data are these data: how far they are from their population is not said.

    :param args: arguments of the model
    :param num_clouds: clouds of encoded and of prior latents each; standard errors are over them
    :param max_points: points of a cloud at most: of more data, each cloud takes some at random. Assignment costs their cube
    :raises ProgramError: a site that leaves no bound, by name: discrete latents, means that do not exist or that depend on
        covariates or other data, masks

    >>> import pyro, pyro.distributions as dist
    >>> from pyro_sinkhorn.distributions import Implicit
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(3 * z, 0.1), obs=x)
    >>> def guide(x):
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("z", Implicit(x / 3))
    >>> report = wasserstein_bound(model, guide, 3 * torch.randn(100) + 6)
    >>> round(report.gamma_layers, 3), round(report.gamma_local, 3), round(report.reconstruction.value, 3)
    (3.0, 3.0, 0.0)
    >>> report.measured.value <= report.by_pairs <= report.by_layers + 1e-6
    True
    """
    num_clouds = checked_integer("num_clouds", num_clouds, 1)
    max_points = checked_integer("max_points", max_points, 2)
    squares: dict[str, list[float]] = {}
    noises: list[float | None] = []
    norms: list[Tensor] = []
    for number in range(num_clouds):
        generator = generator_of(model, guide, args, kwargs)
        n = generator.plate.size
        points = torch.randperm(n)[: min(n, max_points)]
        drawn, encoded = generator.drawn(), generator.encoded()
        for name, value in _squares(generator, encoded, drawn, points).items():
            squares.setdefault(name, []).append(value)
        noise = generator.noise(drawn)
        noises.append(None if noise is None else float(noise.double().mean()))
        if number == 0:
            upper = generator.upper()
            norms = [generator.slopes(latents).double() for latents in (encoded, drawn)]
    slopes = torch.cat(norms)
    found = {name: _averaged(values) for name, values in squares.items()}
    known = [value for value in noises if value is not None]
    return BoundReport(
        latents=generator.structure.locals,
        data=generator.structure.data,
        n_data=n,
        n_points=len(points),
        n_clouds=num_clouds,
        gamma_layers=upper.constant,
        gamma_reason=upper.reason,
        gamma_local=float(slopes.max()),
        gamma_typical=float(slopes.square().mean().sqrt()),
        noise=math.sqrt(sum(known) / len(known)) if len(known) == num_clouds else None,
        conditional_on=generator.structure.globals,
        **found,
    )


def _squares(
    generator: Generator, encoded: Mapping[str, Tensor], drawn: Mapping[str, Tensor], points: Tensor
) -> dict[str, float]:
    """Squared distances of one encoded cloud and one prior cloud."""

    def cloud(rows: Tensor) -> Tensor:
        chosen = rows[points.to(rows.device)].double()
        if not bool(chosen.isfinite().all()):
            raise NonFiniteError(
                f"means of {list(generator.structure.data)} are NaN or infinite at some latents: look at the decoder"
            )
        return chosen

    x, z, prior = (
        cloud(generator.data()),
        cloud(generator.laid_out(encoded)),
        cloud(generator.laid_out(drawn)),
    )
    decoded, simulated = cloud(generator.means(encoded)), cloud(generator.means(drawn))
    matched = sinkhorn(z, prior, 0.0)
    pairs = decoded - simulated[matched.plan().argmax(-1)]
    again = cloud(generator.laid_out(generator.drawn()))
    return {
        "reconstruction": float((x - decoded).square().sum(-1).mean()),
        "match": float(matched.value),
        "match_floor": float(sinkhorn(again, prior, 0.0).value),
        "decoded": float(pairs.square().sum(-1).mean()),
        "measured": float(sinkhorn(x, simulated, 0.0).value),
    }


def _averaged(squares: list[float]) -> Averaged:
    values = torch.tensor(squares, dtype=torch.float64)
    root = float(values.mean().sqrt())
    if len(values) < 2 or root == 0:
        return Averaged(root, 0.0)
    return Averaged(root, float(values.std()) / len(values) ** 0.5 / (2 * root))
