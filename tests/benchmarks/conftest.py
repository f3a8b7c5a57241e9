"""The folder of the benchmarks on the path, as their programs have it."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
