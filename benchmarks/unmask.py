"""Cost of step-by-step unmasking: seconds of a step, and peak memory above the weights, against what it replaces.

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
import sys
from typing import Any

import torch

from lib import cells, command_line, unmask_report
from lib.cells import Cell, Task
from lib.contestants import trainable
from lib.machine import EAGER_MALLOC, device, forget_peak, held, peak, settle
from lib.models import SHAPES, build, size
from lib.turns import Started, measure, parse
from lib.unmaskers import CONTESTANTS, EPS, EXPONENT, SOON, Running

MEMORY_STEPS, MEMORY_TOTAL = 3, 20  # optimizer state exists from the first step on; unmasking is run to its end


def start(task: Task) -> Started:
    """A contestant of the kind of measurement that the task names, ready for its turns."""
    return (_start_memory if task["measure"] == "memory" else _start_time)(task)


def _start_time(task: Task) -> Started:
    running, batch = _running(task)
    for _ in range(SOON + 1):  # so that `id3_after` is where its name says
        running.step.run(batch)

    def turn() -> dict[str, Any]:
        running.step.run(batch)  # warm the caches that the others have taken
        times = [running.step.run(batch) for _ in range(task["steps"])]
        return {"times": times, "entries": running.entries()}

    return {}, turn


def _start_memory(task: Task) -> Started:
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


def _running(task: Task) -> tuple[Running, dict[str, torch.Tensor]]:
    model, batch = build(task)
    return CONTESTANTS[task["contestant"]][1](model, task["budget"], task["total"]), batch


def _steps(running: Running, batch: dict[str, torch.Tensor], *, count: int) -> None:
    for _ in range(count):
        running.step.run(batch)


def cell(task: Task, names: list[str], rounds: int, kinds: list[str], *, one_by_one: bool) -> Cell:
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


def head(arguments: argparse.Namespace, note: str) -> str:
    """The first lines of the results."""
    return (
        f"# Cost of step-by-step unmasking\n\n`{command_line.command()}` on {device()}. Seconds are medians; their "
        "ratios, and the selection pass, compare the fastest steps and parts, to which other work on the machine has added "
        f"least. Peaks count from the loaded model, activations included. ID3 has exponent {EXPONENT:g} and eps {EPS:g} and "
        f"grants its budget over {arguments.total} steps; its peak is that of a whole run of {MEMORY_TOTAL} steps and one more. "
        f"Entries are those at the end of the timed steps.\n\n{note}\n"
    )


def main() -> None:
    """Measure, print and write."""
    parser = cells.parser(__doc__, CONTESTANTS)
    parser.add_argument("--budget", type=int, help="entries to train; default: SHiRA's of rank 1, about 0.2 %%")
    parser.add_argument("--total", type=int, default=300, help="steps over which the budget is granted")
    parser.add_argument("--measure", nargs="+", choices=["memory", "time"], default=["memory", "time"])
    command_line.add_write(parser, "unmask")
    arguments = parse(parser, start)
    if arguments.rounds * (arguments.steps + 1) + SOON + 1 > arguments.total:
        parser.error(f"--total {arguments.total}: fewer steps than are timed; unmasking would be over")
    names, note = list(arguments.only or CONTESTANTS), ""
    if "selective" in names and importlib.util.find_spec("selective_optimizers") is None:
        names.remove("selective")
        note = "selective-optimizers is not installed and left out; how to install it: the head of `benchmarks/unmask.py`.\n"
        print(note, file=sys.stderr)

    def measured(task: Task) -> Cell:
        task = task | {"budget": arguments.budget or _default_budget(task["shape"])}
        return cell(task, names, arguments.rounds, arguments.measure, one_by_one=arguments.one_by_one)

    page = cells.Page(lambda: head(arguments, note), unmask_report.table, unmask_report.draw)
    cells.run(cells.tasks(arguments, ["steps", "total"]), measured, page, arguments.write)


def _default_budget(shape: str) -> int:
    """As many entries as SHiRA of rank 1 has, so that the two agree exactly."""
    import transformers

    with torch.device("meta"):
        return trainable(transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SHAPES[shape])), 1)


if __name__ == "__main__":
    main()
