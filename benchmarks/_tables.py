"""What the tables of the documents have in common: Markdown, result files, and where a number comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def load(name: str) -> dict[str, Any]:
    """A result file."""
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def origin(result: dict[str, Any]) -> str:
    """Machine and versions, under a table."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    return f"\n\n{result['machine']['in_words']}; {versions}; seeds {result['seeds']}; {result['date']}."
