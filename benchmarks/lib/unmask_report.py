"""Results of `unmask.py`: the figures that follow from what was measured, what they are meant to reach, a table, a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lib import cells, pictures
from lib.cells import Cell, Task
from lib.tables import reached, show
from lib.tables import table as markdown
from lib.unmaskers import CONTESTANTS


def figure(cell: Cell, name: str, kind: str, key: str) -> Any:
    """One figure of one contestant; None where it was not measured."""
    return cell["results"].get(name, {}).get(kind, {}).get(key)


def ratio(cell: Cell, name: str, rival: str, kind: str, key: str) -> float | None:
    """A figure of one contestant over that of another."""
    above, below = (figure(cell, n, kind, key) for n in (name, rival))
    return above / below if above and below else None


def bytes_per_parameter(cell: Cell, name: str) -> float | None:
    """Peak above the weights."""
    above = figure(cell, name, "memory", "above")
    return None if above is None else above / figure(cell, name, "memory", "parameters")


def selection_pass(cell: Cell) -> float | None:
    """What choosing adds to backward, as a share of forward and backward without it; fastest parts."""
    ours, free = (figure(cell, name, "time", "least") for name in ("id3", "freed"))
    return (ours["backward"] - free["backward"]) / (free["forward"] + free["backward"]) if ours and free else None


def reaches(cell: Cell) -> list[tuple[str, float | None, float, str]]:
    """(what, figure, bound, its sense) of what step-by-step unmasking is meant to reach."""
    task = cell["task"]
    limits = {"llama-73m": 1.2, "smollm2-135m": 2.0}
    rows: list[tuple[str, float | None, float, str]] = []
    if task["dtype"] == "float32" and task["length"] * task["batch"] == 16 and task["shape"] in limits:
        rows.append(("peak above the weights, B per parameter", bytes_per_parameter(cell, "id3"), limits[task["shape"]], "≤"))
    for rival in ("selective", "adamw"):
        label = CONTESTANTS[rival][0]
        rows.append((f"peak above the weights: {label} ÷ ours", ratio(cell, rival, "id3", "memory", "above"), 4.0, "≥"))
    rows += [
        ("step while unmasking ÷ full AdamW", ratio(cell, "id3", "adamw", "time", "fastest"), 1.1, "≤"),
        ("step after unmasking ÷ full AdamW", ratio(cell, "id3_after", "adamw", "time", "fastest"), 1.0, "≤"),
        ("step: selective-optimizers 0.4 ÷ ours", ratio(cell, "selective", "id3", "time", "fastest"), 1.6, "≥"),
        ("selection pass, share of forward and backward", selection_pass(cell), 0.1, "≤"),
    ]
    return rows


def table(cell: Cell) -> str:
    """Markdown: medians of the parts, ratios of the fastest steps, memory, and what is reached."""
    head = (
        "| | entries | forward s | backward s | optimizer s | step s | fastest s | ÷ AdamW | ÷ selective | "
        "peak above the weights MB | B per parameter | ÷ AdamW | ÷ selective |"
    )
    lines = markdown(head, (_cells(cell, name) for name in cell["results"]))
    verdicts = (reached(*row) for row in reaches(cell))
    return "\n".join([f"### {title(cell['task'])}\n", *lines, "", *verdicts]) + "\n"


def title(task: Task) -> str:
    """A cell in words."""
    return f"{cells.title(task)}, {task['budget']:,} entries"


def _cells(cell: Cell, name: str) -> list[str]:
    def over(rival: str, kind: str, key: str) -> str:
        return show(ratio(cell, name, rival, kind, key), ".2f")

    result = cell["results"][name]
    time, memory = result.get("time", {}), result.get("memory", {})
    entries = time.get("entries", memory.get("entries"))
    cells = [result["label"], show(entries, ",")]
    if "oom" in time:
        cells += ["OOM"] + [""] * 6
    else:
        parts = time.get("seconds", {})
        cells += [show(parts.get(part), ".3f") for part in ("forward", "backward", "optimizer", "total")]
        cells += [show(time.get("fastest"), ".3f"), over("adamw", "time", "fastest"), over("selective", "time", "fastest")]
    if "oom" in memory:
        return [*cells, "OOM", "", "", ""]
    above = memory.get("above")
    cells += [show(above and above / 1e6, ".0f"), show(bytes_per_parameter(cell, name), ".2f")]
    return [*cells, over("adamw", "memory", "above"), over("selective", "memory", "above")]


def draw(cell: Cell, path: Path) -> None:
    """Stacked bars of the step's parts, and the peak above the weights."""
    results = list(cell["results"].items())[::-1]
    labels = [result["label"] for _, result in results]
    with pictures.panels(path, 1, 2, figsize=(11, 0.42 * len(results) + 1.6), sharey=True) as (panels, (left, right)):
        seconds = [figure(cell, name, "time", "seconds") or {} for name, _ in results]
        ends = pictures.step_parts(left, labels, seconds, "lower right")
        above = [bytes_per_parameter(cell, name) or 0.0 for name, _ in results]
        right.barh(labels, above, color=pictures.RED)
        for axes, widths, kind in ((left, ends, "time"), (right, above, "memory")):
            out = ["oom" in result.get(kind, {}) for _, result in results]
            texts = ["OOM" if oom else f"{width:.2f}" if width else "" for oom, width in zip(out, widths, strict=True)]
            pictures.beside(axes, labels, widths, texts)
        right.set_xlabel("peak above the weights, bytes per parameter")
        panels.suptitle(title(cell["task"]), fontsize=11)
