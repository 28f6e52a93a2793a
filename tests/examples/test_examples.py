"""Every example runs."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_smoke(script, tmp_path):
    # In an empty directory and a process of its own, with warnings as errors, as a newcomer would meet them.
    command = [sys.executable, "-W", "error::UserWarning", str(script), "--smoke-test"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout


def test_quickstart_writes_its_figure(tmp_path):
    script = next(path for path in EXAMPLES if path.stem == "quickstart")
    figure = tmp_path / "figure.png"
    command = [sys.executable, str(script), "--smoke-test", "--output", str(figure)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert figure.stat().st_size > 10_000
    assert "generated to held-out" in result.stdout


def test_the_gallery_shows_what_it_is_asked_for(tmp_path):
    script = next(path for path in EXAMPLES if path.stem == "gallery")
    command = [sys.executable, str(script), "--smoke-test", "--only", "growth_curves", "lkj_covariance"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "gallery.png").stat().st_size > 10_000
    shown = [line.split()[0] for line in result.stdout.splitlines() if line[0] != " "]
    assert shown == ["growth_curves", "lkj_covariance", "figure:"]
    for row in ("latents  mean, effects: real 2; spread: half line 2", "loss", "match", "check"):
        assert f"  {row}" in result.stdout
