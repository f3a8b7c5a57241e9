"""Cells of a benchmark of training: a model's shape, rows and tokens, and a type; measured and written one after the other.

A program says who takes part, what is measured in a cell and how that is shown. The rest is the same for all of them: the
arguments that choose cells and contestants, and files that are written after each cell.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib import command_line, results
from lib.machine import device
from lib.models import GRIDS, SHAPES

Task = dict[str, Any]
Cell = dict[str, Any]  # "task": what contestants were asked; "results": figures by contestant


@dataclass(frozen=True)
class Page:
    """A program's way to show cells.

    Attributes:
        head: first lines of the Markdown file.
        table: Markdown of a cell.
        draw: picture of a cell, into a file.
        fields: what else the JSON file holds.
    """

    head: Callable[[], str]
    table: Callable[[Cell], str]
    draw: Callable[[Cell, Path], None]
    fields: Callable[[], dict[str, Any]] = dict


def parser(doc: str | None, contestants: Iterable[str]) -> argparse.ArgumentParser:
    """The arguments that all benchmarks of training have."""
    parser = command_line.parser(doc)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m", help="tiny: to see, with a rank of 1, that all runs")
    parser.add_argument("--length", type=int, default=128, help="tokens per row")
    parser.add_argument("--batch", type=int, default=4, help="rows")
    parser.add_argument("--grid", choices=GRIDS, help="several cells instead of --shape, --length and --batch")
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    parser.add_argument("--only", nargs="+", choices=contestants, help="contestants; default all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="timed steps per turn")
    parser.add_argument("--one-by-one", action="store_true", help="one timed process at a time, where memory is short")
    return parser


def tasks(arguments: argparse.Namespace, names: Iterable[str]) -> Iterator[Task]:
    """What contestants are asked, cell by cell; `names` are arguments that are part of it."""
    own = {name: getattr(arguments, name) for name in names}
    chosen = GRIDS[arguments.grid] if arguments.grid else [(arguments.shape, arguments.length, arguments.batch)]
    for dtype in arguments.dtype:
        for shape, length, batch in chosen:
            yield {"shape": shape, "length": length, "batch": batch, "dtype": dtype} | own


def run(tasks: Iterable[Task], measure: Callable[[Task], Cell], page: Page, output: Path | None) -> None:
    """Measure and print cell after cell; where there is an output, write all so far after each: a long run may be stopped."""
    measured: list[Cell] = []
    asked = list(tasks)
    for task in asked:
        measured.append(measure(task))
        print(page.table(measured[-1]), flush=True)
        if output:
            write(measured, page, output, several=len(asked) > 1)


def write(measured: list[Cell], page: Page, output: Path, *, several: bool) -> None:
    """One file of figures and one of text, and a picture of each cell, which is in its name where there are several."""
    text = page.head() + "\n".join(page.table(cell) for cell in measured)
    results.write(output, {"device": device(), **page.fields(), "cells": measured}, text)
    for cell in measured:
        t = cell["task"]
        suffix = f"-{t['shape']}-{t['batch']}x{t['length']}-{t['dtype']}" if several else ""
        page.draw(cell, output.with_name(f"{output.name}{suffix}.png"))


def title(task: Task) -> str:
    """A cell in words."""
    return f"{task['shape']}, {task['batch']} × {task['length']} tokens, {task['dtype']}"
