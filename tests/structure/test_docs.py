"""The snippets of a page of the documentation run, one after the other, without a warning."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("page", ["structure.md", pytest.param("posterior.md", marks=pytest.mark.slow)])
def test_the_snippets_run(page):
    path = DOCS / page
    blocks = re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) > 5
    exec(compile("\n".join(blocks), str(path), "exec"), {})
