"""Results of `layers.py`: the figures that follow from what was measured, what they are meant to reach, tables, a picture."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from intaglio import IST
from lib import cells, pictures
from lib.cells import Cell, Task
from lib.rotators import LABELS, PLAIN, RECOMPUTED
from lib.tables import reached, show
from lib.tables import table as markdown

INTERVAL = IST().interval  # updates from one probe to the next
OVERHEAD = 0.05  # what probes may take of a run


def figure(cell: Cell, name: str, key: str, over: str = "peak") -> float | None:
    """One figure of one contestant over its run, None where it was not measured.

    Args:
        cell: what was measured.
        name: of the contestant.
        key: "kept", "kept_in_layers", "flops", "above" or "seconds".
        over: "peak" or "mean" of the run's updates.
    """
    result = cell["results"].get(name, {})
    if key == "above":
        return result.get("counts", {}).get("above")
    if key == "seconds":
        return result.get("time", {}).get("mean_of_least")
    counts = result.get("counts", {})
    if "draws" not in counts:
        return None
    found = [draw[key] for draw in counts["draws"]]
    if over == "mean":
        return statistics.fmean(found)
    return max(found + ([counts["deepest"][key]] if counts["deepest"] else []))


def ratio(cell: Cell, name: str, rival: str, key: str, over: str = "peak") -> float | None:
    """A figure of one contestant over that of another."""
    above, below = (figure(cell, n, key, over) for n in (name, rival))
    return above / below if above and below else None


def probe_and_step(cell: Cell, name: str, key: str) -> tuple[float, float] | None:
    """Cost of one probe and of one update without it, in "flops" or "seconds"."""
    step, result = figure(cell, name, key, "mean"), cell["results"].get(name, {})
    if key == "seconds":
        probe = result.get("time", {}).get("probe")
    else:
        probe = max((draw["probe_flops"] for draw in result.get("counts", {}).get("draws", [])), default=None)
    return (probe, step) if probe and step else None


def in_updates(cell: Cell, name: str, key: str) -> float | None:
    """Cost of one probe, in updates."""
    costs = probe_and_step(cell, name, key)
    return costs and costs[0] / costs[1]


def overhead(cell: Cell, name: str, key: str, interval: int = INTERVAL) -> float | None:
    """What probes take of the run."""
    costs = probe_and_step(cell, name, key)
    return costs and costs[0] / (costs[0] + interval * costs[1])


def interval_needed(cell: Cell, name: str, key: str) -> int | None:
    """Updates between probes from which on these take no more than `OVERHEAD` of the run."""
    costs = probe_and_step(cell, name, key)
    return costs and math.ceil(costs[0] / costs[1] * (1 - OVERHEAD) / OVERHEAD - 1e-9)


def state_of(cell: Cell, name: str) -> dict[str, Any] | None:
    """Optimizer state of a contestant that lets layers rest."""
    return cell["results"].get(name, {}).get("counts", {}).get("state") or None


def reaches(cell: Cell) -> list[tuple[str, float | None, float]]:
    """(what, figure, upper bound) of what training a few layers at a time is meant to reach."""
    any_flops, any_seconds = (overhead(cell, "ist any", key) for key in ("flops", "seconds"))
    states = [s for s in (state_of(cell, name) for name in cell["results"]) if s]
    off = max((s["drop"]["bytes"] / s["active"] for s in states), default=None)
    return [
        ("LoRA + IST any ÷ LoRA, bytes kept for backward, peak of the run", ratio(cell, "ist any", "lora", "kept"), 0.85),
        ("LoRA + IST top ÷ LoRA, bytes kept for backward, peak of the run", ratio(cell, "ist top", "lora", "kept"), 0.60),
        ("LoRA + IST top ÷ LoRA, seconds of a step", ratio(cell, "ist top", "lora", "seconds"), 0.70),
        (f"probes of LoRA + IST any every {INTERVAL} updates, share of FLOPs", any_flops, OVERHEAD),
        (f"probes of LoRA + IST any every {INTERVAL} updates, share of seconds", any_seconds, OVERHEAD),
        ('optimizer state under "drop" ÷ that of the active layers', off, 1.0),
    ]  # fmt: skip


def table(cell: Cell) -> str:
    """Markdown: a table against LoRA, one with checkpointing, probes, optimizer state, and what is reached."""
    plain, again = ([name for name in cell["results"] if name in group] for group in (PLAIN, RECOMPUTED))
    lines = [f"### {title(cell['task'])}\n", *_costs(cell, plain, ["lora"])]
    if again:
        lines += [
            "",
            "With gradient checkpointing (not reentrant); what it recomputes in the backward pass is in the peak memory only:\n",
            *_costs(cell, again, [RECOMPUTED[0], "lora"]),
        ]
    lines += [*_probes(cell), *_states(cell, plain)]
    return "\n".join([*lines, "", *(reached(*row) for row in reaches(cell))]) + "\n"


def _costs(cell: Cell, names: list[str], rivals: list[str]) -> list[str]:
    """A table of costs, each with its ratio to the rivals in turn."""
    columns = [
        ("GFLOP, mean", "flops", "mean", 1e9, ".1f"),
        ("GFLOP, peak", "flops", "peak", 1e9, ".1f"),
        ("kept for backward MB, mean", "kept", "mean", 1e6, ".0f"),
        ("kept for backward MB, peak", "kept", "peak", 1e6, ".0f"),
        ("of it in the layers MB, peak", "kept_in_layers", "peak", 1e6, ".0f"),
        ("peak memory above the model MB", "above", "peak", 1e6, ".0f"),
        ("step s", "seconds", "mean", 1.0, ".3f"),
    ]
    over = [f"÷ {LABELS[rival]}" for rival in rivals]
    head = " | ".join(["trainable", *(text for column in columns for text in (column[0], *over))])
    rows = []
    for name in names:
        result = cell["results"][name]
        cells = [result["label"], show(result.get("counts", {}).get("trainable"), ",")]
        for _, key, kind, unit, form in columns:
            value = figure(cell, name, key, kind)
            out = any("oom" in part for part in result.values() if isinstance(part, dict)) and value is None
            cells += ["OOM" if out else show(value and value / unit, form)]
            cells += [show(ratio(cell, name, rival, key, kind), ".2f") for rival in rivals]
        rows.append(cells)
    return markdown(f"| | {head} |", rows)


def _probes(cell: Cell) -> list[str]:
    """What probes cost those that make any."""
    names = [name for name in cell["results"] if probe_and_step(cell, name, "flops")]
    if not names:
        return []
    head = (
        f"| | one probe, in updates: FLOPs | seconds | share at interval {INTERVAL}: FLOPs | seconds | "
        f"interval for {OVERHEAD:.0%}: FLOPs | seconds |"
    )
    columns = ((in_updates, ".2f"), (overhead, ".1%"), (interval_needed, "d"))
    rows = (
        [LABELS[name], *(show(what(cell, name, key), form) for what, form in columns for key in ("flops", "seconds"))]
        for name in names
    )
    about = f"Probes, {IST().candidates} candidates on a quarter of an update's rows, as a share of the run:\n"
    return ["", about, *markdown(head, rows)]


def _states(cell: Cell, names: list[str]) -> list[str]:
    """Optimizer state of those that let layers rest."""
    rows = []
    for name in names:
        if (state := state_of(cell, name)) is not None:
            every = state["keep"]["every"]
            sizes = (state["active"], state["keep"]["bytes"], state["drop"]["bytes"])
            shares = (x for size in sizes for x in (f"{size / 1e6:.2f}", f"{size / every:.3f}"))
            rows.append([LABELS[name], f"{every / 1e6:.2f}", *shares, "yes" if state["drop"]["exact"] else "NO"])
    head = "| | all layers MB | active layers MB | share | keep MB | share | drop MB | share | drop = active, each update |"
    return ["", "Optimizer state, at its fullest in the run:\n", *markdown(head, rows)] if rows else []


def title(task: Task) -> str:
    """A cell in words."""
    return f"{cells.title(task)}, LoRA r = {task['rank']}"


def draw(cell: Cell, path: Path) -> None:
    """Bars of means with a mark at the peak: bytes kept, peak memory, FLOPs and seconds."""
    names = list(cell["results"])[::-1]
    labels = [LABELS[name] for name in names]
    kinds = [
        ("kept", 1e6, "MB kept for backward", pictures.RED),
        ("above", 1e6, "peak memory above the model, MB", pictures.PURPLE),
        ("flops", 1e9, "GFLOP per update", pictures.BLUE),
        ("seconds", 1.0, "seconds per update", pictures.CYAN),
    ]
    with pictures.panels(path, 1, 4, figsize=(15, 0.4 * len(names) + 1.7), sharey=True) as (panels, all_axes):
        for axes, (key, unit, label, colour) in zip(all_axes, kinds, strict=True):
            means = [(figure(cell, name, key, "mean") or 0.0) / unit for name in names]
            peaks = [(figure(cell, name, key, "peak") or 0.0) / unit for name in names]
            axes.barh(labels, means, color=colour)
            for row, (mean, highest) in enumerate(zip(means, peaks, strict=True)):
                if highest > mean:
                    axes.plot([mean, highest], [row, row], color="#444444", linewidth=1)
                    axes.plot([highest, highest], [row - 0.3, row + 0.3], color="#444444", linewidth=1.6)
            form = ".2f" if key == "seconds" else ".0f"
            pictures.beside(axes, labels, peaks, [f" {peak:{form}}" if peak else "" for peak in peaks], room=1.18)
            axes.set_xlabel(label)
        panels.suptitle(f"{title(cell['task'])}: mean of the run (bar) and its peak (mark, number)", fontsize=11)
