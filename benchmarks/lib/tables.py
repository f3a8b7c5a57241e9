"""Tables and verdicts in Markdown."""

from __future__ import annotations

from collections.abc import Iterable


def table(head: str, rows: Iterable[Iterable[object]], align: str = "l") -> list[str]:
    """The lines of a table.

    Args:
        head: names of the columns, between bars.
        rows: cells.
        align: "l" or "r" for each column, from the left; "r" where it ends.
    """
    count = head.count("|") - 1
    return [head, "".join("|---" if a == "l" else "|---:" for a in align.ljust(count, "r")) + "|", *map(row, rows)]


def row(cells: Iterable[object]) -> str:
    """One line of a table."""
    return f"| {' | '.join(map(str, cells))} |"


def show(value: float | None, form: str) -> str:
    """A figure, or nothing where it was not measured."""
    return "" if value is None else format(value, form)


def reached(what: str, value: float | None, bound: float, sense: str = "≤") -> str:
    """A line that says whether a figure is where it is meant to be."""
    if value is None:
        return f"* {what} {sense} {bound:g}: not measured"
    word = "reached" if (value <= bound if sense == "≤" else value >= bound) else "NOT reached"
    return f"* {what} {sense} {bound:g}: **{value:.3g}**, {word}"
