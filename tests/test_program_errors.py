"""What goes wrong in a program is named, and leaves the program usable."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import nn

from pyro_sinkhorn import SinkhornProgram, Trace_Sinkhorn, sinkhorn_infer, snapshot
from pyro_sinkhorn.errors import NonFiniteError, ProgramError

LOSS = Trace_Sinkhorn(match_size=8)


class BadGradient(torch.autograd.Function):
    """The identity with a gradient that is NaN."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.nan


class Decoder(nn.Module):
    """A network that goes wrong in the way and at the training step that a test asks for."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(2, 3), nn.BatchNorm1d(3)

    def forward(self, z):
        out = self.norm(self.linear(z))
        if Decoder.countdown is not None and torch.is_grad_enabled() and self.training:
            Decoder.countdown -= 1
            if Decoder.countdown == 0:
                return Decoder.fault(out)
        return out

    countdown: int | None = None
    fault = None


@pytest.fixture(autouse=True)
def sound_decoder():
    Decoder.countdown = Decoder.fault = None
    yield
    Decoder.countdown = Decoder.fault = None


def make_program(decoder=None, **options):
    decoder = nn.Linear(2, 3) if decoder is None else decoder

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 0.5).to_event(1), obs=x)

    return SinkhornProgram(model, loss=LOSS, **options)


def data(n=40):
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(1))


def fit(program, num_steps=3, x=None, **options):
    x = data() if x is None else x
    return program.fit(x, **{"num_steps": num_steps, "batch_size": 16, "progress": False} | options)


def learned(program):
    """Parameters, buffers and moments by name."""
    state = snapshot.take(program)
    return {part: state[part] for part in ("modules", "guide", "params", "optim")}


def assert_equal(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, torch.Tensor):
        assert a.equal(b)
    elif isinstance(a, list):
        assert len(a) == len(b)
        for pair in zip(a, b, strict=True):
            assert_equal(*pair)
    else:
        assert a == b


def nan_in_the_first_row(out):
    return torch.cat([out[:1] * torch.nan, out[1:]])


def interrupt(out):
    raise KeyboardInterrupt


FAULTS = {
    "decoder": (
        nan_in_the_first_row,
        NonFiniteError,
        r"^step 3: the model made NaN after its sites \['z'\].*the decoder, has diverged .*keeps the state of the step",
    ),
    "gradient": (
        BadGradient.apply,
        NonFiniteError,
        r"^step 3: the gradient of '(decoder|AutoImplicit).*' \(\d+ of \d+ parameters in all\) is NaN .*keeps the",
    ),
    "interrupt": (interrupt, KeyboardInterrupt, None),
}


@pytest.mark.parametrize("first", [0, 1], ids=["in the first fit", "in the second"])
@pytest.mark.parametrize(("fault", "error", "words"), FAULTS.values(), ids=FAULTS)
def test_a_fault_at_a_step_leaves_the_state_of_the_step_before(fault, error, words, first):
    program, twin = make_program(Decoder()), make_program(Decoder())
    for name, module in twin.owned.originals.items():
        module.load_state_dict(program.owned.originals[name].state_dict())
    twin.reset()
    fit(program, first, seed=0), fit(twin, first, seed=0)
    Decoder.fault, Decoder.countdown = fault, 4 - first
    with pytest.raises(error, match=words):
        fit(program, 9)
    assert program.num_steps == len(program.history) == 3
    Decoder.countdown = None
    fit(twin, 3 - first)
    assert_equal(learned(program), learned(twin))
    # Still usable, and no gradient is left over that would count twice.
    for one in (program, twin):
        fit(one, 2, seed=5, batch_size=None)  # the epochs differ: one has seen a batch more
    assert_equal(learned(program), learned(twin))
    program.encode(data()), program.generate(2, data()), program.clone()


def test_nan_in_the_data_are_found_wherever_they_come():
    program, x = make_program(Decoder()), data()
    x[17] = torch.nan
    with pytest.raises(NonFiniteError, match=r"^step [012]: .*shape \(16, 3\) are NaN or infinite in 1 rows"):
        fit(program, 9, x, seed=0)  # 40 data are all seen within three batches of 16
    before = learned(program)
    assert all(value.isfinite().all() for value in before["modules"]["decoder"].values())
    fit(program, 2)
    program.encode(data())


def test_nan_in_the_data_to_encode_are_named():
    program, x = fit(make_program()), data()
    x[17] = torch.nan
    words = r"site 'z': the guide produced NaN .*argument 0: .*\(40, 3\) are NaN or infinite in 1 rows \(first: 17\)"
    with pytest.raises(NonFiniteError, match=words):
        program.encode(x)
    with torch.no_grad():
        program.guide.heads[0].direct.weight.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="Its arguments are finite: the encoder diverged"):
        program.encode(data())


@pytest.mark.parametrize(("fault", "error", "words"), FAULTS.values(), ids=FAULTS)
def test_a_fault_before_the_first_step_is_done_leaves_nothing_of_it(fault, error, words):
    program = make_program(Decoder())
    Decoder.fault, Decoder.countdown = fault, 1
    with pytest.raises(error):
        fit(program, seed=0)
    assert program.num_steps == 0 and not program.guide.heads and not program.owned.store["params"]
    assert not program.loss.latent_match.state.units
    Decoder.countdown = None
    fit(program, seed=0)
    assert program.num_steps == 3


# Wrong input.


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SinkhornProgram("model"), "the model is a str: expected a callable"),
        (lambda: sinkhorn_infer(Trace_Sinkhorn()), "the model is a Trace_Sinkhorn: expected a callable"),
        (lambda: make_program(guide="auto"), "the guide is a str: expected a callable"),
        (
            lambda: SinkhornProgram(print, loss=Trace_Sinkhorn),
            r"the loss is <class .*such as Trace_Sinkhorn\(\)",
        ),
        (lambda: SinkhornProgram(print, loss="elbo"), "the loss is 'elbo': expected an instance"),
        (lambda: make_program(guide=print, encoder=nn.Linear(3, 3)), "either a guide or an encoder"),
        (lambda: make_program(encoder=torch.tanh), "encoder is a builtin.*expected an nn.Module"),
        (lambda: fit(make_program(), num_steps=-1), "num_steps is -1: expected an integer of at least 0"),
        (lambda: fit(make_program(), num_steps=1e3), "num_steps is 1000.0: expected an integer"),
        (lambda: fit(make_program(), batch_size=0), "batch_size is 0: expected an integer of at least 1"),
        (lambda: fit(make_program(), batch_size=2.0), "batch_size is 2.0: expected an integer"),
        (lambda: fit(make_program(), seed="now"), "seed is 'now': expected an integer"),
        (lambda: fit(make_program(), optim=torch.optim.Adam), "optim is a Adam: expected one of pyro.optim"),
        (lambda: fit(make_program(), x=data(0)), r"data are empty: arguments of shape \[\(0, 3\)\]"),
        (lambda: fit(make_program(), x=data(1)), "batch of 1 cannot be split"),
        (lambda: fit(make_program(), batch_size=1), "batch of 1 cannot be split"),
        (
            lambda: fit(make_program(), x=data().long()),
            "'x': the data are torch.int64 where Normal needs floating",
        ),
        (lambda: make_program().encode(data(0)), r"the batch is empty. Shapes given: argument 0 \(0, 3\)"),
        (
            lambda: make_program().generate(2, data(0)),
            r"the batch is empty. Shapes given: argument 0 \(0, 3\)",
        ),
        (
            lambda: make_program().encode(data(), num_samples=0),
            "num_samples is 0: expected an integer of at least 1",
        ),
        (lambda: make_program().generate(data()), "num_samples is of type Tensor: expected an integer"),
        (
            lambda: make_program().diagnose(data(), num_floor=1),
            "num_floor is 1: expected an integer of at least 2",
        ),
    ],
)
def test_wrong_input_is_named(make, words):
    with pytest.raises(ProgramError, match=words):
        make()


def test_a_refused_call_changes_nothing():
    program = fit(make_program(), seed=0)
    before, optim = learned(program), program.optim
    for options in (
        {"batch_size": 0},
        {"num_steps": -1},
        {"optim": 3},
        {"optim": pyro.optim.Adam({"lr": 1.0}), "lr": 0.1},
        {"x": data(0)},
        {"x": torch.randn(20, 4)},
    ):
        with pytest.raises(ProgramError):
            fit(program, **options)
    assert_equal(learned(program), before)
    assert program.num_steps == 3 and program.optim is optim


def test_data_of_another_width_are_named():
    program = fit(make_program())
    words = r"latent group \(z\): the encoder was made for 3 observed numbers a slice and now gets 4 \(sites \['x'\]\)"
    for call in (program.encode, lambda x: fit(program, x=x)):
        with pytest.raises(ProgramError, match=words):
            call(torch.randn(20, 4))


@pytest.mark.parametrize(
    "wrong", [data().long(), torch.randn(40), data(1)], ids=["integers", "one number", "one datum"]
)
def test_a_first_fit_on_wrong_data_does_not_bind_the_guide_to_them(wrong):
    program = make_program()
    with pytest.raises(ProgramError):
        fit(program, x=wrong)
    assert fit(program).num_steps == 3
    other = make_program()
    for name, module in other.owned.originals.items():
        module.load_state_dict(program.owned.originals[name].state_dict())
    other.reset()
    assert_equal(learned(fit(program.reset(), seed=0)), learned(fit(other, seed=0)))


def test_an_encoder_of_the_wrong_shape_can_be_put_right():
    class Encoder(nn.Linear):
        collapsed = True

        def forward(self, x):
            return super().forward(x).sum() if Encoder.collapsed else super().forward(x)

    program = make_program(encoder=Encoder(3, 4))
    for call in (lambda: program.encode(data()), lambda: fit(program)):
        with pytest.raises(ProgramError, match=r"latent group \(z\): the encoder returned \(\)"):
            call()
    Encoder.collapsed = False
    assert fit(program).num_steps == 3


def test_a_guide_without_the_models_sites_is_refused():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("w", dist.Normal(x.new_zeros(2), 1.0).to_event(1))

    program = make_program(guide=guide)
    for call in (lambda: fit(program), lambda: program.diagnose(data())):
        with pytest.raises(
            ProgramError, match=r"the guide does not sample the latent sites \['z'\]; it samples \['w'\]"
        ):
            call()


def test_dtypes_that_do_not_fit_are_named():
    class Guide(PyroModule):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2).float()

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.linear(x), 1.0).to_event(1))

    words = (
        r"same dtype.*: argument 0 is torch.float64, decoder is torch.float64, the guide is torch.float32\. "
        r"Bring data and networks to one dtype"
    )
    program = make_program(guide=Guide)
    for call in (lambda: fit(program), lambda: program.encode(data())):
        with pytest.raises(ProgramError, match=words):
            call()


def test_a_saved_guide_for_another_latent_is_refused_at_every_call(tmp_path):
    program = fit(make_program())
    program.save(tmp_path / "a.pt")
    decoder = program.owned.originals["decoder"]

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Dirichlet(x.new_ones(5)))
            pyro.sample("x", dist.Normal(decoder(z[..., :2]), 0.5).to_event(1), obs=x)

    loaded = SinkhornProgram.load(tmp_path / "a.pt", model)
    for call in (lambda: loaded.encode(data()), lambda: loaded.encode(data()), lambda: fit(loaded)):
        with pytest.raises(
            ProgramError, match=r"the saved guide does not fit this model.*size mismatch for heads.0"
        ):
            call()


def test_an_unregistered_network_is_warned_of():
    decoder = nn.Linear(2, 3)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 0.5).to_event(1), obs=x)

    with pytest.warns(UserWarning, match=r"\['decoder'\] ran but SVI will never train them"):
        fit(SinkhornProgram(model, loss=LOSS))


def test_a_batch_below_twice_the_match_size_is_warned_of_once():
    program = SinkhornProgram(make_program().model, loss=Trace_Sinkhorn(match_size=20))
    with pytest.warns(UserWarning, match=r"a batch of 16 gives halves of 8, below match_size=20"):
        fit(program)
    fit(program)
