"""Every study of the papers runs, small and without its data."""

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks" / "papers"
STUDIES = [p for p in sorted(FOLDER.glob("[a-z]*.py")) if not p.stem.endswith("_tables")]


@pytest.mark.parametrize("script", STUDIES, ids=lambda path: path.stem)
def test_smoke(script, tmp_path):
    command = [sys.executable, "-W", "error::UserWarning", str(script), "--smoke-test"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout
