"""How a law is held against examples, the same ones in every run."""

from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, given, settings


def hold(law: Callable[..., None], arguments: dict[str, Any], number: int) -> int:
    """Hold a law against so many examples.

    :returns: how many there were, those of shrinking aside
    """
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    count = 0

    @settings(
        max_examples=number, deadline=None, derandomize=True, database=None, suppress_health_check=checks
    )
    @given(**arguments)
    def every(**drawn: Any) -> None:
        nonlocal count
        count += 1
        law(**drawn)

    every()
    return count
