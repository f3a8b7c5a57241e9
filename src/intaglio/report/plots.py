"""Loss curve and before/after bars, and how every picture is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

__all__ = ["colour_bar", "plot_accuracy", "plot_loss", "save"]

_BEFORE, _AFTER = "#8da0b3", "#0b6e99"


def plot_loss(history: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Training loss over optimizer steps, and held-out loss where it was measured.

    Args:
        history: the Trainer's log: rows with `step` and `loss` or `eval_loss`.
        path: of the PNG.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, label, colour in (("loss", "training", _AFTER), ("eval_loss", "held out", "#c0562f")):
        points = [(row["step"], row[key]) for row in history if key in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, color=colour, marker=".")
    axes.set(xlabel="optimizer step", ylabel="loss per answer token (nats)", title="Loss", ylim=(0, None))
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    return save(figure, path)


def plot_accuracy(before: Mapping[str, Any] | None, after: Mapping[str, Any], path: Path) -> Path:
    """Accuracy before and after, as the task checks it (with 95 % interval) and by the lenient reading.

    Args:
        before, after: `Score.to_dict()` of the base and the tuned model; before may be None.
        path: of the PNG.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    scores = [(s, name, c) for s, name, c in ((before, "base", _BEFORE), (after, "tuned", _AFTER)) if s is not None]
    for i, (score, name, colour) in enumerate(scores):
        shift = (i - (len(scores) - 1) / 2) * 0.38
        heights = [100 * score["correct"] / score["total"], 100 * score["lenient"] / score["total"]]
        errors = [[max(0.0, heights[0] - 100 * score["low"])], [max(0.0, 100 * score["high"] - heights[0])]]
        axes.bar([shift, 1 + shift], heights, width=0.36, label=name, color=colour)
        axes.errorbar([shift], [heights[0]], yerr=errors, color="black", capsize=4, linewidth=1)
        # Above the interval, so that a bar of no height keeps its number readable.
        for x, height, top in zip((shift, 1 + shift), heights, (100 * score["high"], heights[1]), strict=True):
            axes.text(x, top + 1.5, f"{height:.1f}", ha="center", va="bottom")
    axes.set_xticks([0, 1], ["right answer\n(with 95 % interval)", "right answer somewhere\nin the output (lenient)"])
    axes.set(ylabel="held-out examples (%)", title=f"Accuracy on {after['total']} held-out examples", ylim=(0, 112))
    axes.set_yticks(range(0, 101, 20))
    axes.legend(loc="upper left")
    return save(figure, path)


def colour_bar(figure: Figure, image: Any, axes: Any, **options: Any) -> None:
    """Add a colour bar without a frame; `options` are those of `Figure.colorbar`."""
    figure.colorbar(image, ax=axes, **options).outline.set_visible(False)  # type: ignore[operator]


def save(figure: Figure, path: Path, *, dpi: int = 100) -> Path:
    """Write a figure as PNG and return the path."""
    FigureCanvasAgg(figure).print_figure(str(path), dpi=dpi, format="png")
    return path
