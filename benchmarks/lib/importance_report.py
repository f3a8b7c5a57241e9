"""Results of `importance.py`, as Markdown and as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lib import pictures
from lib.tables import table as markdown

# Two-sided 95 % of Student's t, by degrees of freedom from 1.
STUDENT = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
COLOURS = {
    "IST, default": "#4477aa",
    "IST, authors' rule": "#ee6677",
    "IST, authors' reward, uniform law": "#ccbb44",
    "RST": "#888888",
    "all layers": "#222222",
    "planted layers only": "#228833",
}
Run = dict[str, Any]


def text(measured: dict[str, Any]) -> str:
    """The report, with the targets and whether they are reached."""
    lines = ["# Learned importance on planted problems\n"]
    if "stack" in measured:
        lines += _stack(measured["stack"])
    if "model" in measured:
        lines += _model(measured["model"])
    return "\n".join(lines) + "\n"


def quartiles(runs: Sequence[Run], measure: str) -> list[list[float]]:
    """[first quartile, median, third] of a measure over runs, per look; looks without values are left out."""
    columns = [[x for x in column if x is not None] for column in zip(*(run[measure] for run in runs), strict=True)]
    return [statistics.quantiles(column, n=4, method="inclusive") for column in columns if len(column) > 1]


def means(runs: Sequence[Run], measure: str) -> list[float]:
    """Mean of a measure over runs, per look."""
    return [statistics.mean(column) for column in zip(*(run[measure] for run in runs), strict=True)]


def paired(runs: Sequence[Run], others: Sequence[Run], measure: str) -> list[tuple[float, float]]:
    """Mean difference of a measure between runs of the same seeds, and half its 95 % t-interval, per look."""
    found = []
    pairs = [zip(a[measure], b[measure], strict=True) for a, b in zip(runs, others, strict=True)]
    for column in zip(*pairs, strict=True):
        gaps = [a - b for a, b in column]
        scale = STUDENT[min(len(gaps) - 2, len(STUDENT) - 1)] / len(gaps) ** 0.5 if len(gaps) > 1 else float("nan")
        found.append((statistics.mean(gaps), scale * (statistics.stdev(gaps) if len(gaps) > 1 else 0.0)))
    return found


def _how(part: dict[str, Any]) -> str:
    return f"`{part['command']}` on {part['device']}.\n"


def _stack(part: dict[str, Any]) -> list[str]:
    count = len(next(iter(part["losses"].values()))["RST"])
    lines = [f"## A planted stack of 32 layers\n\n{_how(part)}"]
    for measure, title in (("inclusion", "Chance that a truly top-8 layer trains in a step"), ("spearman", "Rank correlation")):
        rows = []
        for loss, methods in part["losses"].items():
            for name, runs in methods.items():
                if found := quartiles(runs, measure):
                    rows.append([loss, name, *(f"{median:.2f} ({low:.2f}–{high:.2f})" for low, median, high in found)])
        lines.append(f"{title}, after so many importance updates: median (quartiles) of {count} runs\n")
        lines += [*_by_updates("loss | method", part["updates"], rows), ""]
    if 300 in part["updates"]:
        lines += _targets(part["losses"]["3"]["IST, default"], list(part["updates"]).index(300))
    return [*lines, ""]


def _targets(default: Sequence[Run], at: int) -> list[str]:
    """Whether the default is where it is meant to be at one of the looks."""
    lines = []
    for measure, target in (("inclusion", 0.40), ("spearman", 0.9)):
        median = quartiles(default, measure)[at][1]
        verdict = "reached" if median >= target else "NOT reached"
        lines.append(f"* Target: {measure} ≥ {target:g} by default, at loss 3 after 300 updates: {median:.2f}, {verdict}.")
    return lines


def _model(part: dict[str, Any]) -> list[str]:
    runs, updates = part["runs"], part["updates"]
    before = statistics.mean(level - entropy for level, entropy in part["levels"])
    level = statistics.mean(level for level, _ in part["levels"])
    losses = [[name, *(f"{x:.3f}" for x in means(of_name, "excess"))] for name, of_name in runs.items()]
    for name in runs:
        if name != "RST":
            gaps = paired(runs[name], runs["RST"], "excess")
            losses.append([f"{name} − RST", *(f"{gap:+.3f} ± {half:.3f}" for gap, half in gaps)])
    in_turn = [name for name in runs if name not in ("all layers", "planted layers only")]
    chances = [[name, *(f"{x:.2f}" for x in means(runs[name], "inclusion"))] for name in in_turn]
    return [
        f"## A planted model of 8 layers\n\n{_how(part)}",
        f"Before training: loss {level:.2f}, {before:.3f} above the least possible. Learning rate {part['lr']:g}.\n",
        f"Held-out loss above the least possible, after so many training updates: means over {len(runs['RST'])} seeds, and",
        "differences from RST, paired by seed, with 95 % intervals\n",
        *_by_updates("method", updates, losses),
        "\nChance that a planted layer trains (0.25 by chance), means\n",
        *_by_updates("method", updates, chances),
    ]


def _by_updates(first: str, updates: Sequence[int], rows: list[list[str]]) -> list[str]:
    """A table with a column for each number of updates."""
    head = f"| {first} | {' | '.join(f'{update:,}' for update in updates)} |"
    return markdown(head, rows, "l" * (first.count("|") + 1))


def draw(measured: dict[str, Any], path: Path) -> None:
    """Above, the planted stack: inclusion at three levels of the loss. Below: its ranking, and the planted model."""
    with pictures.panels(path, 2, 3, figsize=(12, 7.4)) as (figure, axes):
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
        if "stack" in measured:
            _draw_stack(measured["stack"], axes)
        if "model" in measured:
            _draw_model(measured["model"], axes[1, 1], axes[1, 2])
        for axis in axes.flat:
            axis.grid(alpha=0.25, linewidth=0.6)
        entries = {label: line for axis in axes.flat for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        ordered = [name for name in COLOURS if name in entries]
        figure.legend([entries[name] for name in ordered], ordered, loc="outside lower center", ncols=3, frameon=False)


def _draw_stack(part: dict[str, Any], axes: Any) -> None:
    for axis, (loss, methods) in zip(axes[0], part["losses"].items(), strict=True):
        for name, runs in methods.items():
            _band(axis, name, part["updates"], quartiles(runs, "inclusion"))
        axis.set(title=f"Planted stack, loss {loss}", xlabel="importance updates", ylim=(0.2, 0.85))
    axes[0, 0].set_ylabel("chance that a top-8 layer trains")
    axes[0, 2].plot(300, 0.4, marker="_", markersize=22, color="black")
    axes[0, 2].annotate("target", (300, 0.4), xytext=(0, 4), textcoords="offset points", ha="center", fontsize=8)
    for axis in (*axes[0], axes[1, 0]):
        axis.set_xscale("log")
        axis.set_xticks(part["updates"], [f"{update:,}" for update in part["updates"]])
        axis.minorticks_off()
    axis = axes[1, 0]
    for name, runs in part["losses"]["3"].items():
        _band(axis, name, part["updates"], quartiles(runs, "spearman"))
    axis.plot(300, 0.9, marker="_", markersize=22, color="black")
    axis.annotate("target", (300, 0.9), xytext=(0, -11), textcoords="offset points", ha="center", fontsize=8)
    axis.set(title="Planted stack, loss 3", xlabel="importance updates", ylabel="rank correlation with cost")


def _draw_model(part: dict[str, Any], left: Any, right: Any) -> None:
    updates, runs = part["updates"], part["runs"]
    before = statistics.mean(level - entropy for level, entropy in part["levels"])
    for name, of_name in runs.items():
        if name not in ("all layers", "planted layers only"):
            _band(left, name, updates, quartiles(of_name, "inclusion"))
        right.plot([0, *updates], [before, *means(of_name, "excess")], color=COLOURS[name], marker="o", markersize=3, label=name)
    left.set(title="Planted model", xlabel="training updates", ylabel="chance that a planted layer trains", ylim=(0.2, None))
    right.set(title="Planted model", xlabel="training updates", ylabel="held-out loss, above the least", ylim=(0, None))


def _band(axis: Any, name: str, updates: Sequence[int], cells: list[list[float]]) -> None:
    """Median and quartiles."""
    if not cells:
        return
    low, median, high = zip(*cells, strict=True)
    axis.plot(updates, median, color=COLOURS[name], marker="o", markersize=3, label=name)
    axis.fill_between(updates, low, high, color=COLOURS[name], alpha=0.18, linewidth=0)
