"""Whole programs of every kind: a step gives a finite loss and finite gradients, or an error that names a site."""

import warnings
from collections import Counter
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import strategies as st
from torch import nn

from pyro_sinkhorn import (
    AutoImplicit,
    SinkhornProgram,
    Trace_EnergyScore,
    Trace_JointSinkhorn,
    Trace_Sinkhorn,
    snapshot,
)
from pyro_sinkhorn.errors import NonFiniteError, ProgramError
from tests.properties.laws import hold

SEEN: Counter[str] = Counter()

#: Priors by name, of ``like`` numbers: its dtype is that of the program.
PRIORS = {
    "normal": lambda like: dist.Normal(like.new_zeros(2), 1.0).to_event(1),
    "scalar normal": lambda like: dist.Normal(like.new_zeros(()), 1.0),
    "wide normal": lambda like: dist.Normal(like.new_full((2,), 1e4), 1e5).to_event(1),
    "narrow normal": lambda like: dist.Normal(like.new_zeros(2), 1e-6).to_event(1),
    "cauchy": lambda like: dist.Cauchy(like.new_zeros(2), 1.0).to_event(1),
    "dirichlet": lambda like: dist.Dirichlet(like.new_full((3,), 0.5)),
    "sparse dirichlet": lambda like: dist.Dirichlet(like.new_full((5,), 0.05)),
    "gamma": lambda like: dist.Gamma(like.new_full((2,), 0.7), 1.0).to_event(1),
    "log normal": lambda like: dist.LogNormal(like.new_zeros(2), 2.0).to_event(1),
    "beta": lambda like: dist.Beta(like.new_full((2,), 0.5), 0.5).to_event(1),
    "uniform": lambda like: dist.Uniform(like.new_full((2,), -3), like.new_full((2,), 7)).to_event(1),
    "circle": lambda like: dist.VonMises(like.new_zeros(2), 2.0).to_event(1),
}
LIKELIHOODS = {
    "normal": lambda out: dist.Normal(out, 0.5),
    "student": lambda out: dist.StudentT(3.0, out, 0.5),
    "bernoulli": lambda out: dist.Bernoulli(logits=out),
    "poisson": lambda out: dist.Poisson(out.clamp(-5, 5).exp()),
}
LOSSES = {"match": Trace_Sinkhorn, "joint": Trace_JointSinkhorn, "energy": Trace_EnergyScore}


@dataclass(frozen=True)
class Case:
    prior: str
    likelihood: str
    loss: str
    n: int
    words: int
    match_size: int
    particles: int
    vectorized: bool
    mask: str
    scale: float
    size: float
    dtype: torch.dtype
    seed: int

    def data(self) -> torch.Tensor:
        shape = (self.n, self.words, 3) if self.words else (self.n, 3)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(self.seed), dtype=self.dtype)
        if self.likelihood == "bernoulli":
            return (x > 0).to(self.dtype)
        return x.exp().round() if self.likelihood == "poisson" else x * self.size

    def model(self):
        torch.manual_seed(self.seed)
        width = self.prior_of(torch.zeros(())).event_shape.numel()
        decoder = nn.Linear(width, 3).to(self.dtype)

        def model(x):
            pyro.module("decoder", decoder)
            known = self.mask_of(x)
            with (
                pyro.plate("data", len(x), dim=-2 if self.words else -1),
                pyro.poutine.scale(scale=self.scale),
            ):
                if self.words:
                    with pyro.plate("words", self.words, dim=-1), pyro.poutine.mask(mask=known):
                        self.sites(x, decoder, width)
                else:
                    with pyro.poutine.mask(mask=known):
                        self.sites(x, decoder, width)

        return model

    def sites(self, x, decoder, width):
        z = pyro.sample("z", self.prior_of(x))
        out = decoder(z.reshape(*z.shape[: z.dim() - (width > 1)], width))
        pyro.sample("x", LIKELIHOODS[self.likelihood](out).to_event(1), obs=x)

    def prior_of(self, like):
        return PRIORS[self.prior](like)

    def mask_of(self, x):
        known = torch.ones(x.shape[:-1], dtype=torch.bool)
        if self.mask == "some":
            known[len(x) // 2 :] = (
                torch.arange(len(x) - len(x) // 2).reshape(-1, *[1] * (known.dim() - 1)) % 3 > 0
            )
        elif self.mask == "all but one":
            known[1:] = False
        return known

    def objective(self):
        if self.loss == "energy":
            return Trace_EnergyScore(num_particles=self.particles)
        return LOSSES[self.loss](
            match_size=self.match_size, num_particles=self.particles, vectorize_particles=self.vectorized
        )


def cases(**fixed):
    return st.builds(
        Case,
        **{
            "prior": st.sampled_from(sorted(PRIORS)),
            "likelihood": st.sampled_from(sorted(LIKELIHOODS)),
            "loss": st.sampled_from(["match", "match", "joint", "energy"]),
            "n": st.sampled_from([1, 2, 3, 4, 7, 16]),
            "words": st.sampled_from([0, 0, 0, 1, 2]),
            "match_size": st.sampled_from([1, 2, 4, 64]),
            "particles": st.sampled_from([1, 1, 2]),
            "vectorized": st.booleans(),
            "mask": st.sampled_from(["none", "none", "none", "some", "all but one"]),
            "scale": st.sampled_from([1.0, 1.0, 1e-3, 1e3]),
            "size": st.sampled_from([1.0, 1.0, 1e-8, 1e4, 1e8]),
            "dtype": st.sampled_from([torch.float64, torch.float32]),
            "seed": st.integers(0, 10_000),
            **fixed,
        },
    )


def gradients(program, guide, loss, x):
    """The loss of a step, and the parameters it saw with their gradients."""
    with warnings.catch_warnings(), pyro.poutine.trace(param_only=True) as seen:
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", RuntimeWarning)  # ConvergenceWarning
        value = loss.loss_and_grads(program, guide, x)
    return value, {name: site["value"].unconstrained() for name, site in seen.trace.nodes.items()}


def check_step(case: Case) -> None:
    pyro.clear_param_store()
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(case.dtype)
    try:
        model, x = case.model(), case.data()
        try:
            value, parameters = gradients(model, AutoImplicit(model), case.objective(), x)
        except (ProgramError, NonFiniteError) as error:
            SEEN["named errors"] += 1
            left = int(case.mask_of(x).reshape(len(x), -1).any(-1).sum())
            too_few = left < 2 and ("batch of 1" in str(error) or "at least 2" in str(error))
            # Of simulated data that are 1e8 times, or 1e13 times, as far apart as the data that are their unit.
            too_far = case.size < 1e-6 and "potentials or plan are NaN or infinite" in str(error)
            if not (too_few or too_far):
                raise AssertionError(f"{case}: {type(error).__name__}: {error}") from error
            return
        SEEN["finite"] += 1
        assert torch.tensor(value).isfinite()
        assert parameters
        for name, parameter in parameters.items():
            assert parameter.grad is None or bool(parameter.grad.isfinite().all()), name
    finally:
        torch.set_default_dtype(dtype)


class Broken(nn.Module):
    """A layer that makes NaN in the value or in the gradient, from a training step on that a test chooses."""

    def __init__(self, where: str, step: int) -> None:
        super().__init__()
        self.linear, self.where, self.step, self.calls = nn.Linear(2, 3), where, step, 0

    def forward(self, z):
        out = self.linear(z)
        if torch.is_grad_enabled() and self.training:
            self.calls += 1
            if self.calls > self.step:
                return out * torch.nan if self.where == "value" else Spoiled.apply(out)
        return out


class Spoiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.inf


WHERE = ["data", "value", "gradient", "parameter", "encoder"]
NAMES = {
    "data": r"(argument 0|site 'x')",
    "value": r"\['z'\]|site 'x'",
    "gradient": "the gradient of '",
    "parameter": "the first is 'shift'|site 'x': loc",
    "encoder": "site 'z'",
}


def check_fault(where: str, value: float, loss: str, steps: int, seed: int) -> None:
    torch.manual_seed(seed)
    decoder = Broken(where, 10**9)

    def model(x):
        pyro.module("decoder", decoder)
        shift = pyro.param("shift", torch.zeros(3))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z) + shift, 0.5).to_event(1), obs=x)

    program = SinkhornProgram(model, loss=LOSSES[loss](match_size=4))
    options = {"batch_size": 8, "progress": False}
    x = torch.randn(16, 3)
    program.fit(x, num_steps=steps, seed=seed, **options)
    if where == "data":
        x = x.clone()
        x[:, seed % 3] = value
    elif where == "encoder":
        with torch.no_grad():
            next(p for p in program.guide.parameters() if p.dim()).fill_(value)
    elif where == "parameter":
        program.owned.store["params"]["shift"].data.fill_(value)
    else:
        own = next(m for m in program.owned.originals.values() if isinstance(m, Broken))
        for module in (own, *[m for m in program.modules.values() if isinstance(m, Broken)]):
            module.step = module.calls
    before = snapshot.take(program)
    with pytest.raises(NonFiniteError, match=NAMES[where]) as caught:
        program.fit(x, num_steps=2, **options)
    SEEN["faults named"] += 1
    words = str(caught.value)
    assert words.startswith(f"step {steps}: ")
    # A parameter that is NaN from the start ends the look that a fit takes at its model before the first step.
    assert where == "parameter" or "keeps the state of the step before" in words
    after = snapshot.take(program)
    assert program.num_steps == steps
    for part in ("modules", "guide", "params", "optim"):
        assert_same(before[part], after[part])


def assert_same(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for pair in zip(a, b, strict=True):
            assert_same(*pair)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5))
    else:
        assert a == b


LAWS = {
    "a step": (check_step, {"case": cases()}, 30, 900),
    "a fault": (
        check_fault,
        {
            "where": st.sampled_from(WHERE),
            "value": st.sampled_from([torch.nan, torch.inf, -torch.inf]),
            "loss": st.just("match"),
            "steps": st.integers(1, 3),
            "seed": st.integers(0, 10_000),
        },
        10,
        150,
    ),
}


def run(name: str, number: int) -> int:
    law, arguments, *_ = LAWS[name]
    return hold(law, arguments, number)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("name", LAWS)
def test_programs_obey(name):
    run(name, LAWS[name][2])


@pytest.mark.slow
@pytest.mark.timeout(3_000)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
def test_programs_obey_a_thousand_times():
    SEEN.clear()
    found = {name: run(name, LAWS[name][3]) for name in LAWS}
    print(f"examples: {found}, {sum(found.values())} in all; calls: {dict(SEEN)}")
    assert sum(found.values()) >= 1_000


@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_under_autocast_has_its_transport_in_single_precision(loss):
    torch.set_default_dtype(torch.float32)
    case = Case("normal", "normal", loss, 16, 0, 4, 1, False, "none", 1.0, 1.0, torch.float32, 0)
    model, x = case.model(), case.data()
    guide = AutoImplicit(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, parameters = gradients(model, guide, case.objective(), x)
    assert torch.tensor(value).isfinite()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in parameters.values())
