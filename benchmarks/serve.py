"""Serving, end to end: tokens per second, memory and loading with many adapters; or latency over HTTP.

    python benchmarks/serve.py --part engine        # see serve_engine.py
    python benchmarks/serve.py --part http          # see serve_http.py

What follows --part PART goes to that script.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

PARTS = ("engine", "http")


def main() -> None:
    """Run the script of a part."""
    arguments = sys.argv[1:]
    if arguments in (["-h"], ["--help"]):
        print(__doc__)
        return
    if len(arguments) < 2 or arguments[0] != "--part" or arguments[1] not in PARTS:
        raise SystemExit(__doc__)
    script = Path(__file__).with_name(f"serve_{arguments[1]}.py")
    sys.argv = [str(script), *arguments[2:]]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
