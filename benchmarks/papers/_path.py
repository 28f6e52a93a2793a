"""Scripts of this folder import this first: it puts the folder above, with what all benchmarks share, on their path."""

import sys
from pathlib import Path

FIGURES = Path(__file__).resolve().parents[2] / "docs" / "figures" / "papers"

sys.path.append(str(Path(__file__).resolve().parents[1]))
