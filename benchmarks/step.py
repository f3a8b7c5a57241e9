"""What a training step costs: seconds, peak memory and bytes kept for backward, of every way to fine-tune.

Each contestant lives in a process of its own, so that its peak memory is its own, and the processes take turns, so that a
noisy machine is equally unkind to all: compare the ratios. Weights are random; a step costs what it would with real ones.
(S2FT reference checklist 21.)

    python benchmarks/step.py                                             # SmolLM2-135M's shape, 4 × 128 tokens, CPU
    python benchmarks/step.py --shape llama-3.2-1b --length 512 --batch 4 --dtype bfloat16
    python benchmarks/step.py --grid llama3 --dtype bfloat16 --one-by-one     # 1B, 3B and 8B, 512 to 4096 tokens
    python benchmarks/step.py --grid figure5 --dtype bfloat16 --one-by-one    # the eight cells of the paper's Figure 5

Shapes that do not fit side by side are run one process after the other (--one-by-one). Who runs out of memory is shown as
OOM. In bfloat16, LoRA is run with factors of that type, the rival of the ratios, and with PEFT's default of fp32 factors.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from contestants import CONTESTANTS, SHAPES, build
from turns import child, device, measure

GRIDS = {
    "figure5": [(shape, t, b) for shape in ("llama-7b", "llama-13b") for t in (512, 1024) for b in (1, 2)],
    "llama3": [
        (shape, t, b)
        for shape in ("llama-3.2-1b", "llama-3.2-3b", "llama-3-8b")
        for t, b in ((512, 1), (512, 8), (2048, 2), (4096, 1))
    ],
}


def start(task: dict[str, Any]) -> tuple[dict[str, Any], Callable[[], dict[str, Any]]]:
    """The contestant's counts, and its turns; two steps are made."""
    from intaglio.runs.meter import peak_memory

    model, batch = build(task)
    step = CONTESTANTS[task["contestant"]][1](model, task["rank"])
    kept = step.bytes_kept(batch)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    step.run(batch)

    def turn() -> dict[str, Any]:
        step.run(batch)  # warm the caches that the others have taken
        times = [step.run(batch) for _ in range(task["steps"])]
        memory, kind = peak_memory()
        return {"times": times, "peak_memory": memory, "memory_kind": kind}

    return {"trainable": step.trainable, **kept}, turn


def table(measured: dict[str, Any]) -> str:
    """Markdown: medians, and ratios to the frozen floor and to LoRA; those of time compare the fastest steps."""
    results, task = measured["results"], measured["task"]
    lines = [
        f"### {task['shape']}, {task['batch']} × {task['length']} tokens, {task['dtype']}\n",
        "| | trainable | forward s | backward s | optimizer s | step s | fastest s | ÷ floor | ÷ LoRA | peak memory GB | "
        "÷ LoRA | kept for backward MB | ÷ LoRA | of it in the layers MB | ÷ LoRA |",
        "|---" + "|---:" * 14 + "|",
    ]
    rival, floor = (results[name] if "seconds" in results.get(name, {}) else None for name in ("lora", "floor"))
    for result in results.values():
        if "oom" in result:
            lines.append(f"| {result['label']} | OOM |" + " |" * 13)
            continue
        seconds = result["seconds"]

        def over(get: Callable[[dict[str, Any]], float], base: dict[str, Any] | None, result: dict[str, Any] = result) -> str:
            return f"{get(result) / get(base):.2f}" if base else ""

        cells = [
            result["label"],
            f"{result['trainable']:,}",
            *(f"{seconds[part]:.3f}" for part in ("forward", "backward", "optimizer", "total")),
            f"{result['fastest']:.3f}",
            over(lambda r: r["fastest"], floor),
            over(lambda r: r["fastest"], rival),
            f"{result['peak_memory'] / 1e9:.2f}",
            over(lambda r: r["peak_memory"], rival),
            f"{result['kept'] / 1e6:.0f}",
            over(lambda r: r["kept"], rival),
            f"{result['kept_in_layers'] / 1e6:.0f}",
            over(lambda r: r["kept_in_layers"], rival),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(measured: dict[str, Any], path: Path) -> None:
    """Stacked bars of the step's parts, and bytes kept for backward."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results, task = [r for r in measured["results"].values() if "oom" not in r][::-1], measured["task"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 0.42 * len(results) + 1.6), sharey=True, layout="constrained")
    labels = [result["label"] for result in results]
    start = [0.0] * len(results)
    for part, colour in (("forward", "#4477aa"), ("backward", "#66ccee"), ("optimizer", "#ccbb44")):
        widths = [result["seconds"][part] for result in results]
        left.barh(labels, widths, left=start, color=colour, label=part)
        start = [a + b for a, b in zip(start, widths, strict=True)]
    for label, total in zip(labels, start, strict=True):
        left.text(total, label, f" {total:.2f}", va="center", fontsize=8)
    left.set_xlim(0, max(start) * 1.1)
    left.set_xlabel("seconds per step (median)")
    left.legend(frameon=False, fontsize=8, loc="upper right")
    kept = [result["kept"] / 1e6 for result in results]
    right.barh(labels, kept, color="#ee6677")
    for label, size in zip(labels, kept, strict=True):
        right.text(size, label, f" {size:.0f}", va="center", fontsize=8)
    right.set_xlim(0, max(kept) * 1.12)
    right.set_xlabel("MB kept for the backward pass")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{task['shape']}, {task['batch']} × {task['length']} tokens, {task['dtype']}", fontsize=11)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--length", type=int, default=128, help="tokens per row")
    parser.add_argument("--batch", type=int, default=4, help="rows")
    parser.add_argument("--grid", choices=GRIDS, help="several cells instead of --shape, --length and --batch")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rank", type=int, default=8, help="LoRA's rank; the others match its trainable count")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, help="contestants; default all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="timed steps per turn")
    parser.add_argument("--one-by-one", action="store_true", help="one process at a time, where memory is short")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/step"), help="name without suffix")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(start, json.loads(arguments.child))
        return
    cells = GRIDS[arguments.grid] if arguments.grid else [(arguments.shape, arguments.length, arguments.batch)]
    common = {"dtype": arguments.dtype, "rank": arguments.rank, "steps": arguments.steps}
    measured = []
    for shape, length, batch in cells:
        task = common | {"shape": shape, "length": length, "batch": batch}
        names = arguments.only or [n for n in CONTESTANTS if n != "lora_fp32" or arguments.dtype != "float32"]
        labels = {name: CONTESTANTS[name][0] for name in names}
        results = measure(labels, task, arguments.rounds, one_by_one=arguments.one_by_one)
        measured.append({"task": task, "results": results})
        print(table(measured[-1]))
        _write(measured, arguments.output)  # after each cell: a long grid may be stopped


def _write(measured: list[dict[str, Any]], output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    head = (
        f"# Cost of a step\n\n`python {' '.join(sys.argv)}` on {device()}. Seconds are medians; their "
        "ratios compare the fastest steps, to which other work on the machine has added least.\n\n"
    )
    output.with_suffix(".json").write_text(json.dumps({"device": device(), "cells": measured}, indent=1) + "\n")
    output.with_suffix(".md").write_text(head + "\n".join(table(cell) for cell in measured))
    for cell in measured:
        task = cell["task"]
        suffix = "" if len(measured) == 1 else f"-{task['shape']}-{task['batch']}x{task['length']}"
        draw(cell, output.with_name(f"{output.name}{suffix}.png"))


if __name__ == "__main__":
    main()
