r"""Any prior that can be sampled: one guide, one set of defaults, one budget, 47 prior programs.

    python benchmarks/prior_zoo.py
    python benchmarks/prior_zoo.py --only funnel --only "beta 0"   # prints, writes nothing to the repository
    python benchmarks/prior_zoo.py --resume part.json                 # goes on where an earlier run stopped
    python benchmarks/prior_zoo.py --resume part.json --report        # writes the figures of what is done
    python benchmarks/prior_zoo.py --figure                           # draws the kept results again
    python benchmarks/prior_zoo.py --smoke-test

The guide alone is fitted to the prior: the likelihood says nothing of the latents, x is noise that the encoder reads,

.. math:: x_i \sim N(0, 1), \qquad z_i \sim \mathrm{prior}, \qquad
          \min_\phi\ S\bigl(\{\mathrm{head}(h_\phi(x_i, \xi_i))\}, \{z_i\}\bigr).

``SinkhornProgram`` with ``AutoImplicit`` and ``Trace_Sinkhorn`` as they come; learning rate, schedule, batch size and
number of steps are the same for all, chosen on two of the priors at a seed that is not used here. Then latents that the
guide makes of fresh noise are compared with fresh prior draws:

c2st        accuracy of sbibm's classifier on the values themselves (free entries only), .5 where nothing differs
null        the same between two prior samples, where measured; control: against a prior sample that was shrunk to .8
            about its medians, or whose columns were shuffled apart
c2st_ranks  for heavy tails, of normal scores of the pooled ranks: outliers leave nothing to a z-scored classifier
energy      energy distance in the embedding over its mean between prior samples: 1 is as good as drawing
dependence  largest difference of a rank correlation; the same between two prior samples beside it
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from _report import RESULTS, write
from pyro import poutine
from pyro.distributions import constraints
from torch import Tensor

from pyro_sinkhorn import SinkhornProgram
from pyro_sinkhorn.diagnostics import c2st
from pyro_sinkhorn.distributions import HypersphericalUniform, VonMisesFisher
from pyro_sinkhorn.geometry import geometry_of
from pyro_sinkhorn.geometry.registry import base_support
from pyro_sinkhorn.ot import ConvergenceWarning

STEPS, BATCH, LEARNING_RATE = 1000, 128, 1e-2
POINTS = 1000  # of each sample of a classifier test
MEASURED = 2000  # of each sample of an energy distance, of which REPEATS are averaged
REPEATS = 5  # also: rank correlations are of REPEATS * MEASURED points
#: Up to so many columns the null is measured for every prior, above where named: its law hardly depends on the prior.
#: There, too, null and control are of 2 folds instead of 5: a control that a classifier tells apart after half of the
#: points is told apart a fortiori after four fifths, and the null is that of as many tosses of a coin.
CHEAP_COLUMNS = 2
FIGURE = Path(__file__).resolve().parent.parent / "docs" / "figures" / "prior_zoo.png"

Record = dict[str, Any]
Sites = Callable[[], None]


class Sampled(dist.TorchDistribution):
    """A law that can be sampled, on a support that is named; nothing else is known of it."""

    arg_constraints = {}

    def __init__(self, draw: Callable[[torch.Size], Tensor], support: Any, batch: Any = ()) -> None:
        self.draw, self._support = draw, support
        shape = draw(torch.Size()).shape
        super().__init__(torch.Size(batch), shape, validate_args=False)

    @property
    def support(self) -> Any:
        return self._support

    def expand(self, batch_shape: Any, _instance: Any = None) -> Sampled:
        return Sampled(self.draw, self._support, batch_shape)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self.draw(torch.Size(sample_shape) + self.batch_shape)


def through(shape: tuple[int, ...], support: Any, scale: float = 1.0) -> Sampled:
    """A normal sent into a support by torch's own map."""
    transform = torch.distributions.transform_to(support)
    return Sampled(lambda lead: transform(scale * torch.randn(*lead, *shape)), support)


def inverse_wishart(df: float, size: int) -> Sampled:
    """Inverses of Wishart matrices."""
    wishart = dist.Wishart(torch.tensor(df), covariance_matrix=torch.eye(size))

    def draw(lead: torch.Size) -> Tensor:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(wishart.sample(lead)))
        return (inverse + inverse.mT) / 2

    return Sampled(draw, constraints.positive_definite)


def moons(n: int = 5000) -> Any:
    """The empirical law of two interleaved half-circles."""
    rng = torch.Generator().manual_seed(0)
    angle = torch.pi * torch.rand(n, generator=rng)
    side = torch.rand(n, generator=rng) < 0.5
    first = torch.stack([angle.cos(), angle.sin()], -1)
    points = torch.where(side.unsqueeze(-1), first, torch.tensor([1.0, 0.5]) - first)
    points = points + 0.1 * torch.randn(n, 2, generator=rng)
    return dist.Empirical(points, torch.zeros(n))


def autoregression() -> Any:
    """Eight values of a Gaussian AR(1) seen with noise."""
    unit = dist.Normal(torch.zeros(1), 1.0).to_event(1)
    return dist.GaussianHMM(
        unit,
        torch.tensor([[0.9]]),
        dist.Normal(torch.zeros(1), 0.45).to_event(1),
        torch.eye(1),
        dist.Normal(torch.zeros(1), 0.3).to_event(1),
        duration=8,
    )


def direction(d: int) -> Tensor:
    """A unit vector off the axes."""
    return torch.nn.functional.normalize(torch.linspace(1.0, -0.5, d), dim=0)


def mixture(weights: list[float], components: Any) -> Any:
    """Of one family."""
    return dist.MixtureSameFamily(dist.Categorical(torch.tensor(weights)), components)


def banana() -> None:
    z1 = pyro.sample("z1", dist.Normal(0.0, 1.0))
    pyro.sample("z2", dist.Normal(z1**2, 0.3))


def funnel() -> None:
    v = pyro.sample("z1", dist.Normal(0.0, 3.0))
    pyro.sample("z2", dist.Normal(0.0, (v / 2).exp()))


def horseshoe() -> None:
    scale = pyro.sample("z1", dist.HalfCauchy(1.0))
    pyro.sample("z2", dist.Normal(0.0, scale))


def chain() -> None:
    z1 = pyro.sample("z1", dist.Normal(0.0, 1.0))
    z2 = pyro.sample("z2", dist.Normal((2 * z1).sin(), 0.3))
    pyro.sample("z3", dist.LogNormal(z2 + 0.5 * z1, 0.3))


def product() -> None:
    pyro.sample("z1", dist.Dirichlet(torch.ones(3)))
    pyro.sample("z2", HypersphericalUniform(3))
    pyro.sample("z3", dist.Gamma(2.0, 1.0))


@dataclass(frozen=True)
class Entry:
    """A prior program: its sites, how its control is made wrong, and whether moments fail to describe it."""

    sites: Sites
    control: str = "scale"
    heavy: bool = False
    null: bool = False


def one(make: Callable[[], Any], control: str = "scale", heavy: bool = False, null: bool = False) -> Entry:
    """A single site."""

    def sites() -> None:
        pyro.sample("z", make())

    return Entry(sites, control, heavy, null)


def t(*values: Any) -> Tensor:
    return torch.tensor(values)


ZOO: dict[str, Entry] = {
    "normal": one(lambda: dist.Normal(0.3, 2.0)),
    "normal, 10 correlated": one(
        lambda: dist.MultivariateNormal(torch.zeros(10), 0.5 * torch.eye(10) + 0.5), "shuffle", null=True
    ),
    "laplace": one(lambda: dist.Laplace(0.0, 1.0)),
    "gumbel": one(lambda: dist.Gumbel(0.0, 2.0)),
    "cauchy": one(lambda: dist.Cauchy(1.0, 3.0), heavy=True),
    "student 1.5": one(lambda: dist.StudentT(1.5), heavy=True),
    "levy": one(lambda: dist.Stable(0.5, 1.0), heavy=True),
    "gamma 2": one(lambda: dist.Gamma(2.0, 3.0)),
    "gamma 0.3": one(lambda: dist.Gamma(0.3, 1.0)),
    "log-normal": one(lambda: dist.LogNormal(0.0, 1.0)),
    "half-cauchy": one(lambda: dist.HalfCauchy(1.0), heavy=True),
    "weibull": one(lambda: dist.Weibull(2.0, 0.7)),
    "inverse gamma": one(lambda: dist.InverseGamma(1.5, 1.0), heavy=True),
    "beta 0.5": one(lambda: dist.Beta(0.5, 0.5)),
    "beta 2, 5": one(lambda: dist.Beta(2.0, 5.0)),
    "uniform": one(lambda: dist.Uniform(-1.0, 3.0)),
    "kumaraswamy": one(lambda: dist.Kumaraswamy(0.5, 2.0)),
    "dirichlet 1, d=5": one(lambda: dist.Dirichlet(torch.ones(5)), null=True),
    "dirichlet 0.5, d=10": one(lambda: dist.Dirichlet(torch.full((10,), 0.5))),
    "dirichlet 0.05, d=5": one(lambda: dist.Dirichlet(torch.full((5,), 0.05))),
    "logistic-normal": one(lambda: dist.LogisticNormal(torch.zeros(3), torch.ones(3))),
    "von mises-fisher 10, d=3": one(lambda: VonMisesFisher(direction(3), torch.tensor(10.0))),
    "von mises-fisher 100, d=10": one(lambda: VonMisesFisher(direction(10), torch.tensor(100.0))),
    "uniform sphere, d=5": one(lambda: HypersphericalUniform(5)),
    "projected normal": one(lambda: dist.ProjectedNormal(t(1.0, 0.5, 0.0))),
    "von mises": one(lambda: dist.VonMises(3.0, 2.0)),
    "torus, 3 angles": one(lambda: dist.VonMises(t(0.0, 1.0, 2.0), t(0.5, 1.0, 4.0)).to_event(1)),
    "sine-skewed torus": one(
        lambda: dist.SineSkewed(dist.VonMises(t(0.0, 0.0), t(1.0, 1.0)).to_event(1), t(0.3, -0.6))
    ),
    "lkj cholesky, d=3": one(lambda: dist.LKJCholesky(3, 1.0)),
    "lkj cholesky, d=4": one(lambda: dist.LKJCholesky(4, 1.0)),
    # What dist.LKJ is; that class itself cannot be expanded, hence not be put into a plate.
    "lkj matrix, d=3": one(
        lambda: dist.TransformedDistribution(
            dist.LKJCholesky(3, torch.tensor(1.0)), [dist.transforms.CorrMatrixCholeskyTransform().inv]
        )
    ),
    "wishart, d=2": one(lambda: dist.Wishart(torch.tensor(4.0), covariance_matrix=torch.eye(2)), "shuffle"),
    "wishart, d=3": one(lambda: dist.Wishart(torch.tensor(5.0), covariance_matrix=torch.eye(3)), "shuffle"),
    "inverse wishart, d=2": one(lambda: inverse_wishart(6.0, 2), "shuffle", heavy=True),
    "ordered, d=4": one(lambda: through((4,), constraints.ordered_vector), "shuffle", null=True),
    "positive ordered, d=3": one(lambda: through((3,), constraints.positive_ordered_vector, 0.5), "shuffle"),
    "lower cholesky, d=2": one(lambda: through((2, 2), constraints.lower_cholesky)),
    "mixture of 3 normals": one(
        lambda: mixture(
            [0.5, 0.3, 0.2],
            dist.Normal(
                t([-3.0, 0.0], [3.0, 0.0], [0.0, 4.0]), t([0.5, 0.5], [0.7, 0.3], [0.3, 0.7])
            ).to_event(1),
        ),
        "shuffle",
    ),
    "mixture of dirichlets": one(
        lambda: mixture([0.5, 0.5], dist.Dirichlet(t([9.0, 2.0, 2.0], [2.0, 2.0, 9.0]))), "shuffle"
    ),
    "mixture of von mises": one(lambda: mixture([0.6, 0.4], dist.VonMises(t(0.0, 2.5), t(8.0, 8.0)))),
    "banana, 2 sites": Entry(banana, "shuffle"),
    "funnel, 2 sites": Entry(funnel, "shuffle", heavy=True),
    "horseshoe, 2 sites": Entry(horseshoe, "shuffle", heavy=True),
    "chain, 3 sites": Entry(chain, "shuffle"),
    "empirical": one(moons, "shuffle"),
    "time series of 8": one(autoregression, "shuffle"),
    "simplex, sphere, positive": Entry(product),
}


# Fit.


def model_of(sites: Sites) -> Callable[[Tensor], None]:
    """The prior program under a likelihood that tells nothing of it."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            sites()
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    return model


def fit(
    entry: Entry, seed: int, steps: int = STEPS, batch: int = BATCH, lr: float = LEARNING_RATE
) -> SinkhornProgram:
    """The guide after its budget."""
    program = SinkhornProgram(model_of(entry.sites))
    schedule = pyro.optim.CosineAnnealingLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": lr}, "T_max": steps}
    )
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(seed))
    return program.fit(x, num_steps=steps, batch_size=batch, optim=schedule, seed=seed, progress=False)


# Compare.


class Samples:
    """Draws of a prior and of its guide; numbers to compare them by."""

    def __init__(self, entry: Entry, program: SinkhornProgram) -> None:
        self.entry, self.program = entry, program
        with torch.no_grad():
            self.fns = {name: site["fn"] for name, site in self._trace(20).items()}
            reference = self.prior(4000)
        self.geometries = {name: geometry_of(fn) for name, fn in self.fns.items()}
        self.units = {name: g.unit(g.embed(reference[name])) for name, g in self.geometries.items()}

    def _trace(self, n: int) -> dict[str, Any]:
        with poutine.trace() as tracer, pyro.plate("data", n):
            self.entry.sites()
        nodes = tracer.trace.nodes
        return {name: node for name, node in nodes.items() if node["type"] == "sample" and name != "data"}

    def prior(self, n: int) -> dict[str, Tensor]:
        """Fresh draws of the prior."""
        with torch.no_grad():
            return {name: node["value"] for name, node in self._trace(n).items()}

    def guide(self, n: int, seed: int) -> dict[str, Tensor]:
        """Fresh latents of fresh noise."""
        x = torch.randn(n, generator=torch.Generator().manual_seed(seed))
        drawn = self.program.encode(x, seed=seed)
        return {name: drawn[name][0] for name in self.fns}

    def columns(self, values: dict[str, Tensor]) -> Tensor:
        """The free entries of the values, ``(n, columns)``, in double precision."""
        return torch.cat([free(values[name], fn) for name, fn in self.fns.items()], -1).double()

    def embedded(self, values: dict[str, Tensor]) -> Tensor:
        """Where the loss compares them."""
        return torch.cat(
            [g.finish(g.embed(values[name]) / self.units[name]) for name, g in self.geometries.items()], -1
        ).double()


def free(value: Tensor, fn: Any) -> Tensor:
    """Entries of a value that determine the others, ``(n, count)``."""
    support = base_support(fn)
    if support is constraints.simplex:
        return value[..., :-1].flatten(1)
    offsets = {
        constraints.corr_cholesky: -1,
        constraints.corr_matrix: -1,
        constraints.positive_definite: 0,
        constraints.lower_cholesky: 0,
    }
    for kind, offset in offsets.items():
        if isinstance(support, type(kind)):
            rows, columns = torch.tril_indices(value.shape[-1], value.shape[-1], offset)
            return value[..., rows, columns]
    return value.reshape(len(value), -1)


def wrong(columns: Tensor, how: str) -> Tensor:
    """A control that a test of any use must tell apart."""
    if how == "shuffle":
        return torch.stack([c[torch.randperm(len(c))] for c in columns.unbind(-1)], -1)
    centre = columns.median(0).values
    return centre + 0.8 * (columns - centre)


def normal_scores(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both samples with every column replaced by normal scores of the pooled ranks."""
    pooled = torch.cat([x, y])
    ranks = pooled.argsort(0).argsort(0).double()
    scores = torch.special.ndtri((ranks + 0.5) / len(pooled))
    return scores[: len(x)], scores[len(x) :]


def energy(x: Tensor, y: Tensor) -> float:
    """Energy distance between two samples (Szekely and Rizzo 2013), positive also between equal laws."""
    cross, own_x, own_y = (torch.cdist(a, b).mean() for a, b in ((x, y), (x, x), (y, y)))
    return float(2 * cross - own_x - own_y)


def rank_correlations(columns: Tensor) -> Tensor:
    """Spearman's, between all columns."""
    return torch.corrcoef(columns.argsort(0).argsort(0).double().T)


def dependence(x: Tensor, y: Tensor) -> float | None:
    """Largest difference of a rank correlation."""
    if x.shape[-1] < 2:
        return None
    return float((rank_correlations(x) - rank_correlations(y)).abs().max())


def compare(samples: Samples, seed: int, points: int, classify: bool = True) -> Record:
    """Everything that the module says is measured."""
    pyro.set_rng_seed(10_000 + seed)
    entry = samples.entry
    n = REPEATS * MEASURED
    clouds = [samples.prior(n), samples.prior(n)]
    guide = samples.guide(n, 20_000 + seed)
    first, second, made = (samples.embedded(cloud).split(MEASURED) for cloud in (*clouds, guide))
    floors = [energy(x, y) for x, y in zip(first, second, strict=True)]
    distances = [energy(x, y) for x, y in zip(first, made, strict=True)]
    columns = samples.columns(guide)
    prior = [samples.columns(cloud) for cloud in clouds]
    record: Record = {
        "columns": columns.shape[-1],
        "energy_ratio": mean(distances) / mean(floors),
        "energy_floor_cv": stdev(floors) / mean(floors),
        "dependence": dependence(columns, prior[0]),
        "dependence_floor": dependence(prior[1], prior[0]),
    }
    if not classify:
        return record
    x, other, third = prior[0][:points], prior[1][:points], prior[1][points : 2 * points]
    made_rows = columns[:points]
    start = time.process_time()
    record["c2st"] = c2st(x, made_rows, seed=seed).value
    folds = 5 if columns.shape[-1] <= CHEAP_COLUMNS else 2
    record["reference_folds"] = folds
    record["control"] = c2st(x, wrong(other, entry.control), seed=seed, num_folds=folds).value
    record["control_kind"] = entry.control
    if entry.null or columns.shape[-1] <= CHEAP_COLUMNS:
        record["null"] = c2st(x, third, seed=seed, num_folds=folds).value
    if entry.heavy:
        record["c2st_ranks"] = c2st(*normal_scores(x, made_rows), seed=seed).value
        rough = normal_scores(x, wrong(other, entry.control))
        record["control_ranks"] = c2st(*rough, seed=seed, num_folds=folds).value
    record["classifier_cpu_seconds"] = time.process_time() - start
    return record


def measure(name: str, seed: int, steps: int, points: int) -> Record:
    """Fit one prior and compare."""
    entry = ZOO[name]
    pyro.set_rng_seed(seed)
    start = time.process_time()
    program = fit(entry, seed, steps)
    seconds = time.process_time() - start
    record = compare(Samples(entry, program), seed, points)
    return {"name": name, "seed": seed, "fit_cpu_seconds": seconds} | record


# Show.

HEAD = (
    f"{'prior':<28}{'cols':>5}{'C2ST':>7}{'null':>7}{'control':>9}{'ranks':>7}{'control':>9}"
    f"{'energy':>8}{'dependence':>12}{'floor':>7}"
)


def line(row: Record) -> str:
    """A row of the table."""

    def cell(key: str, width: int, digits: int = 3) -> str:
        value = row.get(key)
        return f"{'':>{width}}" if value is None else f"{value:>{width}.{digits}f}"

    return (
        f"{row['name']:<28}{row['columns']:>5}{cell('c2st', 7)}{cell('null', 7)}{cell('control', 9)}"
        f"{cell('c2st_ranks', 7)}{cell('control_ranks', 9)}{cell('energy_ratio', 8, 2)}{cell('dependence', 12)}"
        f"{cell('dependence_floor', 7)}"
    )


def summary(rows: list[Record], points: int) -> Record:
    """How many priors meet which bound, and the null that was measured."""
    values = sorted(row["c2st"] for row in rows)
    nulls = [row["null"] for row in rows if "null" in row]
    sd = 0.5 / (2 * points) ** 0.5
    return {
        "priors": len(values),
        "at_most_0.52": sum(v <= 0.52 for v in values),
        "at_most_0.55": sum(v <= 0.55 for v in values),
        "median": values[len(values) // 2],
        "largest": values[-1],
        "null_band_by_formula": [0.5 - 1.96 * sd, 0.5 + 1.96 * sd],
        "null_measured": {
            "count": len(nulls),
            "mean": mean(nulls),
            "sd": stdev(nulls) if len(nulls) > 1 else 0.0,
            "sd_by_formula": sd,
            "smallest": min(nulls),
            "largest": max(nulls),
        },
        "smallest_control": min(row["control"] for row in rows),
    }


def draw(result: Record, path: Path) -> None:
    """C2ST of every prior, with the null band and the positive control."""
    import matplotlib.pyplot as plt

    rows = sorted(result["rows"], key=lambda row: row["c2st"])
    names = [row["name"] for row in rows]
    places = range(len(rows))
    low, high = result["summary"]["null_band_by_formula"]
    figure, axes = plt.subplots(figsize=(8, 0.23 * len(rows) + 1.6), layout="constrained")
    axes.axvspan(low, high, color="0.88", lw=0, label="equal laws, 95 of 100 (as many coin tosses as points)")
    axes.axvline(0.55, color="0.6", lw=0.8, ls=":")
    measured = [(row["null"], i) for i, row in enumerate(rows) if "null" in row]
    axes.plot(*zip(*measured, strict=True), "|", color="0.45", ms=6, label="prior against prior, measured")
    for kind, marker, label in (
        ("scale", "<", "control: prior shrunk to 0.8"),
        ("shuffle", "x", "control: columns shuffled apart"),
    ):
        shown = [(row["control"], i) for i, row in enumerate(rows) if row["control_kind"] == kind]
        axes.plot(*zip(*shown, strict=True), marker, color="tab:red", ms=4.5, alpha=0.8, label=label)
    ranks = [(row["c2st_ranks"], i) for i, row in enumerate(rows) if "c2st_ranks" in row]
    axes.plot(
        *zip(*ranks, strict=True),
        "o",
        color="tab:blue",
        mfc="white",
        ms=5,
        label="guide, by ranks (heavy tails)",
    )
    axes.plot(
        [row["c2st"] for row in rows], list(places), "o", color="tab:blue", ms=5, label="guide against prior"
    )
    axes.set_yticks(list(places), names, fontsize=8)
    axes.set_ylim(-0.8, len(rows) - 0.2)
    axes.set_xlim(0.44, 1.02)
    axes.grid(axis="y", color="0.93", lw=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("accuracy of the classifier (C2ST)")
    axes.legend(fontsize=7.5, loc="lower right", framealpha=1)
    settings = result["settings"]
    axes.set_title(
        f"{len(rows)} priors, one set of defaults: {settings['steps']} steps of {settings['batch']}, "
        f"{settings['points']} points a sample",
        fontsize=10,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", metavar="NAME", help="priors whose name contains this")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="rows so far; new ones are added to it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument(
        "--report", action="store_true", help="with --resume: write what is there, run no more"
    )
    parser.add_argument("--figure", action="store_true", help="draw the kept results again")
    parser.add_argument("--smoke-test", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", ConvergenceWarning)
    warnings.filterwarnings("ignore", "Singular sample detected")  # torch draws such a Wishart matrix again
    if options.figure:
        draw(json.loads((RESULTS / "prior_zoo.json").read_text(encoding="utf-8")), FIGURE)
        return
    names = [name for name in ZOO if not options.only or any(part in name for part in options.only)]
    steps, points = options.steps, POINTS
    if options.smoke_test:
        names, steps, points = ["normal", "dirichlet 1, d=5", "banana, 2 sites"], 3, 50
    checkpoint = options.resume or Path(tempfile.gettempdir()) / "prior_zoo.json"
    rows: list[Record] = []
    if options.resume and options.resume.exists():
        rows = json.loads(options.resume.read_text(encoding="utf-8"))
    done = {row["name"] for row in rows}
    print(HEAD, flush=True)
    for row in rows:
        print(line(row), flush=True)
    for name in names:
        if name in done or options.report:
            continue
        rows.append(measure(name, options.seed, steps, points))
        print(line(rows[-1]), flush=True)
        if not options.smoke_test:
            checkpoint.write_text(json.dumps(rows), encoding="utf-8")
    found = summary(rows, points)
    print(json.dumps(found, indent=1))
    if options.smoke_test or options.only:
        return
    rows.sort(key=lambda row: list(ZOO).index(row["name"]))
    not_run = [name for name in ZOO if name not in {row["name"] for row in rows}]
    settings = {"steps": steps, "batch": BATCH, "lr": LEARNING_RATE, "points": points, "measured": MEASURED}
    result = {"settings": settings, "summary": found, "not_run": not_run, "rows": rows}
    write("prior_zoo", result, seeds=[options.seed], packages=["scikit-learn"])
    draw(result, FIGURE)


if __name__ == "__main__":
    main()
