"""Figures: a panel for each quantity, no global state, what is wrong said in the title."""

import subprocess
import sys

import pytest
import torch
from matplotlib.patches import Rectangle

from pyro_sinkhorn import plots
from pyro_sinkhorn.diagnostics import (
    PosteriorDraws,
    expected_coverage,
    posterior_contraction,
    simulation_based_calibration,
    tarp,
)
from pyro_sinkhorn.errors import ProgramError


def simulations(d=3, n_sim=200, n_draws=40):
    z = torch.randn(n_sim, d)
    draws = (z + torch.randn(n_sim, d)) / 2 + 0.5**0.5 * torch.randn(n_draws, n_sim, d)
    draws[..., 0] *= 0.2
    return PosteriorDraws({"z": z}, {"z": draws})


def texts(figure):
    return [axes.get_title() for axes in figure.axes]


@pytest.fixture
def rendered(tmp_path):
    def render(figure):
        figure.savefig(tmp_path / "figure.png", dpi=60)
        assert (tmp_path / "figure.png").stat().st_size > 3000
        return figure

    return render


def test_calibration(rendered):
    report = simulation_based_calibration(simulations())
    figure = rendered(report.plot())
    assert len(figure.axes) == 6
    assert "z[0]: too narrow" in texts(figure) and "z[1]: passed" in texts(figure)
    line = figure.axes[0].lines[-1].get_ydata()
    assert line[0] == line[-1] == 0 and abs(line).max() > 0.1


def test_tarp(rendered):
    report = tarp(simulations())
    assert len(rendered(report.plot()).axes) == 2


@pytest.mark.parametrize("n_draws", [2, 7, 1000])
def test_any_number_of_draws(rendered, n_draws):
    report = simulation_based_calibration(simulations(1, 100, n_draws))
    figure = rendered(report.plot())
    bars = [bar for bar in figure.axes[1].patches if isinstance(bar, Rectangle)]
    assert len(bars) == min(20, n_draws + 1)
    # By area, since bars of unequal width are drawn by their density; .92 of the width is drawn.
    held = sum(bar.get_height() * bar.get_width() / 0.92 * len(bars) for bar in bars)
    assert held == pytest.approx(100)


def test_the_worst_of_many(rendered):
    report = simulation_based_calibration(simulations(30))
    figure = rendered(report.plot(most=5))
    assert len(figure.axes) == 10 and texts(figure)[0] == "z[0]: too narrow"
    assert figure.get_supxlabel() == "the 5 worst of 30"


def test_coverage(rendered):
    figure = rendered(expected_coverage(simulations()).plot())
    named = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert "z[0]: too narrow or biased" in named and "2 passed" in named


def test_contraction(rendered):
    figure = rendered(posterior_contraction(simulations()).plot())
    assert (
        len(figure.axes) == 3 and texts(figure)[0].startswith("z[0]\n") and texts(figure)[1] == "z[1]\npassed"
    )


def test_draws_that_all_agree_can_be_drawn(rendered):
    drawn = PosteriorDraws({"k": torch.randint(2, (50,))}, {"k": torch.zeros(9, 50)})
    rendered(posterior_contraction(drawn).plot())
    rendered(simulation_based_calibration(drawn).plot())


@pytest.mark.parametrize("most", [0, -1, 2.5])
def test_wrong_use(most):
    with pytest.raises(ProgramError, match="most is"):
        plots.plot_calibration(simulation_based_calibration(simulations()), most=most)


def test_figures_are_not_kept_by_pyplot():
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    simulation_based_calibration(simulations()).plot()
    assert plt.get_fignums() == before


def test_without_matplotlib():
    script = (
        "import sys; sys.modules['matplotlib'] = sys.modules['matplotlib.figure'] = None\n"
        "from pyro_sinkhorn import plots\n"
        "try: plots._figure((1, 1))\n"
        "except ImportError as error: print(error)"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "figures need matplotlib: pip install matplotlib" in out.stdout
