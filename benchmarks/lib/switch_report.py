"""Results of `switch.py`: ratios to merging a LoRA, what they are meant to reach, tables, a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lib import pictures
from lib.cells import Cell
from lib.tables import table as markdown


def times_faster(cell: Cell, key: str, what: str) -> float:
    """How many times as fast as the quickest way to merge a LoRA; fastest turns."""
    results = cell["results"]
    rival = min(results[name][f"fastest {what}"] for name in ("addmm", "blocks") if name in results)
    return rival / results[key][f"fastest {what}"]


def _digits(ratio: float) -> str:
    """Two digits, or all before the point."""
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.2g}"


def table(cell: Cell) -> str:
    """Markdown: medians, ratios of the fastest turns, and what is left of the base."""
    rows = []
    for key, result in cell["results"].items():
        pairs = ((f"{result[what]:.3f}", _digits(times_faster(cell, key, what))) for what in ("on", "switch"))
        changed = f"{result['changed']:.2%}" if result["changed"] else "none"
        rows.append([result["label"], *(text for pair in pairs for text in pair), changed])
    head = "| | on ms | × LoRA | switch ms | × LoRA | base weights changed in the end |"
    lines = [f"### {cell['title']}\n", *markdown(head, rows)]
    own, turned = (cell["results"].get(key, {}).get("forward") for key in ("scattered", "rows"))
    if own and turned:
        parts = (f"{tokens} token(s) {turned[tokens]:.2f} ms for {own[tokens]:.2f} ms" for tokens in own)
        lines.append(f"\nA product with the weight in rows storage, against its own: {', '.join(parts)}.")
    return "\n".join(lines) + "\n"


def reached(cells: list[Cell]) -> str:
    """What switching is meant to reach, in the cells of columns."""
    lines = []
    for key, bound in (("scattered", 4), ("contiguous", 40)):
        for cell in cells:
            if cell["dim"] and key in cell["results"]:
                on, switch = (times_faster(cell, key, what) for what in ("on", "switch"))
                word = "reached" if min(on, switch) >= bound else "NOT reached"
                lines.append(
                    f"* {cell['name']}: {key} columns ≥ {bound} × LoRA: on {_digits(on)}, switch {_digits(switch)}, {word}"
                )
    return "\n".join(lines) + "\n"


COLOURS = {  # as drawn, from the fastest on
    "contiguous": "#117733",
    "apart": "#55aa55",
    "rows": "#4477aa",
    "scattered": "#22a0cc",
    "single": "#a59b20",
    "memory": "#ee8866",
    "file": "#b58900",
    "blocks": "#000000",
    "addmm": "#777777",
    "index_add": "#ee4455",
    "peft": "#aa3377",
}


def draw(llama: list[Cell], squares: list[Cell], path: Path) -> None:
    """Times as fast as a LoRA at Llama's shapes, and milliseconds over the size of a square weight."""
    with pictures.panels(path, 1, 2, dpi=110, figsize=(14, 5.6), width_ratios=[5, 4]) as (_, (left, right)):
        _dots(left, llama)
        _curves(right, squares)


def _name(key: str, cells: list[Cell]) -> str:
    """A label for rows and columns alike."""
    label = next(cell["results"][key]["label"] for cell in cells if key in cell["results"])
    return label if key in ("rows", "blocks") else label.replace("columns", "rows or columns")


def _dots(axes: Any, cells: list[Cell]) -> None:
    keys = [key for key in COLOURS if any(key in cell["results"] for cell in cells)]
    for bound, text in ((1, "LoRA"), (4, "4 ×"), (40, "40 ×")):
        axes.axvline(bound, color="black", linewidth=1.2 if bound == 1 else 0.8, linestyle="-" if bound == 1 else ":")
        axes.text(bound, -0.75, text, fontsize=8, ha="center")
    for number, (cell, marker) in enumerate(zip(cells, "osD^v", strict=False)):
        rows = [row for row, key in enumerate(keys) if key in cell["results"]]
        ratios = [times_faster(cell, keys[row], "switch") for row in rows]
        shift = 0.13 * (number - (len(cells) - 1) / 2)
        colours = [COLOURS[keys[row]] for row in rows]
        axes.scatter(ratios, [row + shift for row in rows], c=colours, marker=marker, s=34, zorder=3)
        axes.scatter(
            [], [], c="#555555", marker=marker, s=34, label=cell["title"].partition(", LoRA")[0].replace(", bfloat16", "")
        )
    axes.set_xscale("log")
    axes.set_xlim(0.08, 1500)
    axes.set_yticks(range(len(keys)), [_name(key, cells) for key in keys], fontsize=9)
    axes.set_ylim(len(keys) - 0.4, -0.6)
    axes.grid(axis="y", color="#eeeeee", zorder=0)
    axes.set_xlabel("times as fast as the faster LoRA merge (right: faster)")
    axes.set_title("From one adapter to the next, Llama-3-8B's weights, bf16", fontsize=10, pad=20)
    axes.legend(frameon=True, framealpha=1, edgecolor="#dddddd", fontsize=8, loc="upper left")


def _curves(axes: Any, cells: list[Cell]) -> None:
    sizes, keys = [cell["shape"][0] for cell in cells], [key for key in COLOURS if key in cells[0]["results"]]
    last = 0.0
    for key in sorted(keys, key=lambda key: cells[-1]["results"][key]["fastest switch"]):
        values = [cell["results"][key]["fastest switch"] for cell in cells]
        is_lora = key in ("addmm", "blocks")
        axes.plot(sizes, values, "o--" if is_lora else "o-", color=COLOURS[key], linewidth=2.2 if is_lora else 1.5, markersize=4)
        last = max(values[-1], last * 1.35)  # labels one above the other where curves end together
        axes.text(sizes[-1] * 1.08, last, cells[0]["results"][key]["label"], fontsize=8, va="center", color=COLOURS[key])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_xlim(sizes[0] * 0.9, sizes[-1] * 4.2)
    axes.set_xlabel("rows and columns of the weight; 64 columns against a LoRA of rank 32")
    axes.set_ylabel("milliseconds (fastest)")
    axes.set_title("From one adapter to the next, over the size of the weight, bf16", fontsize=10, pad=20)
