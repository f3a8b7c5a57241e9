"""What step-by-step unmasking costs: seconds of a step, and peak memory above the weights, against what it replaces.

ID3 looks at every gradient at every step until its budget is spent, so it is measured against the floor of forward and
backward alone, against full AdamW, against the authors' own optimizer and against PEFT's SHiRA with as many trainable
numbers.

    python benchmarks/unmask.py                                       # SmolLM2-135M's shape, 4 × 128 tokens, CPU
    python benchmarks/unmask.py --grid small --dtype float32 bfloat16 --write
    python benchmarks/unmask.py --grid llama3 --dtype bfloat16 --one-by-one --write benchmarks/results/unmask-gpu

Times come from processes that take turns, as in step.py. Memory comes from processes of its own, each alone: what a process
(or a GPU's allocator) holds at its fullest, from attaching the method to its last step, less what it held when the model was
loaded; activations are in it. Loaded here also means that the same method has been run on one layer of that shape, so that
libraries and their buffers are not counted. On a CPU the C library is told to hand every freed tensor back at once, which
makes steps slower and is why those processes are not timed. Shapes that do not fit side by side are run one process after
the other (--one-by-one); who runs out of memory is shown as OOM.

The authors' package is optional: `make selective-parity` installs it, or
`pip install --no-deps --target build/selective selective-optimizers==0.4`; then run with `PYTHONPATH=build/selective`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from contestants import SHAPES, build, size, trainable
from held import EAGER_MALLOC, forget_peak, held, peak, settle
from step import GRIDS as STEP_GRIDS
from turns import child, device, measure
from unmaskers import CONTESTANTS, EPS, EXPONENT, SOON, Running

SMALL = [("llama-73m", 16, 1), ("smollm2-135m", 16, 1), ("smollm2-135m", 128, 4)]  # shape, tokens per row, rows
GRIDS = {"small": SMALL} | STEP_GRIDS
MEMORY_STEPS, MEMORY_TOTAL = 3, 20  # optimizer state exists from the first step on; unmasking is run to its end


def start(task: dict[str, Any]) -> tuple[dict[str, Any], Callable[[], dict[str, Any]]]:
    """A contestant of the kind of measurement that the task names, ready for its turns."""
    return (_start_memory if task["measure"] == "memory" else _start_time)(task)


def _start_time(task: dict[str, Any]) -> tuple[dict[str, Any], Callable[[], dict[str, Any]]]:
    running, batch = _running(task)
    for _ in range(SOON + 1):  # so that `id3_after` is where its name says
        running.step.run(batch)

    def turn() -> dict[str, Any]:
        running.step.run(batch)  # warm the caches that the others have taken
        times = [running.step.run(batch) for _ in range(task["steps"])]
        return {"times": times, "entries": running.entries()}

    return {}, turn


def _start_memory(task: dict[str, Any]) -> tuple[dict[str, Any], Callable[[], dict[str, Any]]]:
    unmasking = task["contestant"] == "id3"
    task = task | {"total": MEMORY_TOTAL} if unmasking else task
    layer = {"num_hidden_layers": 1, "vocab_size": min(2000, SHAPES[task["shape"]]["vocab_size"])}
    _steps(*_running(task | {"changed": layer, "budget": 1000}), count=2)
    settle()
    model, batch = build(task)
    settle()
    before = held()
    forget_peak()

    def turn() -> dict[str, Any]:
        running = CONTESTANTS[task["contestant"]][1](model, task["budget"], task["total"])
        _steps(running, batch, count=MEMORY_TOTAL + 1 if unmasking else MEMORY_STEPS)
        return {"above": peak() - before, "entries": running.entries()}

    weights = sum(parameter.nbytes for parameter in model.parameters())
    return {"loaded": before, "weights": weights, "parameters": size(model)}, turn


def _running(task: dict[str, Any]) -> tuple[Running, dict[str, torch.Tensor]]:
    model, batch = build(task)
    return CONTESTANTS[task["contestant"]][1](model, task["budget"], task["total"]), batch


def _steps(running: Running, batch: dict[str, torch.Tensor], *, count: int) -> None:
    for _ in range(count):
        running.step.run(batch)


def cell(task: dict[str, Any], names: list[str], rounds: int, kinds: list[str], *, one_by_one: bool) -> dict[str, Any]:
    """Both measurements of one shape, batch and type."""
    labels = {name: CONTESTANTS[name][0] for name in names}
    results: dict[str, dict[str, Any]] = {name: {"label": label} for name, label in labels.items()}
    if "memory" in kinds:  # the steps of `id3` go on to the end of unmasking and beyond
        alone = {name: label for name, label in labels.items() if name != "id3_after"}
        for name, result in measure(alone, task | {"measure": "memory"}, 1, one_by_one=True, variables=EAGER_MALLOC).items():
            results[name]["memory"] = result
    if "time" in kinds:
        for name, result in measure(labels, task | {"measure": "time"}, rounds, one_by_one=one_by_one).items():
            results[name]["time"] = result
    return {"task": task, "results": results}


def figure(measured: dict[str, Any], name: str, kind: str, key: str) -> Any:
    """One figure of one contestant; None where it was not measured."""
    return measured["results"].get(name, {}).get(kind, {}).get(key)


def ratio(measured: dict[str, Any], name: str, rival: str, kind: str, key: str) -> float | None:
    """A figure of one contestant over that of another."""
    above, below = (figure(measured, n, kind, key) for n in (name, rival))
    return above / below if above and below else None


def bytes_per_parameter(measured: dict[str, Any], name: str) -> float | None:
    """Peak above the weights."""
    above = figure(measured, name, "memory", "above")
    return None if above is None else above / figure(measured, name, "memory", "parameters")


def selection_pass(measured: dict[str, Any]) -> float | None:
    """What choosing adds to backward, as a share of forward and backward without it; fastest parts."""
    ours, free = (figure(measured, name, "time", "least") for name in ("id3", "freed"))
    return (ours["backward"] - free["backward"]) / (free["forward"] + free["backward"]) if ours and free else None


def reaches(measured: dict[str, Any]) -> list[tuple[str, float | None, str, float]]:
    """(what, figure, bound's sense, bound) of what step-by-step unmasking is meant to reach."""
    task = measured["task"]
    limits = {"llama-73m": 1.2, "smollm2-135m": 2.0}
    rows: list[tuple[str, float | None, str, float]] = []
    if task["dtype"] == "float32" and task["length"] * task["batch"] == 16 and task["shape"] in limits:
        rows.append(("peak above the weights, B per parameter", bytes_per_parameter(measured, "id3"), "≤", limits[task["shape"]]))
    for rival in ("selective", "adamw"):
        label = CONTESTANTS[rival][0]
        rows.append((f"peak above the weights: {label} ÷ ours", ratio(measured, rival, "id3", "memory", "above"), "≥", 4.0))
    rows += [
        ("step while unmasking ÷ full AdamW", ratio(measured, "id3", "adamw", "time", "fastest"), "≤", 1.1),
        ("step after unmasking ÷ full AdamW", ratio(measured, "id3_after", "adamw", "time", "fastest"), "≤", 1.0),
        ("step: selective-optimizers 0.4 ÷ ours", ratio(measured, "selective", "id3", "time", "fastest"), "≥", 1.6),
        ("selection pass, share of forward and backward", selection_pass(measured), "≤", 0.1),
    ]
    return rows


def table(measured: dict[str, Any]) -> str:
    """Markdown: medians of the parts, ratios of the fastest steps, memory, and what is reached."""
    task, results = measured["task"], measured["results"]
    lines = [
        f"### {title(task)}\n",
        "| | entries | forward s | backward s | optimizer s | step s | fastest s | ÷ AdamW | ÷ selective | "
        "peak above the weights MB | B per parameter | ÷ AdamW | ÷ selective |",
        "|---" + "|---:" * 12 + "|",
        *(f"| {' | '.join(_cells(measured, name))} |" for name in results),
        "",
        *(_reached(*row) for row in reaches(measured)),
    ]
    return "\n".join(lines) + "\n"


def title(task: dict[str, Any]) -> str:
    """A cell in words."""
    return f"{task['shape']}, {task['batch']} × {task['length']} tokens, {task['dtype']}, {task['budget']:,} entries"


def _cells(measured: dict[str, Any], name: str) -> list[str]:
    def show(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    def over(rival: str, kind: str, key: str) -> str:
        return show(ratio(measured, name, rival, kind, key), ".2f")

    result = measured["results"][name]
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
    cells += [show(above and above / 1e6, ".0f"), show(bytes_per_parameter(measured, name), ".2f")]
    return [*cells, over("adamw", "memory", "above"), over("selective", "memory", "above")]


def _reached(what: str, value: float | None, sense: str, bound: float) -> str:
    if value is None:
        return f"* {what} {sense} {bound:g}: not measured"
    reached = value <= bound if sense == "≤" else value >= bound
    return f"* {what} {sense} {bound:g}: **{value:.3g}**, {'reached' if reached else 'NOT reached'}"


def draw(measured: dict[str, Any], path: Path) -> None:
    """Stacked bars of the step's parts, and the peak above the weights."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = list(measured["results"].items())[::-1]
    labels = [result["label"] for _, result in results]
    panels, (left, right) = plt.subplots(1, 2, figsize=(11, 0.42 * len(results) + 1.6), sharey=True, layout="constrained")
    begin = [0.0] * len(results)
    for part, colour in (("forward", "#4477aa"), ("backward", "#66ccee"), ("optimizer", "#ccbb44")):
        widths = [(figure(measured, name, "time", "seconds") or {}).get(part, 0.0) for name, _ in results]
        left.barh(labels, widths, left=begin, color=colour, label=part)
        begin = [a + b for a, b in zip(begin, widths, strict=True)]
    above = [bytes_per_parameter(measured, name) or 0.0 for name, _ in results]
    right.barh(labels, above, color="#ee6677")
    for axes, widths, kind in ((left, begin, "time"), (right, above, "memory")):
        for (_, result), width in zip(results, widths, strict=True):
            text = "OOM" if "oom" in result.get(kind, {}) else f"{width:.2f}" if width else ""
            axes.text(width, result["label"], f" {text}", va="center", fontsize=8)
        axes.set_xlim(0, (max(widths) or 1.0) * 1.12)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_xlabel("seconds per step (median)")
    left.legend(frameon=False, fontsize=8, loc="lower right")
    right.set_xlabel("peak above the weights, bytes per parameter")
    panels.suptitle(title(measured["task"]), fontsize=11)
    panels.savefig(path, dpi=120)
    plt.close(panels)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--length", type=int, default=128, help="tokens per row")
    parser.add_argument("--batch", type=int, default=4, help="rows")
    parser.add_argument("--grid", choices=GRIDS, help="several cells instead of --shape, --length and --batch")
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    parser.add_argument("--budget", type=int, help="entries to train; default: SHiRA's of rank 1, about 0.2 %%")
    parser.add_argument("--total", type=int, default=300, help="steps over which the budget is granted")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, help="contestants; default all")
    parser.add_argument("--measure", nargs="+", choices=["memory", "time"], default=["memory", "time"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="timed steps per turn")
    parser.add_argument("--one-by-one", action="store_true", help="one timed process at a time, where memory is short")
    parser.add_argument(
        "--write", nargs="?", type=Path, const=Path("benchmarks/results/unmask"), help="also write files of this name"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(start, json.loads(arguments.child))
        return
    if arguments.rounds * (arguments.steps + 1) + SOON + 1 > arguments.total:
        parser.error(f"--total {arguments.total}: fewer steps than are timed; unmasking would be over")
    _run(arguments)


def _run(arguments: argparse.Namespace) -> None:
    names, note = list(arguments.only or CONTESTANTS), ""
    if "selective" in names and importlib.util.find_spec("selective_optimizers") is None:
        names.remove("selective")
        note = "selective-optimizers is not installed and left out; how to install it: the head of `benchmarks/unmask.py`.\n"
        print(note, file=sys.stderr)
    cells = GRIDS[arguments.grid] if arguments.grid else [(arguments.shape, arguments.length, arguments.batch)]
    measured = []
    for dtype in arguments.dtype:
        for shape, length, batch in cells:
            task = {"shape": shape, "length": length, "batch": batch, "dtype": dtype, "steps": arguments.steps}
            task |= {"budget": arguments.budget or _default_budget(shape), "total": arguments.total}
            measured.append(cell(task, names, arguments.rounds, arguments.measure, one_by_one=arguments.one_by_one))
            print(table(measured[-1]), flush=True)
            if arguments.write:
                _write(measured, arguments.write, note)  # after each cell: a long grid may be stopped


def _default_budget(shape: str) -> int:
    """As many entries as SHiRA of rank 1 has, so that the two agree exactly."""
    import transformers

    with torch.device("meta"):
        return trainable(transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SHAPES[shape])), 1)


def _write(measured: list[dict[str, Any]], output: Path, note: str) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    task = measured[0]["task"]
    head = (
        f"# Cost of step-by-step unmasking\n\n`python {' '.join(sys.argv)}` on {device()}. Seconds are medians; their "
        "ratios, and the selection pass, compare the fastest steps and parts, to which other work on the machine has added "
        f"least. Peaks count from the loaded model, activations included. ID3 has exponent {EXPONENT:g} and eps {EPS:g} and "
        f"grants its budget over {task['total']} steps; its peak is that of a whole run of {MEMORY_TOTAL} steps and one more. "
        f"Entries are those at the end of the timed steps.\n\n{note}\n"
    )
    output.with_suffix(".json").write_text(json.dumps({"device": device(), "cells": measured}, indent=1) + "\n")
    output.with_suffix(".md").write_text(head + "\n".join(table(c) for c in measured))
    for c in measured:
        t = c["task"]
        suffix = "" if len(measured) == 1 else f"-{t['shape']}-{t['batch']}x{t['length']}-{t['dtype']}"
        draw(c, output.with_name(f"{output.name}{suffix}.png"))


if __name__ == "__main__":
    main()
