"""Cost of a training step: seconds, peak memory and bytes kept for backward, of every way to fine-tune.

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

from pathlib import Path
from typing import Any

import torch

from lib import cells, command_line, pictures
from lib.cells import Cell, Task
from lib.contestants import CONTESTANTS
from lib.machine import device
from lib.models import build
from lib.tables import table as markdown
from lib.turns import Started, measure, parse


def start(task: Task) -> Started:
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


def table(cell: Cell) -> str:
    """Markdown: medians, and ratios to the frozen floor and to LoRA; those of time compare the fastest steps."""
    results = cell["results"]
    head = (
        "| | trainable | forward s | backward s | optimizer s | step s | fastest s | ÷ floor | ÷ LoRA | peak memory GB | "
        "÷ LoRA | kept for backward MB | ÷ LoRA | of it in the layers MB | ÷ LoRA |"
    )
    floor, rival = (results[name] if "seconds" in results.get(name, {}) else None for name in ("floor", "lora"))
    lines = markdown(head, (_figures(result, floor, rival) for result in results.values()))
    return "\n".join([f"### {cells.title(cell['task'])}\n", *lines]) + "\n"


def _figures(result: dict[str, Any], floor: dict[str, Any] | None, rival: dict[str, Any] | None) -> list[str]:
    if "oom" in result:
        return [result["label"], "OOM", *[""] * 13]

    def over(base: dict[str, Any] | None, key: str) -> str:
        return f"{result[key] / base[key]:.2f}" if base else ""

    return [
        result["label"],
        f"{result['trainable']:,}",
        *(f"{result['seconds'][part]:.3f}" for part in (*pictures.PARTS, "total")),
        f"{result['fastest']:.3f}",
        over(floor, "fastest"),
        over(rival, "fastest"),
        f"{result['peak_memory'] / 1e9:.2f}",
        over(rival, "peak_memory"),
        f"{result['kept'] / 1e6:.0f}",
        over(rival, "kept"),
        f"{result['kept_in_layers'] / 1e6:.0f}",
        over(rival, "kept_in_layers"),
    ]


def draw(cell: Cell, path: Path) -> None:
    """Stacked bars of the step's parts, and bytes kept for backward."""
    results = [r for r in cell["results"].values() if "oom" not in r][::-1]
    labels = [result["label"] for result in results]
    with pictures.panels(path, 1, 2, figsize=(11, 0.42 * len(results) + 1.6), sharey=True) as (figure, (left, right)):
        ends = pictures.step_parts(left, labels, [result["seconds"] for result in results], "upper right")
        pictures.beside(left, labels, ends, [f"{end:.2f}" for end in ends], room=1.1)
        pictures.bars(right, labels, [result["kept"] / 1e6 for result in results], ".0f", colour=pictures.RED)
        right.set_xlabel("MB kept for the backward pass")
        figure.suptitle(cells.title(cell["task"]), fontsize=11)


def head() -> str:
    """The first lines of the results."""
    return (
        f"# Cost of a step\n\n`{command_line.command()}` on {device()}. Seconds are medians; their "
        "ratios compare the fastest steps, to which other work on the machine has added least.\n\n"
    )


def main() -> None:
    """Measure, print and write."""
    parser = cells.parser(__doc__, CONTESTANTS)
    parser.add_argument("--rank", type=int, default=8, help="LoRA's rank; the others match its trainable count")
    command_line.add_output(parser, "step")
    arguments = parse(parser, start)

    def cell(task: Task) -> Cell:
        names = arguments.only or [n for n in CONTESTANTS if n != "lora_fp32" or task["dtype"] != "float32"]
        labels = {name: CONTESTANTS[name][0] for name in names}
        return {"task": task, "results": measure(labels, task, arguments.rounds, one_by_one=arguments.one_by_one)}

    cells.run(cells.tasks(arguments, ["rank", "steps"]), cell, cells.Page(head, table, draw), arguments.output)


if __name__ == "__main__":
    main()
