"""Pictures of results: bars with their values beside them, in panels without frames."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BLUE, CYAN, RED, YELLOW, PURPLE = "#4477aa", "#66ccee", "#ee6677", "#ccbb44", "#aa3377"
PARTS = {"forward": BLUE, "backward": CYAN, "optimizer": YELLOW}  # of a training step


@contextmanager
def panels(path: Path, rows: int, columns: int, *, dpi: int = 120, **options: Any) -> Iterator[tuple[Any, Any]]:
    """A figure and its panels, for the length of a block that draws into them; then the file is written.

    Args:
        path: of the file.
        rows: of panels.
        columns: of panels.
        dpi: of the file.
        options: as `matplotlib.pyplot.subplots` takes them.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(rows, columns, layout="constrained", **options)
    yield figure, axes
    for panel in figure.axes:
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=dpi)
    plt.close(figure)


def bars(
    axes: Any, labels: Sequence[str], values: Sequence[float], form: str, *, colour: Any = BLUE, room: float = 1.12, size: int = 8
) -> None:
    """Horizontal bars, each with its value in a format beside it."""
    axes.barh(labels, values, color=colour)
    beside(axes, labels, values, [format(value, form) for value in values], room=room, size=size)


def beside(
    axes: Any, labels: Sequence[str], ends: Sequence[float], texts: Sequence[str], *, room: float = 1.12, size: int = 8
) -> None:
    """Texts at the ends of bars; the panel is so many times as wide as the longest bar."""
    for label, end, text in zip(labels, ends, texts, strict=True):
        axes.text(end, label, f" {text}", va="center", fontsize=size)
    axes.set_xlim(0, (max(ends) or 1.0) * room)


def step_parts(axes: Any, labels: Sequence[str], seconds: Sequence[Mapping[str, float]], legend: str) -> list[float]:
    """Bars of a training step, its parts one after the other; returns where each bar ends."""
    ends = [0.0] * len(labels)
    for part, colour in PARTS.items():
        widths = [parts.get(part, 0.0) for parts in seconds]
        axes.barh(labels, widths, left=ends, color=colour, label=part)
        ends = [a + b for a, b in zip(ends, widths, strict=True)]
    axes.set_xlabel("seconds per step (median)")
    axes.legend(frameon=False, fontsize=8, loc=legend)
    return ends
