"""Savings of training a few layers at a time: memory, arithmetic and seconds of LoRA, IST, RST, LISA and S2FT.

Which layers train is drawn anew before every update, so the figures are over a run of draws: a run needs what its worst
update needs (the peak), and costs what its updates cost on average (the mean). One update with layer 0 among those that
train is added to the peaks, where the scheme can draw it: any long run comes to it.

    python benchmarks/layers.py                                             # SmolLM2-135M's shape, 4 × 128 tokens
    python benchmarks/layers.py --length 64 --write
    python benchmarks/layers.py --grid llama3 --dtype bfloat16 --one-by-one --write benchmarks/results/layers-gpu

Two measurements, in processes of their own (--measure). "counts": bytes kept for backward, FLOPs and optimizer state (when idle
layers keep or drop it), the same in every run; and what the process or the GPU's allocator holds at its fullest above the
loaded model, taken as in unmask.py. "time": seconds, of contestants that take turns over the same draws. What is not measured
now is taken from the written file, where it has it: `--measure time --write` takes the times anew. Probes are made of a quarter
of an update's rows, as `ISTCallback` and run files make them. A GPU is used where there is one (--device).
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from lib import cells, command_line, layers_report, results
from lib.cells import Cell, Task
from lib.layers_report import INTERVAL
from lib.machine import EAGER_MALLOC, device, forget_peak, held, peak, settle
from lib.models import SHAPES, build
from lib.rotators import DROPOUT, LABELS, PLAIN, RECOMPUTED, Running
from lib.turns import Started, measure, parse

KINDS = ("counts", "time")


def start(task: Task) -> Started:
    """A contestant of the kind of measurement that the task names, ready for its turns."""
    return (_start_counts if task["measure"] == "counts" else _start_time)(task)


def _running(task: Task, **kwargs: Any) -> tuple[Running, dict[str, torch.Tensor]]:
    model, batch = build(task)
    return Running(task["contestant"], model, batch, task["rank"], **kwargs), batch


def _nothing() -> dict[str, Any]:
    return {}


def _start_counts(task: Task) -> Started:
    """Bytes and FLOPs of each update of a run, then of one in which layer 0 trains; optimizer state in runs of their own."""
    _warm(task)
    model, batch = build(task)
    settle()
    before = held()
    forget_peak()
    running = Running(task["contestant"], model, batch, task["rank"])
    optimizer = running.step.optimizer
    assert optimizer is not None

    def update() -> dict[str, Any]:
        found: dict[str, Any] = {"active": running.active}
        with FlopCounterMode(display=False) as counter:
            found |= running.step.bytes_kept(batch, keep_gradients=True)
        with FlopCounterMode(display=False) as probing:  # an optimizer multiplies no matrices: what is seen here is a probe
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return found | {"flops": counter.get_total_flops(), "probe_flops": probing.get_total_flops()}

    count = task["draws"] if running.rotation else 2
    for _ in range(count):
        running.step.run(batch)
    if running.with_first_layer():
        running.step.run(batch)
    above = peak() - before  # before FLOPs are counted: the counter keeps what checkpointing would free
    running.restart()
    draws = [update() for _ in range(count)]
    deepest = update() if running.with_first_layer() else None
    counted = {"trainable": running.step.trainable, "draws": draws, "deepest": deepest, "above": above}
    resting = task["contestant"] in PLAIN and running.rotation is not None
    return counted | {"state": _state(task) if resting else None}, _nothing


def _warm(task: Task) -> None:
    """Run the contestant on a small model, so that libraries and their buffers are there."""
    small = {"num_hidden_layers": 2, "vocab_size": min(2000, SHAPES[task["shape"]]["vocab_size"])}
    warm, batch = _running(task | {"changed": small})
    for _ in range(2):
        warm.step.run(batch)
    del warm
    settle()


def _state(task: Task) -> dict[str, Any]:
    """Bytes of optimizer state in a run of draws; tokens do not matter to it."""
    found: dict[str, Any] = {}
    for policy in ("keep", "drop"):
        seen: list[tuple[int, int]] = []
        running, batch = _running(
            task | {"batch": 1, "length": 8},
            changed={"state": policy, "interval": task["draws"] + 1},
            seen=lambda optimizer, seen=seen: seen.append(_state_bytes(optimizer)),
        )
        for _ in range(task["draws"]):
            running.step.run(batch)
        assert running.step.optimizer is not None
        every = sum(2 * p.nbytes for group in running.step.optimizer.param_groups for p in group["params"])
        found[policy] = {"bytes": max(held for held, _ in seen), "exact": all(a == b for a, b in seen), "every": every}
        found["active"] = max(wanted for _, wanted in seen)
    return found


def _state_bytes(optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """Bytes of Adam's two moments, and what those of the parameters that have just got a gradient take."""
    moments = sum(x.nbytes for s in optimizer.state.values() for x in s.values() if isinstance(x, torch.Tensor) and x.dim() > 0)
    trained = (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None)
    return moments, sum(2 * p.nbytes for p in trained)


def _start_time(task: Task) -> Started:
    """Turns over the same draws; a probe at the end of each, taken by itself."""
    steps = task["steps"]
    running, batch = _running(task, changed={"interval": steps + 1})
    least, probes = [math.inf] * steps, []

    def turn() -> dict[str, Any]:
        running.restart()
        running.step.run(batch)  # warm the caches that the others have taken
        before = running.rotation.seconds if running.rotation else 0.0
        times = [running.step.run(batch) for _ in range(steps)]
        probe = running.rotation.seconds - before if running.rotation else 0.0
        times[-1]["optimizer"] -= probe
        times[-1]["total"] -= probe
        least[:] = [min(old, new["total"]) for old, new in zip(least, times, strict=True)]
        probes.append(probe)
        return {"times": times, "mean_of_least": statistics.fmean(least), "probe": min(probes)}

    return {}, turn


def cell(task: Task, arguments: argparse.Namespace) -> Cell:
    """The measurements of one shape, batch and type; of others, what the written file holds."""
    names = arguments.only or list(LABELS)
    fresh: dict[str, dict[str, Any]] = {name: {} for name in names}
    for kind in arguments.measure:
        timed = kind == "time"
        for group in filter(None, ([n for n in names if n in group] for group in ((PLAIN, RECOMPUTED) if timed else (LABELS,)))):
            found = measure(
                {name: LABELS[name] for name in group},
                task | {"measure": kind},
                arguments.rounds if timed else 0,
                one_by_one=arguments.one_by_one or not timed,
                variables={} if timed else EAGER_MALLOC,
            )
            for name, result in found.items():
                fresh[name][kind] = result
    earlier = results.read(arguments.write).get("cells", [])  # now, so that several may write
    same = next((c["results"] for c in earlier if _subject(c["task"]) == _subject(task)), {})
    known = [name for name in LABELS if name in same or name in fresh]
    merged = {name: {"label": LABELS[name]} | same.get(name, {}) | fresh.get(name, {}) for name in known}
    return {"task": task, "results": merged}


def _subject(task: Task) -> list[Any]:
    return [task[key] for key in ("shape", "length", "batch", "dtype", "rank", "draws")]


def commands(output: Path | None) -> list[str]:
    """The commands that have led to the written file, and this one."""
    return list(dict.fromkeys([*results.read(output).get("commands", []), command_line.command()]))


def head(arguments: argparse.Namespace) -> str:
    """The first lines of the results."""
    how = "".join(f"    {command}\n" for command in commands(arguments.write))
    return (
        f"# Cost of training a few layers at a time\n\n{how}\nOn {device()}. LoRA is on all linear layers "
        f"with dropout {DROPOUT:g}; IST and RST train a quarter of the layers. Means are over a run of {arguments.draws} draws; "
        "peaks are over the same run and an update in which layer 0 trains. Bytes kept for backward are storages that autograd "
        "saves, each once, without weights. Peak memory counts from the loaded model, optimizer state (\"keep\") and probes "
        "included. Seconds are means over the draws of the fastest of the turns, probes not included.\n\n"
    )  # fmt: skip


def main() -> None:
    """Measure, print and write."""
    parser = cells.parser(__doc__, LABELS)
    parser.set_defaults(steps=4)  # the same draws in every turn
    parser.add_argument("--rank", type=int, default=8, help="LoRA's rank; S2FT matches its trainable count")
    parser.add_argument("--draws", type=int, default=12, help="updates of a run that is counted")
    parser.add_argument("--measure", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: a GPU if there is one")
    command_line.add_write(parser, "layers")
    arguments = parse(parser, start)
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the children's too
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU; use --device cpu, or install a build of torch for CUDA")
    if arguments.draws < INTERVAL:
        parser.error(f"--draws {arguments.draws}: no probe would be counted; give at least {INTERVAL}")
    page = cells.Page(
        lambda: head(arguments),
        layers_report.table,
        layers_report.draw,
        lambda: {"commands": commands(arguments.write)},
    )
    tasks = cells.tasks(arguments, ["rank", "draws", "steps"])
    cells.run(tasks, lambda task: cell(task, arguments), page, arguments.write)


if __name__ == "__main__":
    main()
