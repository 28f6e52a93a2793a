"""Pyro's deep Markov model, as it is and with its guide and loss exchanged.

    python examples/pyro_ports/dmm.py
    python examples/pyro_ports/dmm.py --guide sinkhorn --smoke-test

The model is that of Pyro's ``examples/dmm.py`` (Krishnan, Shalit and Sontag 2017, *Structured inference networks for
nonlinear state space models*): normal latents with a gated transition, two rectified layers to Bernoulli notes, masks for
sequences of unlike lengths, annealing; ClippedAdam with the original's momentum, clipping and decay. It is narrower than
the original (``DMM``'s arguments), has thirty times its learning rate for a hundredth of its steps, and batches of 256.
Data: chords of three among 24 notes that walk on the circle of fifths for 4 to 8 bars, seven in ten of them all eight; the
chorales of the original need a download.
"""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from _harness import Budget, batches, evidence_bound, fit, generate, main, report, start, told_apart
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import ClippedAdam
from torch import Tensor, nn

from pyro_sinkhorn import AutoImplicit, Trace_Sinkhorn

BUDGET = Budget(steps=300, batch=256)
NOTES, LENGTH = 24, 8
OPTIM = {"lr": 1e-2, "betas": (0.96, 0.999), "clip_norm": 10.0, "lrd": 0.99996, "weight_decay": 2.0}


class GatedTransition(nn.Module):
    """Location and scale of a latent given the one before."""

    def __init__(self, z_dim: int, width: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(z_dim, width), nn.ReLU(), nn.Linear(width, z_dim), nn.Sigmoid())
        self.proposal = nn.Sequential(nn.Linear(z_dim, width), nn.ReLU(), nn.Linear(width, z_dim))
        self.scale = nn.Sequential(nn.ReLU(), nn.Linear(z_dim, z_dim), nn.Softplus())
        self.linear = nn.Linear(z_dim, z_dim)
        nn.init.eye_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, before: Tensor) -> tuple[Tensor, Tensor]:
        gate, proposal = self.gate(before), self.proposal(before)
        return (1 - gate) * self.linear(before) + gate * proposal, self.scale(proposal)


class DMM(nn.Module):
    """The generative program: sites "z_t" and "obs_x_t", t from 1, in plate "z_minibatch".

    Widths of the original: 88 notes, 100 latents, 100, 200 and 600.
    """

    def __init__(
        self,
        notes: int = NOTES,
        z_dim: int = 8,
        emission: int = 64,
        transition: int = 64,
        rnn: int = 64,
    ) -> None:
        super().__init__()
        self.notes, self.z_dim, self.rnn_dim = notes, z_dim, rnn
        self.emitter = nn.Sequential(
            nn.Linear(z_dim, emission),
            nn.ReLU(),
            nn.Linear(emission, emission),
            nn.ReLU(),
            nn.Linear(emission, notes),
        )
        self.transition = GatedTransition(z_dim, transition)
        self.z_0 = nn.Parameter(torch.zeros(z_dim))

    def model(self, x: Tensor, mask: Tensor, annealing: float = 1.0) -> None:
        """Sequences ``(n, T, notes)`` with a mask ``(n, T)`` of the bars that exist."""
        pyro.module("dmm", self)
        z = self.z_0.expand(len(x), -1)
        with pyro.plate("z_minibatch", len(x)):
            for t in pyro.markov(range(1, x.shape[1] + 1)):
                exists = mask[:, t - 1]
                # The original masks inside to_event, a mask of shape (n, 1); the density is the same.
                with poutine.scale(scale=annealing):
                    prior = dist.Normal(*self.transition(z)).to_event(1)
                    z = pyro.sample(f"z_{t}", prior.mask(exists))
                likelihood = dist.Bernoulli(logits=self.emitter(z)).to_event(1)
                pyro.sample(f"obs_x_{t}", likelihood.mask(exists), obs=x[:, t - 1])


class Smoother(nn.Module):
    """The guide with a density: a latent given the one before and, by a recurrent network run backwards, what is to come."""

    def __init__(self, notes: int, z_dim: int, width: int) -> None:
        super().__init__()
        self.rnn = nn.RNN(notes, width, nonlinearity="relu", batch_first=True)
        self.h_0, self.z_0 = nn.Parameter(torch.zeros(1, 1, width)), nn.Parameter(torch.zeros(z_dim))
        self.before = nn.Sequential(nn.Linear(z_dim, width), nn.Tanh())
        self.loc, self.scale = nn.Linear(width, z_dim), nn.Sequential(nn.Linear(width, z_dim), nn.Softplus())

    def read(self, x: Tensor, mask: Tensor) -> Tensor:
        """State of the recurrent network ``(n, T, width)`` after all bars from t on."""
        lengths = mask.sum(-1, keepdim=True).long()
        bars = torch.arange(x.shape[1])
        backwards = torch.where(bars < lengths, lengths - 1 - bars, bars)[..., None]
        states, _ = self.rnn(
            x.gather(1, backwards.expand_as(x)), self.h_0.expand(-1, len(x), -1).contiguous()
        )
        return states.gather(1, backwards.expand_as(states))

    def forward(self, before: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        combined = 0.5 * (self.before(before) + state)
        return self.loc(combined), self.scale(combined)


def set_up_pyro(dmm: DMM) -> SVI:
    smoother = Smoother(dmm.notes, dmm.z_dim, dmm.rnn_dim)

    def guide(x: Tensor, mask: Tensor, annealing: float = 1.0) -> None:
        pyro.module("smoother", smoother)
        states, z = smoother.read(x, mask), smoother.z_0.expand(len(x), -1)
        with pyro.plate("z_minibatch", len(x)):
            for t in pyro.markov(range(1, x.shape[1] + 1)):
                with poutine.scale(scale=annealing):
                    normal = dist.Normal(*smoother(z, states[:, t - 1])).to_event(1)
                    z = pyro.sample(f"z_{t}", normal.mask(mask[:, t - 1]))

    loss = Trace_ELBO()
    return SVI(dmm.model, guide, ClippedAdam(OPTIM), loss=loss)


def set_up_sinkhorn(dmm: DMM) -> SVI:
    guide = AutoImplicit(
        dmm.model, encoder_input=lambda x, mask, annealing=1.0: torch.cat([x.flatten(1), mask], -1)
    )
    loss = Trace_Sinkhorn(prior_weight=30.0)
    return SVI(dmm.model, guide, ClippedAdam(OPTIM), loss=loss)


def set_up_sinkhorn_markov(dmm: DMM) -> SVI:
    guide = AutoImplicit(
        dmm.model, encoder_input=lambda x, mask, annealing=1.0: torch.cat([x.flatten(1), mask], -1)
    )
    loss = Trace_Sinkhorn(prior_weight=30.0, groups="markov")
    return SVI(dmm.model, guide, ClippedAdam(OPTIM), loss=loss)


SET_UPS = {"pyro": set_up_pyro, "sinkhorn": set_up_sinkhorn, "sinkhorn_markov": set_up_sinkhorn_markov}


def chorales(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Sequences ``(n, 8, 24)`` and their masks ``(n, 8)``.

    A chord stays, or moves a fifth up or down, with probabilities .4, .4 and .2; it is major, or minor for good in a third
    of the sequences. Each of its three notes, in one of two octaves, sounds with probability .9, others with .02.
    """
    rng = torch.Generator().manual_seed(seed)
    moves = torch.multinomial(torch.tensor([0.4, 0.4, 0.2]), n * LENGTH, replacement=True, generator=rng)
    moves = torch.tensor([0, 7, 5])[moves].reshape(n, LENGTH)
    root = (moves.cumsum(-1) + torch.randint(12, (n, 1), generator=rng)) % 12
    third = torch.where(torch.rand(n, 1, generator=rng) < 1 / 3, 3, 4).expand(n, LENGTH)
    chord = torch.stack([root, (root + third) % 12, (root + 7) % 12], -1)
    chord = chord + 12 * torch.randint(2, chord.shape, generator=rng)
    sound = torch.full((n, LENGTH, NOTES), 0.02).scatter(-1, chord, 0.9)
    short = 4 + torch.randint(LENGTH - 4, (n,), generator=rng)
    lengths = torch.where(torch.rand(n, generator=rng) < 0.7, LENGTH, short)
    mask = (torch.arange(LENGTH) < lengths[:, None]).float()
    return torch.bernoulli(sound, generator=rng) * mask[..., None], mask


def pairs_of_bars(x: Tensor) -> Tensor:
    """Two bars in succession of every sequence, ``(n, 48)``: the first four bars exist in all."""
    first = torch.arange(len(x)) % 3
    rows = torch.arange(len(x))
    return torch.cat([x[rows, first], x[rows, first + 1]], -1)


def run(way: str, budget: Budget = BUDGET, seed: int = 0, part: str = "test") -> dict[str, Any]:
    """Fit one way and measure on held-out sequences; their log-likelihood is that of a whole sequence."""
    train, held_out = chorales(2000, seed=0), chorales(800, seed=1 if part == "test" else 2)
    start(seed)
    dmm = DMM()
    svi = SET_UPS[way](dmm)
    draw = batches(budget.batch, *train)
    # The weight of the prior grows from .2 to 1 in the first half, as in the original.
    seconds = fit(svi, lambda step: (*draw(step), min(1.0, 0.2 + 1.6 * step / budget.steps)), budget.steps)
    torch.manual_seed(seed)
    found = generate(svi, held_out[0], torch.ones_like(held_out[1]))
    generated = torch.stack([found[f"obs_x_{t}"] for t in range(1, LENGTH + 1)], 1)
    seen, real, made = (pairs_of_bars(x) for x in (train[0], held_out[0], generated))
    return report(svi, budget, *held_out, groups="markov") | {
        "c2st": told_apart(made, real, seen, budget.rows),
        "evidence_bound": evidence_bound(set_up_pyro, dmm, draw, budget.steps, *held_out),
        "seconds": seconds,
    }


if __name__ == "__main__":
    main(run, SET_UPS, BUDGET, __doc__)
