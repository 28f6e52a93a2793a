r"""Programs to infer rather than to learn: nothing in them is a parameter, all that is unknown has a prior.

They are meant for :meth:`SinkhornProgram.calibrate <pyro_sinkhorn.SinkhornProgram.calibrate>`, which trains a guide on data
simulated from the program, and ``posterior(data)`` after it::

    program = SinkhornProgram(two_moons()).calibrate(torch.zeros(256, 2), num_steps=4000)
    program.posterior(x)["theta"]
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_sinkhorn.distributions import Implicit
from pyro_sinkhorn.errors import ProgramError

Model = Callable[..., None]


def eight_schools(mean_scale: float = 5.0, spread_scale: float = 5.0) -> Model:
    r"""Effects of coaching in parallel studies, each known with a standard error :math:`\sigma_i`:

    .. math::

        \mu \sim N(0, 5^2), \quad \tau \sim \mathrm{HalfCauchy}(5), \quad \theta_i \sim N(\mu, \tau^2),
        \quad y_i \sim N(\theta_i, \sigma_i^2).

    The number of schools is that of the data. :func:`eight_schools_data` has the eight that the program is named after.

    :param mean_scale: standard deviation of the prior of ``mu``
    :param spread_scale: scale of the prior of ``tau``
    :returns: a model of effects ``y``, ``(n,)``, with standard errors ``sigma``, ``(n,)``; globals ``mu`` and ``tau``,
        latents ``theta`` in the plate ``schools``, ``(n,)``

    Rubin 1981, *Estimation in parallel randomized experiments*; Gelman et al. 2013, *Bayesian data analysis*, section 5.5. The
    priors are those of posteriordb's reference posterior.

    >>> eight_schools()(*eight_schools_data())
    """

    def model(y: Tensor, sigma: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), mean_scale))
        tau = pyro.sample("tau", dist.HalfCauchy(y.new_tensor(spread_scale)))
        with pyro.plate("schools", len(y)):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)

    return model


def eight_schools_data() -> tuple[Tensor, Tensor]:
    """Estimated effects and standard errors of the eight schools, in points of the test (Rubin 1981, table 1).

    >>> [column.shape for column in eight_schools_data()]
    [torch.Size([8]), torch.Size([8])]
    """
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    return y, sigma


def two_moons() -> Model:
    r"""Two crescents: a simulator whose posterior has two modes, each of them bent.

    .. math::

        \theta \sim U(-1, 1)^2, \quad a \sim U(-\tfrac\pi2, \tfrac\pi2), \quad r \sim N(0.1, 0.01^2), \quad
        x = \begin{pmatrix} r\cos a + 0.25 \\ r\sin a\end{pmatrix}
        + \frac{1}{\sqrt2}\begin{pmatrix} -|\theta_1+\theta_2| \\ -\theta_1+\theta_2 \end{pmatrix}.

    The observation is ``Implicit``: the program is run and never scored. Angle and radius are drawn inside the simulator, not
    as sample sites, or they would be latents to infer. :func:`two_moons_posterior` draws the exact posterior.

    :returns: a model of points ``x``, ``(n, 2)``, with latents ``theta``, ``(n, 2)``

    Greenberg, Nonnenmacher and Macke 2019, *Automatic posterior transformation*; the variant is that of Lueckmann et al. 2021,
    *Benchmarking simulation-based inference*.

    >>> two_moons()(torch.zeros(5, 2))
    """

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            theta = pyro.sample("theta", dist.Uniform(-x.new_ones(2), 1.0).to_event(1))
            # The shape is that of theta, which is larger than the data's where many data sets are simulated at once.
            centre = torch.stack([-(theta[..., 0] + theta[..., 1]).abs(), theta[..., 1] - theta[..., 0]], -1)
            moon = crescent(torch.rand_like(theta[..., 0]), torch.randn_like(theta[..., 0]))
            pyro.sample("x", Implicit(moon + centre / math.sqrt(2), event_dim=1), obs=x)

    return model


def crescent(uniform: Tensor, normal: Tensor) -> Tensor:
    """Points ``(..., 2)`` on the crescent of the two moons, from standard uniform and normal numbers ``(...)``."""
    angle, radius = math.pi * (uniform - 0.5), 0.1 + 0.01 * normal
    return torch.stack([radius * angle.cos() + 0.25, radius * angle.sin()], -1)


def two_moons_posterior(x: Tensor, num_samples: int) -> Tensor:
    r"""Exact posterior draws of the two moons' ``theta`` at one point ``x``, ``(2,)``: ``(num_samples, 2)``.

    A crescent point q leaves :math:`|\theta_1+\theta_2| = \sqrt2(q_1-x_1)` and :math:`\theta_2-\theta_1 = \sqrt2(x_2-q_2)`.
    Where neither sum nor difference meets a bound the map is linear with a constant determinant and the prior is flat, so q
    is drawn from its own law, the sign of the sum is a fair coin, and draws outside of the square are drawn again.

    :raises ValueError: ``x`` is no point, or the program cannot produce it

    >>> draws = two_moons_posterior(torch.zeros(2), 1000)
    >>> draws.shape, bool((draws.abs() <= 1).all())
    (torch.Size([1000, 2]), True)
    """
    if x.shape != (2,):
        raise ValueError(f"x has shape {tuple(x.shape)}: expected (2,), one point")
    found: list[Tensor] = []
    for _ in range(1000):
        moon = crescent(torch.rand(num_samples).to(x), torch.randn(num_samples).to(x))
        total, difference = (math.sqrt(2) * (moon - x) * moon.new_tensor([1.0, -1.0])).unbind(-1)
        total = torch.where(total >= 0, total, torch.full_like(total, torch.nan))  # a modulus
        total = torch.where(torch.rand_like(total) < 0.5, -total, total)
        theta = torch.stack([total - difference, total + difference], -1) / 2
        found.append(theta[(theta.abs() <= 1).all(-1)])
        if sum(map(len, found)) >= num_samples:
            return torch.cat(found)[:num_samples]
    raise ValueError(f"the two moons hardly ever produce x = {x.tolist()}, whatever theta is")


def regression_with_globals(
    likelihood: Literal["normal", "student", "logistic"] = "normal",
    weight_scale: float = 1.0,
    noise_scale: float = 1.0,
    degrees: float = 4.0,
) -> Model:
    r"""A regression whose weights and noise are globals, to be read off data sets of any size:

    .. math::

        w \sim N(0, s_w^2 I), \quad \sigma \sim \mathrm{HalfNormal}(s_\sigma), \quad y_i \sim N(w^\top f_i, \sigma^2),

    or a Student law of that location and scale, or Bernoulli with these logits, which has no noise. There is no intercept:
    centre ``y``, or add a column of ones.

    :param likelihood: "normal", "student" (for outliers) or "logistic"
    :param weight_scale: :math:`s_w`
    :param noise_scale: :math:`s_\sigma`
    :param degrees: degrees of freedom of the Student law
    :returns: a model of responses ``y``, ``(n,)``, given ``features``, ``(n, k)``; globals ``weights``, ``(k,)``, and
        ``noise``
    :raises ProgramError: another likelihood

    >>> regression_with_globals()(torch.randn(20), torch.randn(20, 3))
    """
    if likelihood not in ("normal", "student", "logistic"):
        raise ProgramError(f"likelihood is {likelihood!r}: expected 'normal', 'student' or 'logistic'")

    def model(y: Tensor, features: Tensor) -> None:
        weights = pyro.sample(
            "weights", dist.Normal(features.new_zeros(features.shape[-1]), weight_scale).to_event(1)
        )
        noise = features.new_ones(())
        if likelihood != "logistic":
            noise = pyro.sample("noise", dist.HalfNormal(features.new_tensor(noise_scale)))
        with pyro.plate("data", len(y)):
            # Not a matrix product: weights of many data sets at once have dimensions on the left.
            line = (features * weights).sum(-1)
            law = {
                "normal": lambda: dist.Normal(line, noise),
                "student": lambda: dist.StudentT(degrees, line, noise),
                "logistic": lambda: dist.Bernoulli(logits=line),
            }[likelihood]()
            pyro.sample("y", law, obs=y)

    return model
