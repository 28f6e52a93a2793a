"""The report of the bound, as it is printed."""

from __future__ import annotations

from collections.abc import Callable

from _tables import load, origin


def report() -> str:
    """In fixed width, with where it is from."""
    result = load("papers_bound")
    return "```text\n" + "\n".join(result["report"]) + "\n```" + origin(result)


SECTIONS: dict[str, Callable[[], str]] = {"papers-bound": report}
