"""Posterior draws: names, standardised columns, and errors that say which site."""

import pytest
import torch

from pyro_sinkhorn.diagnostics import PosteriorDraws
from pyro_sinkhorn.errors import NonFiniteError, ProgramError


def test_scalars_are_named_by_site_and_index():
    truth = {"tau": torch.rand(7), "theta": torch.randn(7, 2, 3), "z": torch.randn(7, 2)}
    draws = {name: torch.randn(4, *value.shape) for name, value in truth.items()}
    drawn = PosteriorDraws(truth, draws)
    found = {scalar.name: scalar for scalar in drawn.scalars()}
    assert list(found)[:3] == ["tau", "theta[0,0]", "theta[0,1]"] and len(found) == 9
    assert torch.equal(found["theta[1,2]"].truth, truth["theta"][:, 1, 2])
    assert torch.equal(found["theta[1,2]"].draws, draws["theta"][:, :, 1, 2])
    assert found["z[0]"].draws.shape == (drawn.n_draws, drawn.n_sim) == (4, 7)


def test_all_types_become_float64_and_nothing_is_differentiated():
    truth = {"b": torch.tensor([True, False, True]), "k": torch.tensor([1, 2, 3]), "w": torch.rand(3).float()}
    draws = {name: torch.stack([value, value.roll(1)]) for name, value in truth.items()}
    draws["w"] = draws["w"].requires_grad_()
    for scalar in PosteriorDraws(truth, draws).scalars():
        assert scalar.truth.dtype == scalar.draws.dtype == torch.float64
        assert not scalar.draws.requires_grad


def test_numbers_that_never_vary_are_set_aside():
    """A Cholesky factor of a correlation matrix has a corner of 1 and a triangle of 0."""
    truth, draws = torch.zeros(5, 2, 2), torch.zeros(3, 5, 2, 2)
    truth[:, 0, 0] = draws[..., 0, 0] = 1.0
    truth[:, 1], draws[..., 1, :] = torch.randn(5, 2), torch.randn(3, 5, 2)
    drawn = PosteriorDraws({"L": truth}, {"L": draws})
    assert drawn.constants() == ("L[0,0]", "L[0,1]")
    assert [scalar.name for scalar in drawn.scalars()] == ["L[1,0]", "L[1,1]"]
    assert drawn.joined().names == ("L[1,0]", "L[1,1]")


def test_a_constant_truth_with_other_draws_is_checked():
    drawn = PosteriorDraws({"z": torch.ones(5)}, {"z": torch.randn(3, 5)})
    assert not drawn.constants()
    assert drawn.joined().scale.tolist() == [1.0]


def test_columns_are_in_units_of_the_truth():
    truth = 5 + 100 * torch.randn(20_000)
    wild = torch.distributions.Cauchy(0.0, 1.0).sample((20_000,))
    drawn = PosteriorDraws({"a": truth, "c": wild}, {"a": truth.expand(2, -1), "c": wild.expand(2, -1)})
    joined = drawn.joined()
    # Quantiles of 20000 values: a relative error of some 1%.
    assert joined.scale[0] == pytest.approx(99.4, rel=0.05)
    assert joined.scale[1] == pytest.approx(1.82, rel=0.08)
    assert torch.allclose(joined.truth[:, 0] * joined.scale[0] + joined.centre[0], truth)
    assert torch.equal(joined.draws[1], joined.truth)


def test_a_rare_state_has_a_unit():
    truth = (torch.arange(100) < 3).double()
    joined = PosteriorDraws({"b": truth}, {"b": torch.zeros(2, 100)}).joined()
    assert joined.scale.item() == pytest.approx(float(truth.std(correction=0)))


GOOD, DRAWS = {"z": torch.zeros(4, 2)}, {"z": torch.zeros(3, 4, 2)}


@pytest.mark.parametrize(
    ("truth", "draws", "data", "error", "message"),
    [
        ({}, {}, None, ProgramError, "with one site at least"),
        (torch.zeros(4), DRAWS, None, ProgramError, "must be dictionaries"),
        (GOOD, {"w": DRAWS["z"]}, None, ProgramError, r"truth has the sites \['z'\] and draws \['w'\]"),
        (
            GOOD,
            {"z": torch.zeros(3, 2, 4)},
            None,
            ProgramError,
            r"'z' has shape \(3, 2, 4\).*\(3, 4, 2\) here",
        ),
        (GOOD, {"z": torch.zeros(3, 4)}, None, ProgramError, r"\(n_draws, n_sim, \*event\)"),
        (GOOD, {"z": torch.zeros(4)}, None, ProgramError, "draws of site 'z' is no tensor"),
        (GOOD, {"z": torch.zeros(1, 4, 2)}, None, ProgramError, "4 simulations and 1 draws: needs 1 and 2"),
        ({"z": 3.0}, DRAWS, None, ProgramError, "truth of site 'z' is no tensor"),
        (
            GOOD | {"w": torch.zeros(5)},
            DRAWS | {"w": torch.zeros(3, 5)},
            None,
            ProgramError,
            r"truth of site 'w' has shape \(5,\).*\(4, ...\) here",
        ),
        (GOOD, DRAWS, {"x": torch.zeros(5)}, ProgramError, r"data of site 'x' has shape \(5,\)"),
        (GOOD, DRAWS, {"x": [1.0]}, ProgramError, "data of site 'x' is a list"),
        (GOOD, DRAWS, {}, ProgramError, "data must be a dictionary"),
        (GOOD, {"z": torch.zeros(3, 4, 2) * 1j}, None, ProgramError, "is complex"),
        (GOOD, {"z": torch.full((3, 4, 2), torch.nan)}, None, NonFiniteError, "draws of site 'z'.*24 NaN"),
        ({"z": torch.full((4, 2), torch.inf)}, DRAWS, None, NonFiniteError, "truth of site 'z'.*8 NaN"),
    ],
)
def test_wrong_input(truth, draws, data, error, message):
    with pytest.raises(error, match=message):
        PosteriorDraws(truth, draws, data)


def test_nothing_that_varies_cannot_be_joined():
    with pytest.raises(ProgramError, match=r"nothing to check: z\[0\], z\[1\] never vary"):
        PosteriorDraws(GOOD, DRAWS).joined()
