"""What the two processes of tests/test_distributed.py do: every case gives named numbers, with what they should be.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... python tests/distributed_cases.py OUTPUT

The noise of guide, prior and simulator comes with the data, so that one process can be given that of two. A reference is
computed in the process itself, without the other.
"""

from __future__ import annotations

import functools
import itertools
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from pyro.optim import Adam
from torch import Tensor, nn

from pyro_sinkhorn import (
    AutoImplicit,
    Implicit,
    SinkhornProgram,
    Trace_DataSinkhorn,
    Trace_EnergyScore,
    Trace_JointSinkhorn,
    Trace_Sinkhorn,
    TraceEnum_Sinkhorn,
    distributed,
)
from pyro_sinkhorn.distributions import Finite
from pyro_sinkhorn.errors import LostRankError, ProgramError
from pyro_sinkhorn.losses import LearnedCost, data_match, latent_match
from pyro_sinkhorn.losses.matching import match

SEED = 5
CASES: dict[str, Callable[[int], Any]] = {}


def case(function: Callable[[int], Any]) -> Callable[[int], Any]:
    CASES[function.__name__] = function
    return function


class Drawn(dist.TorchDistribution):
    """A normal whose noise is given, one number for every slice."""

    arg_constraints = {"loc": dist.constraints.real, "scale": dist.constraints.positive}
    support = dist.constraints.real
    has_rsample = True

    def __init__(self, loc: Tensor, scale: Any, noise: Tensor) -> None:
        self.loc, self.scale, self.noise = torch.broadcast_tensors(loc, torch.as_tensor(scale), noise)
        super().__init__(self.loc.shape, validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return Drawn(*(one.expand(batch_shape) for one in (self.loc, self.scale, self.noise)))

    def rsample(self, sample_shape=()):
        return self.loc + self.scale * self.noise

    def log_prob(self, value):
        return dist.Normal(self.loc, self.scale, validate_args=False).log_prob(value)


class DrawnState(dist.Categorical):
    """A categorical whose states are given."""

    def __init__(self, probs: Tensor, state: Tensor) -> None:
        self.state = state
        super().__init__(probs.expand(*state.shape, -1), validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return DrawnState(self.probs[(0,) * len(self.batch_shape)], self.state.expand(batch_shape))

    def sample(self, sample_shape=()):
        return self.state


def network(*sizes: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for i, (n, m) in enumerate(itertools.pairwise(sizes)):
        layers += [nn.Tanh()] if i else []
        layers.append(nn.Linear(n, m))
    return nn.Sequential(*layers)


def gradients() -> dict[str, Tensor]:
    return {
        f"gradient of {name}": p.grad.clone()
        for name, p in pyro.get_param_store().named_parameters()
        if p.grad is not None
    }


def evaluate(loss: Any, model: Any, guide: Any, args: tuple[Tensor, ...]) -> dict[str, Any]:
    """The loss, its terms and gradients."""
    for _, p in pyro.get_param_store().named_parameters():
        p.grad = None
    value = loss.loss_and_grads(model, guide, *args)
    terms = vars(loss.terms)
    matches = {f"match {name}": number for name, number in terms["match"].items()}
    numbers = {
        name: number for name, number in terms.items() if isinstance(number, float) and number == number
    }
    return {"value": value, **numbers, **matches, **gradients()}


def alone_on_all(loss: Any, model: Any, guide: Any, args: tuple[Tensor, ...]) -> dict[str, Any]:
    """The same in one process on the data of all, cut into halves as the ranks cut them."""
    torch.manual_seed(SEED)
    split = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
    seeded = functools.partial(match, generator=split)
    with (
        distributed.alone(),
        mock.patch.object(latent_match, "match", seeded),
        mock.patch.object(data_match, "match", seeded),
    ):
        return evaluate(loss, model, guide, args)


def compared(
    rank: int, make_loss: Callable[[], Any], model: Any, guide: Any, args: tuple[Tensor, ...], at: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What two ranks find of the data cut at a position, and one process of all."""
    pyro.clear_param_store()
    reference = make_loss()
    with distributed.alone():
        reference.loss(model, guide, *args)  # units and mean costs
    expected = alone_on_all(reference, model, guide, args)
    loss = make_loss()
    loss.load_state(reference.state())
    own = tuple(one[:at] if rank == 0 else one[at:] for one in args)
    torch.manual_seed(SEED + rank)  # that of rank 0 counts
    return evaluate(loss, model, guide, own), expected


def uses(n: int, *shape: int, seed: int = 1) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


# Equal to one process


def two_latents(n: int, groups: Any, at: int, rank: int, covariates: bool = True, **options: Any) -> Any:
    """Two dependent latents, the first with a covariate in its prior, which learns."""
    encoder, decoder, prior = network(3, 8, 4), network(3, 8, 2, seed=1), network(1, 2, seed=2)

    def model(x, c, noise):
        pyro.module("decoder", decoder)
        pyro.module("prior", prior)
        with pyro.plate("data", len(x)):
            loc = prior(c) if covariates else torch.zeros(len(x), 2)
            a = pyro.sample("a", Drawn(loc, 0.7, noise[:, :2]).to_event(1))
            b = pyro.sample("b", Drawn(a.sum(-1), 0.5, noise[:, 2]))
            z = torch.cat([a, b.unsqueeze(-1)], -1)
            pyro.sample("x", dist.Normal(decoder(z), 0.3).to_event(1), obs=x)

    def guide(x, c, noise):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            h = encoder(torch.cat([x, noise[:, 3:]], -1))
            pyro.sample("a", Implicit(h[:, :2], event_dim=1))
            pyro.sample("b", Implicit(h[:, 2] * h[:, 3]))

    def loss():
        return Trace_Sinkhorn(prior_weight=3.0, match_size=2, groups=groups, **options)

    args = (uses(n, 2), uses(n, 1, seed=2), uses(n, 4, seed=3))
    return compared(rank, loss, model, guide, args, at)


@case
def joint_equal_shards(rank: int) -> Any:
    return two_latents(12, "joint", 6, rank)


@case
def joint_unequal_shards(rank: int) -> Any:
    return two_latents(13, "joint", 4, rank, covariates=False, num_prior_batches=2)


@case
def marginal_unequal_shards(rank: int) -> Any:
    return two_latents(12, "marginal", 8, rank)


@case
def markov_and_self(rank: int) -> Any:
    return two_latents(12, "markov", 7, rank, debias="self")


@case
def covariates_that_differ_between_ranks_only(rank: int) -> Any:
    """Within a rank the covariate is constant: only together do the ranks see that it varies."""
    encoder, decoder = network(2, 4, 1), network(1, 4, 2, seed=1)

    def model(x, c, noise):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", Drawn(c, 1.0, noise))
            pyro.sample("x", dist.Normal(decoder(z.unsqueeze(-1)), 0.3).to_event(1), obs=x)

    def guide(x, c, noise):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", Implicit(encoder(x)[:, 0]))

    args = (uses(12, 2), torch.tensor([0.0] * 6 + [3.0] * 6), uses(12, seed=3))
    return compared(rank, lambda: Trace_Sinkhorn(match_size=2), model, guide, args, 6)


@case
def units_and_masks(rank: int) -> Any:
    """Words in documents, some of them hidden: the outermost plate is shared out, its slices are the units."""
    encoder, decoder = network(1, 4, 2), network(2, 4, 1, seed=1)

    def model(x, present, noise):
        pyro.module("decoder", decoder)
        documents = pyro.plate("documents", x.shape[0], dim=-2)
        words = pyro.plate("words", x.shape[1], dim=-1)
        with documents:
            t = pyro.sample("t", Drawn(torch.zeros(len(x), 1), 1.0, noise[:, :1]))
            with words, pyro.poutine.mask(mask=present > 0):
                z = pyro.sample("z", Drawn(t, 0.5, noise[:, 1:]))
                h = decoder(torch.stack([t.expand(z.shape), z], -1))[..., 0]
                pyro.sample("x", dist.Normal(h, 0.3), obs=x)

    def guide(x, present, noise):
        pyro.module("encoder", encoder)
        documents = pyro.plate("documents", x.shape[0], dim=-2)
        words = pyro.plate("words", x.shape[1], dim=-1)
        with documents:
            h = encoder(x.unsqueeze(-1))
            pyro.sample("t", Implicit(h[..., 0].mean(-1, keepdim=True)))
            with words:
                pyro.sample("z", Implicit(h[..., 1]))

    present = torch.ones(9, 3)
    present[2, 1:] = present[6, 2] = present[8] = 0
    args = (uses(9, 3), present, uses(9, 4, seed=3))
    return compared(rank, lambda: Trace_Sinkhorn(match_size=2), model, guide, args, 5)


@case
def enumerated_states(rank: int) -> Any:
    encoder, decoder = network(2, 8, 4), network(3, 8, 2, seed=1)

    def model(x, state, noise):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", DrawnState(torch.tensor([0.5, 0.3, 0.2]), state.long()))
            z = pyro.sample("z", Drawn(k.to(noise.dtype), 1.0, noise))
            h = torch.stack(torch.broadcast_tensors(k == 0, k == 1), -1).to(x.dtype)
            z = z.expand(torch.broadcast_shapes(z.shape, h.shape[:-1])).unsqueeze(-1)
            h = h.expand(*z.shape[:-1], 2)
            pyro.sample("x", dist.Normal(decoder(torch.cat([h, z], -1)), 0.3).to_event(1), obs=x)

    def guide(x, state, noise):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            h = encoder(x)
            k = pyro.sample("k", Finite(torch.arange(3), logits=h[:, :3]), infer={"enumerate": "parallel"})
            pyro.sample("z", Implicit(h[:, 3] + 0.1 * k))

    args = (uses(12, 2), (uses(12, seed=4).abs() * 2).floor().clamp(max=2), uses(12, seed=3))
    likeliest = mock.patch.object(
        torch.distributions.Categorical, "sample", lambda self, shape=(): self.logits.argmax(-1)
    )
    with likeliest:
        return compared(rank, lambda: TraceEnum_Sinkhorn(match_size=2), model, guide, args, 5)


@case
def globals_and_factors_count_once(rank: int) -> Any:
    encoder = network(2, 4, 1)

    def model(x, noise):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        pyro.factor("preference", -(mu**2))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", Drawn(mu, 1.0, noise))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 0.3).expand([len(x), 2]).to_event(1), obs=x)

    def guide(x, noise):
        pyro.module("encoder", encoder)
        loc, scale = pyro.param("loc", torch.tensor(0.3)), pyro.param("scale", torch.tensor(0.5))
        pyro.sample("mu", Drawn(loc, scale, torch.tensor(0.4)))
        with pyro.plate("data", len(x)):
            pyro.sample("z", Implicit(encoder(x)[:, 0]))

    return compared(
        rank, lambda: Trace_Sinkhorn(match_size=2), model, guide, (uses(11, 2), uses(11, seed=3)), 4
    )


@case
def particles_in_a_plate(rank: int) -> Any:
    encoder, decoder = network(2, 4, 2), network(2, 4, 2, seed=1)

    def model(x, noise):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", Drawn(torch.zeros(len(x), 2), 1.0, noise[:, :2]).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 0.3).to_event(1), obs=x)

    def guide(x, noise):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", Drawn(encoder(x), 0.2, noise[:, 2:]).to_event(1))

    def loss():
        return Trace_Sinkhorn(match_size=2, num_particles=2, vectorize_particles=True, max_plate_nesting=1)

    return compared(rank, loss, model, guide, (uses(10, 2), uses(10, 4, seed=3)), 4)


@case
def simulators_with_covariates(rank: int) -> Any:
    simulator = network(3, 8, 2)

    def model(x, c, noise):
        pyro.module("simulator", simulator)
        with pyro.plate("data", len(x)):
            pyro.sample("x", Implicit(simulator(torch.cat([c, noise], -1)), event_dim=1), obs=x)

    def loss():
        return Trace_DataSinkhorn(match_size=2, covariates=lambda x, c, noise: c)

    args = (uses(13, 2), uses(13, 1, seed=2), uses(13, 2, seed=3))
    return compared(rank, loss, model, lambda *args: None, args, 5)


# Noise


@case
def own_noise_and_common_noise(rank: int) -> Any:
    """The same seed on both ranks, as a script sets it."""
    torch.manual_seed(0)
    with distributed.shared_step() as step:
        own = torch.rand(3)
        common = pyro.sample("mu", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", 3):
            local = pyro.sample("z", dist.Normal(0.0, 1.0))
        split = torch.rand(3, generator=step.generator)
    return {"own": own, "common": common, "local": local, "split": split, "after": torch.rand(3)}


# Training


def digits(seed: int) -> Any:
    decoder = network(2, 8, 4, seed=seed)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Dirichlet(torch.ones(2)))
            pyro.sample("x", dist.Normal(decoder(z), 0.3).to_event(1), obs=x)

    return model


def two_clusters() -> Tensor:
    z = torch.rand(61, 1, generator=torch.Generator().manual_seed(7))
    return torch.cat([z, 1 - z, 2 * z, z**2], -1)


@case
def fit_shares_the_data_out(rank: int) -> Any:
    """Other initial weights on every rank, and other seeds: those of rank 0 count."""
    torch.manual_seed(100 + rank)
    program = SinkhornProgram(digits(seed=rank), loss=Trace_Sinkhorn(match_size=4))
    rows: list[int] = []
    step = Trace_Sinkhorn.loss_and_grads

    def counted(self, model, guide, x):
        rows.append(len(x))
        return step(self, model, guide, x)

    with mock.patch.object(Trace_Sinkhorn, "loss_and_grads", counted):
        program.fit(
            two_clusters(),
            num_steps=60,
            batch_size=17,
            lr=1e-2,
            progress=False,
            validation=0.2,
            validate_every=20,
            callbacks=[lambda program, values: None],
        )
    parameters = {name: p.detach().clone() for name, p in program.modules["decoder"].named_parameters()}
    parameters |= {f"guide {name}": p.detach().clone() for name, p in program.guide.named_parameters()}
    return {
        "loss": torch.tensor(program.history.loss),
        "rows": torch.tensor(rows),
        "validation": torch.tensor(program.history.validation),
        "stream": program.stream.generator.get_state(),
        **parameters,
    }


@case
def resumed(rank: int) -> Any:
    """Stopped after 7 of 10 steps, and gone on with from rank 0's checkpoint."""
    path, x, model = Path(f"{sys.argv[1]}.checkpoint"), two_clusters(), digits(seed=0)
    options = {"num_steps": 10, "batch_size": 17, "progress": False}

    def made() -> SinkhornProgram:
        return SinkhornProgram(model, loss=Trace_Sinkhorn(match_size=4))

    whole = made().fit(x, seed=3, **options)
    made().fit(
        x, seed=3, checkpoint=path, callbacks=[lambda program, values: program.num_steps == 7], **options
    )
    distributed.Ranks().any(True, "waiting until rank 0 has written")
    again = made().fit(x, resume=path, **options)
    return {"value": torch.tensor(again.history.loss)}, {"value": torch.tensor(whole.history.loss)}


@case
def svi_with_batch_norm(rank: int) -> Any:
    pyro.clear_param_store()
    torch.manual_seed(rank)
    decoder = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Dirichlet(torch.ones(2)))
            pyro.sample("x", dist.Normal(decoder(z), 0.3).to_event(1), obs=x)

    guide = AutoImplicit(model)
    svi = SVI(model, guide, Adam({"lr": 1e-2}), loss=Trace_Sinkhorn(match_size=4))
    own = two_clusters()[rank::2]
    losses = [svi.step(own) for _ in range(3)]
    buffers = {name: b.clone() for name, b in decoder.named_buffers() if b.is_floating_point()}
    store = {name: p.detach().clone() for name, p in pyro.get_param_store().named_parameters()}
    return {"loss": torch.tensor(losses), **buffers, **store}


@case
def a_parameter_that_comes_late(rank: int) -> Any:
    """Met in the second step only, and begun by every rank with a number of its own."""
    pyro.clear_param_store()
    steps = []

    def guide(x):
        steps.append(1)
        shift = pyro.param("shift", lambda: torch.tensor(float(rank))) if len(steps) > 4 else 0.0
        slope = pyro.param("slope", torch.tensor(1.0 + rank))
        with pyro.plate("data", len(x)):
            pyro.sample("z", Implicit(slope * x + shift))

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 0.3), obs=x)

    svi = SVI(model, guide, Adam({"lr": 1e-2}), loss=Trace_Sinkhorn(match_size=2))
    for _ in range(5):
        svi.step(torch.arange(6.0) + rank)
    return {name: p.detach().clone() for name, p in pyro.get_param_store().named_parameters()}


@case
def own_loop(rank: int) -> Any:
    """``differentiable_loss`` and ``sum_gradients`` come to what ``loss_and_grads`` does."""
    pyro.clear_param_store()
    model = digits(seed=0)
    guide = AutoImplicit(model)
    loss = Trace_Sinkhorn(match_size=4)
    own = two_clusters()[rank::2]
    torch.manual_seed(SEED)
    loss.loss_and_grads(model, guide, own)
    torch.manual_seed(SEED)
    expected = evaluate(loss, model, guide, (own,))
    parameters = [p for _, p in sorted(pyro.get_param_store().named_parameters())]
    for p in parameters:
        p.grad = None
    torch.manual_seed(SEED)
    value = loss.differentiable_loss(model, guide, own)
    value.backward()
    distributed.sum_gradients(parameters)
    return {"value": value.detach(), **gradients()}, {
        name: number for name, number in expected.items() if name == "value" or name.startswith("gradient")
    }


# Errors


def message(act: Callable[[], Any], kind: type[Exception] = ProgramError) -> str:
    try:
        act()
    except kind as error:
        return str(error)
    return "no error"


@case
def refused_losses(rank: int) -> Any:
    x = two_clusters()
    model = digits(seed=0)
    found = {}
    for loss in (
        Trace_EnergyScore(),
        Trace_JointSinkhorn(),
        Trace_DataSinkhorn(cost=LearnedCost(nn.Linear(4, 2))),
    ):
        pyro.clear_param_store()
        guide = AutoImplicit(model)
        found[type(loss).__name__] = message(lambda: loss.loss(model, guide, x))  # noqa: B023
    program = SinkhornProgram(model, loss=pyro.infer.Trace_ELBO())
    found["Trace_ELBO"] = message(lambda: program.fit(x, num_steps=1, progress=False))
    return found


@case
def other_programs(rank: int) -> Any:
    pyro.clear_param_store()
    decoder = network(2, 8 + rank, 4)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Dirichlet(torch.ones(2)))
            pyro.sample("x", dist.Normal(decoder(z), 0.3).to_event(1), obs=x)

    svi = SVI(model, AutoImplicit(model), Adam({"lr": 1e-2}), loss=Trace_Sinkhorn(match_size=4))
    return {"message": message(lambda: svi.step(two_clusters()))}


@case
def other_data(rank: int) -> Any:
    program = SinkhornProgram(digits(seed=0), loss=Trace_Sinkhorn(match_size=4))
    return {
        "length": message(lambda: program.fit(two_clusters()[rank:], num_steps=1, progress=False)),
        "values": message(lambda: program.fit(two_clusters() + rank, num_steps=1, progress=False)),
        "too few": message(lambda: program.fit(two_clusters(), num_steps=1, batch_size=3, progress=False)),
        "loader": message(
            lambda: program.fit(
                torch.utils.data.DataLoader(torch.utils.data.TensorDataset(two_clusters()), batch_size=8),
                num_steps=1,
                progress=False,
            )
        ),
    }


@case
def globals_that_read_the_data(rank: int) -> Any:
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 0.3), obs=x)

    def guide(x):
        pyro.sample("mu", dist.Delta(pyro.param("shift", torch.tensor(0.0)) + x.mean()))
        with pyro.plate("data", len(x)):
            pyro.sample("z", Implicit(x * pyro.param("slope", torch.tensor(1.0))))

    pyro.clear_param_store()
    loss = Trace_Sinkhorn(match_size=2)
    return {"message": message(lambda: loss.loss(model, guide, torch.arange(8.0) + 20 * rank))}


@case
def plates_that_all_ranks_have(rank: int) -> Any:
    def model(x):
        columns = pyro.plate("columns", 3, dim=-1)
        with columns:
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), dim=-2), columns:
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    def guide(x):
        with pyro.plate("columns", 3, dim=-1):
            pyro.sample("w", Implicit(pyro.param("w0", torch.zeros(3))))

    pyro.clear_param_store()
    loss = Trace_Sinkhorn(match_size=2)
    return {"message": message(lambda: loss.loss(model, guide, uses(6, 3)))}


@case
def work_of_one_rank(rank: int) -> Any:
    """What rank 0 evaluates for itself, rank 1 does not wait for; then both go on together."""
    model = digits(seed=0)
    pyro.clear_param_store()
    guide, loss = AutoImplicit(model), Trace_Sinkhorn(match_size=4)
    x = two_clusters()
    if rank == 0:
        with distributed.alone():
            loss.loss(model, guide, x)
    return {"value": torch.tensor(loss.loss(model, guide, x))}


def silent(rank: int, over: Path) -> Any:
    """Rank 1 stops answering, and rank 0 waits for as long as it was told."""
    x, model = two_clusters(), digits(seed=0)
    pyro.clear_param_store()
    svi = SVI(model, AutoImplicit(model), Adam({"lr": 1e-2}), loss=Trace_Sinkhorn(match_size=4))
    svi.step(x)
    if rank == 1:
        for _ in range(600):
            if over.exists():
                break
            time.sleep(0.1)
        return {}
    start = time.monotonic()
    said = message(lambda: svi.step(x), LostRankError)
    over.touch()
    return {"message": said, "seconds": time.monotonic() - start}


def dead(rank: int) -> Any:
    """Rank 1 ends in the middle of a step of fit."""
    model = digits(seed=0)

    def mortal(x):
        if rank == 1 and program.num_steps == 3:
            os._exit(17)
        model(x)

    program = SinkhornProgram(mortal, loss=Trace_Sinkhorn(match_size=4))
    start = time.monotonic()
    said = message(lambda: program.fit(two_clusters(), num_steps=50, progress=False), LostRankError)
    return {"message": said, "seconds": time.monotonic() - start, "steps": program.num_steps}


def main(output: str) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    pyro.enable_validation(True)
    found: dict[str, Any] = {}
    port = int(os.environ["MASTER_PORT"])
    with distributed.processes(timeout=240) as rank:
        for name, function in CASES.items():
            try:
                found[name] = function(rank)
            except Exception:
                found[name] = traceback.format_exc()
                break
    waiting = functools.partial(silent, over=Path(f"{output}.over"))
    for i, (seconds, name, function) in enumerate([(4.0, "silent", waiting), (240.0, "dead", dead)]):
        os.environ["MASTER_PORT"] = str(port + 1 + i)
        with distributed.processes(timeout=seconds) as rank:
            found[name] = function(rank)
            torch.save(found, f"{output}.{rank}")


if __name__ == "__main__":
    main(sys.argv[1])
