"""What the gallery shows: for every program its data, its fit, one number a person would check, and a drawing."""

from collections.abc import Callable

from exhibits import digits, tables
from exhibits.base import Exhibit

EXHIBITS: dict[str, Callable[[], Exhibit]] = {
    make.__name__: make
    for make in (
        tables.gaussian_mixture,
        tables.spike_and_slab,
        tables.sun_sensors,
        tables.circular_walk,
        tables.growth_curves,
        tables.lkj_covariance,
        tables.state_space,
        digits.semi_supervised_digits,
        digits.conditional_digits,
        digits.pseudo_input_digits,
        digits.canvas_digits,
    )
}

__all__ = ["EXHIBITS", "Exhibit"]
