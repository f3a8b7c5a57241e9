"""The command line of a benchmark: its help is the program's docstring, and files are written where it says."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

RESULTS = Path("benchmarks/results")


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help shows a program's docstring as it stands."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_write(parser: argparse.ArgumentParser, name: str) -> None:
    """The option to write files, by default those of the published results `name`."""
    parser.add_argument("--write", nargs="?", type=Path, const=RESULTS / name, help="also write files of this name")


def add_output(parser: argparse.ArgumentParser, name: str) -> None:
    """The option to name the files of a program that always writes them."""
    parser.add_argument("--output", type=Path, default=RESULTS / name, help="name without suffix")


def command() -> str:
    """The command that this process was started with, as results name it."""
    return f"python {shlex.join(sys.argv)}"
