"""Wrong input gets an error that names the site, says what was given and what to do.

Every case is asked of the automatic guide and of one written by hand, with Pyro's validation and without it.
"""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import nn

from pyro_sinkhorn import AutoImplicit, Implicit, Trace_Sinkhorn
from pyro_sinkhorn.errors import NonFiniteError, ProgramError
from pyro_sinkhorn.geometry import registry

N = 16


@pytest.fixture(params=[True, False], ids=["validation", "no validation"])
def validation(request):
    with pyro.validation_enabled(request.param):
        yield request.param


@pytest.fixture(params=["automatic", "by hand"])
def guide_of(request):
    return AutoImplicit if request.param == "automatic" else lambda model: by_hand


def by_hand(x):
    spread = pyro.param("spread", torch.ones(2))
    with pyro.plate("data", len(x)):
        noise = pyro.sample("noise", normal(), infer={"is_auxiliary": True})
        pyro.sample("z", Implicit(x[..., :2] + spread * noise, event_dim=1))


def normal(d=2):
    return dist.Normal(torch.zeros(d), 1.0).to_event(1)


def model(x, decoder=lambda z: z, prior=None):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", normal() if prior is None else prior)
        pyro.sample("x", dist.Normal(decoder(z), 0.5).to_event(1), obs=x)


def decoded(decoder):
    return functools.partial(model, decoder=decoder)


def data(n=N):
    return torch.randn(n, 2)


def step(program, guide, *args, loss=None, **kwargs):
    loss = Trace_Sinkhorn(match_size=4) if loss is None else loss
    return SVI(program, guide, Adam({"lr": 1e-3}), loss=loss).step(*args, **kwargs)


# Data


def test_an_empty_batch(guide_of, validation):
    with pytest.raises(ProgramError, match=r"size 0: the batch is empty.*argument 0 \(0, 2\)"):
        step(model, guide_of(model), data(0))


def test_a_batch_of_one(guide_of, validation):
    with pytest.raises(
        ProgramError, match=r"latent group \(z\): a batch of 1 cannot be split .* at least 2 data"
    ):
        step(model, guide_of(model), data(1))


def test_a_batch_of_which_one_is_left_by_a_mask(guide_of, validation):
    masked = pyro.poutine.mask(model, mask=torch.arange(N) == 3)
    with pytest.raises(ProgramError, match=r"latent group \(z\): a batch of 1 cannot be split"):
        step(masked, guide_of(masked), data())


def test_a_small_batch_warns(guide_of, validation):
    svi = SVI(model, guide_of(model), Adam({"lr": 1e-3}), loss=Trace_Sinkhorn())
    x = data()
    with pytest.warns(
        UserWarning, match=r"latent group \(z\): a batch of 16 gives halves of 8, below match_size=64"
    ):
        svi.step(x)
    svi.step(x)


@pytest.mark.filterwarnings("ignore:Encountered NaN")  # Pyro's, before the error
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("n", [N, 3000], ids=["short", "long"])
def test_nan_in_the_data(guide_of, validation, value, n):
    x = data(n)
    x[n // 2, 1] = value
    with pytest.raises(
        NonFiniteError,
        match=rf"(argument 0 of the model|observed site 'x').*\({n}, 2\).* in 1 rows \(first: {n // 2}.*remove or mask",
    ):
        step(model, guide_of(model), x)


def test_nan_in_later_data(guide_of, validation):
    guide, x = guide_of(model), data()
    step(model, guide, x)
    x[5] = torch.nan
    with pytest.raises(NonFiniteError, match=r"(argument 0|observed site 'x').* in 1 rows \(first: 5"):
        step(model, guide, x)


def test_integers_where_floats_are_needed(guide_of, validation):
    with pytest.raises(
        ProgramError, match=r"observed site 'x': the data are torch.int64 where Normal.*x.float\(\)"
    ):
        step(model, guide_of(model), torch.ones(N, 2, dtype=torch.long))


def test_integers_for_a_bernoulli(guide_of, validation):
    def program(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", normal())
            pyro.sample("x", dist.Bernoulli(logits=z).to_event(1), obs=x)

    x = torch.randint(0, 2, (N, 2))
    with pytest.raises(ProgramError, match="observed site 'x': the data are torch.int64 where Bernoulli"):
        step(program, guide_of(program), x)
    pyro.clear_param_store()
    step(program, guide_of(program), x.double())


def test_data_outside_the_support_of_the_likelihood():
    def program(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", normal())
            pyro.sample("x", dist.LogNormal(z, 1.0).to_event(1), obs=x)

    with pytest.raises(
        ProgramError, match="observed site 'x' of the model cannot be scored.*LogNormal|TransformedDistr"
    ):
        step(program, by_hand, -data().abs())


def test_mixed_devices(guide_of, validation):
    """The meta device stands for another one."""
    with pytest.raises(
        ProgramError, match=r"(encoder's parameters are on cpu|guide mixes devices).*meta.*x.to\("
    ):
        step(model, guide_of(model), data().to("meta"))
    program = decoded(lambda z: z + torch.zeros(2, device="meta"))
    with pytest.raises(
        ProgramError, match="model mixes devices .*site 'z' on cpu: move data, modules and constants"
    ):
        step(program, guide_of(program), data())


def test_data_of_another_device_than_the_users_encoder():
    with pytest.raises(ProgramError, match=r"encoder's parameters are on meta .* shape \(16, 2\), on cpu"):
        step(model, AutoImplicit(model, encoder=nn.Linear(2, 3, device="meta")), data())


# The model


def test_nan_from_the_decoder(guide_of, validation):
    bad = torch.zeros(3000, 1)
    bad[1500] = torch.nan  # of a long tensor torch's message shows no NaN
    program = decoded(lambda z: z + bad)
    text = (
        r"model made NaN after its sites \['z'\].*decoder"
        if validation
        else r"site 'x': loc of its Normal.*decoder"
    )
    with pytest.raises(NonFiniteError, match=text):
        step(program, guide_of(program), data(3000))


def test_a_decoder_that_diverges_later(guide_of, validation):
    factor = torch.ones(())
    program = decoded(lambda z: z * factor)
    guide = guide_of(program)
    step(program, guide, data())
    factor.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="decoder"):
        step(program, guide, data())


def test_nan_from_the_prior(guide_of, validation):
    def program(x):
        model(x, prior=dist.Normal(0 * x / 0.0, 1.0).to_event(1))

    with pytest.raises(NonFiniteError, match="(before its first site|'z')"):
        step(program, guide_of(program), data())


def test_nan_from_the_encoder(validation):
    class Bad(nn.Module):
        def forward(self, x):
            return x * torch.nan

    with pytest.raises(NonFiniteError, match="site 'z'.*encoder"):
        step(model, AutoImplicit(model, encoder=Bad()), data())

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", Implicit(x * torch.nan, event_dim=1))

    with pytest.raises(NonFiniteError, match="site 'z'.*encoder"):
        step(model, guide, data())


def test_no_plate(guide_of, validation):
    def program(x):
        z = pyro.sample("z", normal())
        pyro.sample("x", dist.Normal(z, 1.0).expand(x.shape).to_event(2), obs=x)

    with pytest.raises(
        ProgramError, match=r"observed sites \['x'\] are in no plate.*pyro.plate\('data', len\(x\)\)"
    ):
        step(program, guide_of(program), data())


def test_a_sequential_plate(guide_of, validation):
    def program(x):
        z = pyro.sample("z", normal())
        for i in pyro.plate("data", len(x)):
            pyro.sample(f"x{i}", dist.Normal(z, 1.0).to_event(1), obs=x[i])

    with pytest.raises(ProgramError, match="observed site 'x0' is in the sequential plate 'data'"):
        step(program, guide_of(program), data())


def test_no_observed_site(guide_of, validation):
    def program(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", normal())
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1))

    def guide(x):
        by_hand(x)
        with pyro.plate("more", len(x)):
            pyro.sample("x", normal())

    guide = guide_of(program) if isinstance(guide_of(program), AutoImplicit) else guide
    with pytest.raises(
        ProgramError, match=r"observes nothing: none of its sample sites \['z', 'x'\] has obs="
    ):
        step(program, guide, data())


def test_an_unknown_support(guide_of, validation, monkeypatch):
    monkeypatch.delitem(registry._BY_SUPPORT, type(dist.constraints.corr_cholesky))

    def program(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LKJCholesky(2, 1.0))
            pyro.sample("x", dist.Normal(z[..., 1, :], 0.5).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", Implicit(torch.eye(2).expand(len(x), 2, 2), event_dim=2))

    guide = guide_of(program) if isinstance(guide_of(program), AutoImplicit) else guide
    with pytest.raises(
        ValueError, match=r"(?s)latent site 'z': LKJCholesky with event shape \(2, 2\).*register_geometry"
    ):
        step(program, guide, data())


def test_a_discrete_latent(guide_of, validation):
    def program(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.full((2,), 0.5)).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(torch.full((2,), 0.5)).to_event(1))

    if isinstance(guide_of(program), AutoImplicit):
        with pytest.raises(
            ProgramError, match=r"guide site 'z' is a Finite, a discrete latent.*TraceEnum_Sinkhorn"
        ):
            step(program, guide_of(program), data())
        return
    with pytest.raises(
        ProgramError, match=r"guide site 'z' is a Bernoulli, a discrete latent.*distributions.Finite"
    ):
        step(program, guide, data())


def test_a_prior_that_cannot_be_sampled(guide_of, validation):
    class NoSample(dist.Normal):
        rsample = torch.distributions.Distribution.rsample  # what a law has that defines none

    program = functools.partial(model, prior=NoSample(torch.zeros(2), 1.0).to_event(1))
    with pytest.raises(
        ProgramError, match=r"latent site 'z': its NoSample cannot be sampled.*its sample\(\) must work"
    ):
        step(program, guide_of(program), data())


@pytest.mark.parametrize("validate", [True, False])
def test_a_decoder_of_the_wrong_shape(guide_of, validate):
    with pyro.validation_enabled(validate):
        program = decoded(nn.Linear(2, 3).double().requires_grad_(False))
        with pytest.raises(
            ProgramError, match=r"observed site 'x' of the model cannot be scored.*\(16, 2\).*shape \(3,\)"
        ):
            step(program, guide_of(program), data())


def test_a_decoder_that_loses_data(guide_of, validation):
    program = decoded(lambda z: z[1:])
    with pytest.raises(ValueError, match=r"plate\('data'\) at site x dim -1, 16 vs 15"):
        step(program, guide_of(program), data())


def test_sites_that_come_and_go(guide_of, validation):
    runs = []

    def program(x):
        runs.append(1)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", normal())
            if len(runs) == 1:
                z = z + pyro.sample("w", normal())
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    def guide(x):
        by_hand(x)
        with pyro.plate("more", len(x)):
            pyro.sample("w", normal())

    guide = guide_of(program) if isinstance(guide_of(program), AutoImplicit) else guide
    with pytest.raises(ProgramError, match=r"latent sites \['w'\] did not appear when the model ran again"):
        Trace_Sinkhorn(match_size=4).loss(program, guide, data())


# The guide


def test_a_guide_that_misses_a_site(validation):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("w", normal())

    def nothing(x):
        pyro.param("free", torch.zeros(()))

    with pytest.raises(
        ProgramError, match=r"guide does not sample the latent sites \['z'\]; it samples \['w'\]"
    ):
        step(model, guide, data())
    with pytest.raises(
        ProgramError, match=r"guide does not sample the latent sites \['z'\]; it samples \[\]"
    ):
        step(model, nothing, data())


def test_a_guide_with_an_unknown_site(validation):
    def guide(x):
        by_hand(x)
        with pyro.plate("more", len(x)):
            pyro.sample("w", normal())

    with pytest.raises(
        ProgramError, match=r"guide samples \['w'\], which are not latents of the model \(\['z'\]\).*is_aux"
    ):
        step(model, guide, data())


@pytest.mark.parametrize("decoder", [lambda z: z[..., :2], nn.Linear(2, 2)], ids=["any", "linear"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            lambda n: Implicit(torch.zeros(n, 3), 1),
            r"values of shape \(16, 3\), but the prior, a Normal, .* \(2,\)",
        ),
        (
            lambda n: Implicit(torch.zeros(n), 0),
            r"values of shape \(16,\), but the prior, a Normal, .* \(2,\)",
        ),
        (
            lambda n: Implicit(torch.zeros(n, 2, 2), 2),
            r"values of shape \(16, 2, 2\), of which plate 'data' .* holds 2",
        ),
        (
            lambda n: Implicit(torch.zeros(n + 1, 2), 1),
            r"\(17, 2\), of which plate 'data' of the model holds 17 .* its 16",
        ),
    ],
)
def test_a_guide_of_the_wrong_shape(decoder, value, message, validation):
    def guide(x):
        pyro.sample("z", value(len(x)))

    with pytest.raises(
        ProgramError, match=f"latent site 'z': the guide gives {message}|latent site 'z'.*{message}"
    ):
        step(decoded(decoder), guide, data())


def test_a_guide_outside_the_support():
    program = functools.partial(model, prior=dist.Dirichlet(torch.ones(2)))
    with pytest.raises(
        ProgramError, match=r"latent site 'z': 16 of 16 guide values of shape \(16, 2\) lie outside .*Simplex"
    ):
        step(program, by_hand, data())


def test_float32_rounding_is_not_outside_the_support():
    """Pyro's own tolerance of 1e-6 refuses a softmax over many classes."""
    torch.set_default_dtype(torch.float32)

    def program(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Dirichlet(torch.ones(20_000)))
            pyro.sample("x", dist.Normal(z[..., :2], 0.5).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", Implicit(torch.randn(len(x), 20_000).softmax(-1), 1, dist.constraints.simplex))

    step(program, guide, data())


def test_a_guide_without_reparametrisation(validation):
    def program(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.VonMises(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1).expand(x.shape), 0.5).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.VonMises(0.0, 1.0))

    with pytest.raises(
        ProgramError, match=r"guide site 'z' is a VonMises, which is sampled without a gradient.*Implicit"
    ):
        step(program, guide, data())


def test_an_implicit_guide_of_a_global(validation):
    def program(x):
        m = pyro.sample("m", normal())
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.sample("m", Implicit(torch.zeros(2), event_dim=1))

    with pytest.raises(ProgramError, match="global latent 'm' has an Implicit guide.*Normal or Delta"):
        step(program, guide, data())


def test_an_implicit_guide_in_an_elbo(guide_of, validation):
    with pytest.raises(
        ValueError, match="(?s)at site 'z'.*Implicit has no density.*loss=pyro_sinkhorn.Trace_Sinkhorn"
    ):
        step(model, guide_of(model), data(), loss=Trace_ELBO())


def test_an_implicit_likelihood():
    def program(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", normal())
            pyro.sample("x", Implicit(z, event_dim=1), obs=x)

    with pytest.raises(
        ProgramError, match="(?s)observed site 'x' of the model cannot be scored.*Implicit has no density"
    ):
        step(program, by_hand, data())
