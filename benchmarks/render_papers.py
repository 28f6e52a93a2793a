"""Tables of docs/papers.md: those of every ``papers/*_tables.py``, so that a study brings its own."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

_FOLDER = Path(__file__).resolve().parent / "papers"
sys.path.append(str(_FOLDER))

SECTIONS: dict[str, Callable[[], str]] = {}
for _path in sorted(_FOLDER.glob("*_tables.py")):
    SECTIONS |= importlib.import_module(_path.stem).SECTIONS
