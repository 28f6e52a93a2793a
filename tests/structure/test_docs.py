"""The snippets of a page of the documentation run, one after the other, without a warning."""

import re
from pathlib import Path

import pytest

from pyro_sinkhorn.geometry import registry

DOCS = Path(__file__).parents[2] / "docs"


PAGES = [
    "structure.md",
    "tutorial.md",
    "training.md",
    "geometry.md",
    *sorted(f"howto/{path.name}" for path in (DOCS / "howto").glob("*.md")),
    pytest.param("posterior.md", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("page", PAGES)
def test_the_snippets_run(page, monkeypatch):
    for taught in ("_BY_TYPE", "_BY_SUPPORT"):  # what a page teaches is not for other tests
        monkeypatch.setattr(registry, taught, dict(getattr(registry, taught)))
    path = DOCS / page
    blocks = re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    exec(compile("\n".join(blocks), str(path), "exec"), {})
