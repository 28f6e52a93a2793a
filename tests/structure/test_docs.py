"""The snippets of docs/structure.md run, one after the other, without a warning."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "structure.md"


def test_the_snippets_run():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) > 5
    exec(compile("\n".join(blocks), str(PAGE), "exec"), {})
