"""What training a few layers at a time saves: memory, arithmetic and seconds of LoRA, IST, RST, LISA and S2FT.

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
import json
import math
import os
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from contestants import SHAPES, build
from held import EAGER_MALLOC, forget_peak, held, peak, settle
from intaglio import IST
from rotators import DROPOUT, LABELS, PLAIN, RECOMPUTED, Running
from step import GRIDS
from turns import child, device, measure

INTERVAL = IST().interval
KINDS = ("counts", "time")
OVERHEAD = 0.05  # what probes may take of a run
Start = tuple[dict[str, Any], Callable[[], dict[str, Any]]]


def start(task: dict[str, Any]) -> Start:
    """A contestant of the kind of measurement that the task names, ready for its turns."""
    return (_start_counts if task["measure"] == "counts" else _start_time)(task)


def _running(task: dict[str, Any], **kwargs: Any) -> tuple[Running, dict[str, torch.Tensor]]:
    model, batch = build(task)
    return Running(task["contestant"], model, batch, task["rank"], **kwargs), batch


def _nothing() -> dict[str, Any]:
    return {}


def _start_counts(task: dict[str, Any]) -> Start:
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


def _warm(task: dict[str, Any]) -> None:
    """Run the contestant on a small model, so that libraries and their buffers are there."""
    small = {"num_hidden_layers": 2, "vocab_size": min(2000, SHAPES[task["shape"]]["vocab_size"])}
    warm, batch = _running(task | {"changed": small})
    for _ in range(2):
        warm.step.run(batch)
    del warm
    settle()


def _state(task: dict[str, Any]) -> dict[str, Any]:
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


def _start_time(task: dict[str, Any]) -> Start:
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


def cell(task: dict[str, Any], names: list[str], rounds: int, kinds: list[str], output: Path | None) -> dict[str, Any]:
    """The measurements of one shape, batch and type; of others, what `output` holds."""
    fresh: dict[str, dict[str, Any]] = {name: {} for name in names}
    for kind in kinds:
        groups = [[n for n in names if n in group] for group in (PLAIN, RECOMPUTED)] if kind == "time" else [names]
        for group in filter(None, groups):
            labels = {name: LABELS[name] for name in group}
            timed = kind == "time"
            turns, variables = (rounds, {}) if timed else (0, EAGER_MALLOC)
            one_by_one = task["one_by_one"] or not timed
            found = measure(labels, task | {"measure": kind}, turns, one_by_one=one_by_one, variables=variables)
            for name, result in found.items():
                fresh[name][kind] = result
    earlier = _read(output)["cells"]  # now, so that several may write
    same = next((c["results"] for c in earlier if _subject(c["task"]) == _subject(task)), {})
    known = [name for name in LABELS if name in same or name in fresh]
    results = {name: {"label": LABELS[name]} | same.get(name, {}) | fresh.get(name, {}) for name in known}
    return {"task": task, "results": results}


def _subject(task: Mapping[str, Any]) -> list[Any]:
    return [task[key] for key in ("shape", "length", "batch", "dtype", "rank", "draws")]


def figure(measured: Mapping[str, Any], name: str, key: str, over: str = "peak") -> float | None:
    """One figure of one contestant over its run, None where it was not measured.

    Args:
        measured: a cell.
        name: of the contestant.
        key: "kept", "kept_in_layers", "flops", "above" or "seconds".
        over: "peak" or "mean" of the run's updates.
    """
    result = measured["results"].get(name, {})
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


def ratio(measured: Mapping[str, Any], name: str, rival: str, key: str, over: str = "peak") -> float | None:
    """A figure of one contestant over that of another."""
    above, below = (figure(measured, n, key, over) for n in (name, rival))
    return above / below if above and below else None


def probe_and_step(measured: Mapping[str, Any], name: str, key: str) -> tuple[float, float] | None:
    """Cost of one probe and of one update without it, in "flops" or "seconds"."""
    step, result = figure(measured, name, key, "mean"), measured["results"].get(name, {})
    if key == "seconds":
        probe = result.get("time", {}).get("probe")
    else:
        probe = max((draw["probe_flops"] for draw in result.get("counts", {}).get("draws", [])), default=None)
    return (probe, step) if probe and step else None


def overhead(measured: Mapping[str, Any], name: str, key: str, interval: int = INTERVAL) -> float | None:
    """What probes take of the run."""
    costs = probe_and_step(measured, name, key)
    return costs and costs[0] / (costs[0] + interval * costs[1])


def interval_needed(measured: Mapping[str, Any], name: str, key: str) -> int | None:
    """Updates between probes from which on these take no more than `OVERHEAD` of the run."""
    costs = probe_and_step(measured, name, key)
    return costs and math.ceil(costs[0] / costs[1] * (1 - OVERHEAD) / OVERHEAD - 1e-9)


def state_of(measured: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """Optimizer state of a contestant that lets layers rest."""
    return measured["results"].get(name, {}).get("counts", {}).get("state") or None


def reaches(measured: Mapping[str, Any]) -> list[tuple[str, float | None, float]]:
    """(what, figure, upper bound) of what training a few layers at a time is meant to reach."""
    any_flops, any_seconds = (overhead(measured, "ist any", key) for key in ("flops", "seconds"))
    states = [s for s in (state_of(measured, name) for name in measured["results"]) if s]
    off = max((s["drop"]["bytes"] / s["active"] for s in states), default=None)
    return [
        ("LoRA + IST any ÷ LoRA, bytes kept for backward, peak of the run", ratio(measured, "ist any", "lora", "kept"), 0.85),
        ("LoRA + IST top ÷ LoRA, bytes kept for backward, peak of the run", ratio(measured, "ist top", "lora", "kept"), 0.60),
        ("LoRA + IST top ÷ LoRA, seconds of a step", ratio(measured, "ist top", "lora", "seconds"), 0.70),
        (f"probes of LoRA + IST any every {INTERVAL} updates, share of FLOPs", any_flops, OVERHEAD),
        (f"probes of LoRA + IST any every {INTERVAL} updates, share of seconds", any_seconds, OVERHEAD),
        ('optimizer state under "drop" ÷ that of the active layers', off, 1.0),
    ]  # fmt: skip


def table(measured: Mapping[str, Any]) -> str:
    """Markdown: a table against LoRA, one with checkpointing, probes, optimizer state, and what is reached."""
    plain, again = ([name for name in measured["results"] if name in group] for group in (PLAIN, RECOMPUTED))
    lines = [f"### {title(measured['task'])}\n", *_costs(measured, plain, ["lora"])]
    if again:
        lines += [
            "",
            "With gradient checkpointing (not reentrant); what it recomputes in the backward pass is in the peak memory only:\n",
            *_costs(measured, again, [RECOMPUTED[0], "lora"]),
        ]
    probing = [name for name in measured["results"] if probe_and_step(measured, name, "flops")]
    if probing:
        lines += [
            "",
            f"Probes, {IST().candidates} candidates on a quarter of an update's rows, as a share of the run:\n",
            f"| | one probe, in updates: FLOPs | seconds | share at interval {INTERVAL}: FLOPs | seconds | "
            f"interval for {OVERHEAD:.0%}: FLOPs | seconds |",
            "|---" + "|---:" * 6 + "|",
        ]
        for name in probing:
            cells = [LABELS[name]]
            for what in (_in_updates, overhead, interval_needed):
                form = {"_in_updates": ".2f", "overhead": ".1%", "interval_needed": "d"}[what.__name__]
                cells += [_show(what(measured, name, key), form) for key in ("flops", "seconds")]
            lines.append(f"| {' | '.join(cells)} |")
    resting = [(name, state) for name in plain if (state := state_of(measured, name))]
    if resting:
        lines += [
            "",
            "Optimizer state, at its fullest in the run:\n",
            "| | all layers MB | active layers MB | share | keep MB | share | drop MB | share | drop = active, each update |",
            "|---" + "|---:" * 8 + "|",
        ]
        for name, state in resting:
            sizes = (state["active"], state["keep"]["bytes"], state["drop"]["bytes"])
            every = state["keep"]["every"]
            cells = [f"{every / 1e6:.2f}", *(x for size in sizes for x in (f"{size / 1e6:.2f}", f"{size / every:.3f}"))]
            lines.append(f"| {LABELS[name]} | {' | '.join(cells)} | {'yes' if state['drop']['exact'] else 'NO'} |")
    return "\n".join([*lines, "", *(_reached(*row) for row in reaches(measured))]) + "\n"


def _costs(measured: Mapping[str, Any], names: list[str], rivals: list[str]) -> list[str]:
    """Rows of costs, each ratio to the rivals in turn."""
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
    head = ["", "trainable", *(text for column in columns for text in (column[0], *over))]
    rows = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for name in names:
        result = measured["results"][name]
        cells = [result["label"], _show(result.get("counts", {}).get("trainable"), ",")]
        for _, key, kind, unit, form in columns:
            value = figure(measured, name, key, kind)
            out = any("oom" in part for part in result.values() if isinstance(part, dict)) and value is None
            cells += ["OOM" if out else _show(value and value / unit, form)]
            cells += [_show(ratio(measured, name, rival, key, kind), ".2f") for rival in rivals]
        rows.append(cells)
    return [f"| {' | '.join(row)} |" for row in rows]


def _in_updates(measured: Mapping[str, Any], name: str, key: str) -> float | None:
    costs = probe_and_step(measured, name, key)
    return costs and costs[0] / costs[1]


def _show(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _reached(what: str, value: float | None, bound: float) -> str:
    if value is None:
        return f"* {what} ≤ {bound:g}: not measured"
    return f"* {what} ≤ {bound:g}: **{value:.3g}**, {'reached' if value <= bound else 'NOT reached'}"


def title(task: Mapping[str, Any]) -> str:
    """A cell in words."""
    return f"{task['shape']}, {task['batch']} × {task['length']} tokens, {task['dtype']}, LoRA r = {task['rank']}"


def draw(measured: Mapping[str, Any], path: Path) -> None:
    """Bars of means with a mark at the peak: bytes kept, peak memory, FLOPs and seconds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(measured["results"])[::-1]
    labels = [LABELS[name] for name in names]
    panels, all_axes = plt.subplots(1, 4, figsize=(15, 0.4 * len(names) + 1.7), sharey=True, layout="constrained")
    kinds = [
        ("kept", 1e6, "MB kept for backward", "#ee6677"),
        ("above", 1e6, "peak memory above the model, MB", "#aa3377"),
        ("flops", 1e9, "GFLOP per update", "#4477aa"),
        ("seconds", 1.0, "seconds per update", "#66ccee"),
    ]
    for axes, (key, unit, label, colour) in zip(all_axes, kinds, strict=True):
        means = [(figure(measured, name, key, "mean") or 0.0) / unit for name in names]
        peaks = [(figure(measured, name, key, "peak") or 0.0) / unit for name in names]
        axes.barh(labels, means, color=colour)
        for row, (mean, highest) in enumerate(zip(means, peaks, strict=True)):
            if highest > mean:
                axes.plot([mean, highest], [row, row], color="#444444", linewidth=1)
                axes.plot([highest, highest], [row - 0.3, row + 0.3], color="#444444", linewidth=1.6)
            text = f"{highest:.2f}" if key == "seconds" else f"{highest:.0f}"
            axes.text(highest, row, f"  {text}" if highest else "", va="center", fontsize=8)
        axes.set_xlim(0, (max(peaks) or 1.0) * 1.18)
        axes.set_xlabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    panels.suptitle(f"{title(measured['task'])}: mean of the run (bar) and its peak (mark, number)", fontsize=11)
    panels.savefig(path, dpi=120)
    plt.close(panels)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--length", type=int, default=128, help="tokens per row")
    parser.add_argument("--batch", type=int, default=4, help="rows")
    parser.add_argument("--grid", choices=GRIDS, help="several cells instead of --shape, --length and --batch")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rank", type=int, default=8, help="LoRA's rank; S2FT matches its trainable count")
    parser.add_argument("--draws", type=int, default=12, help="updates of a run that is counted")
    parser.add_argument("--only", nargs="+", choices=LABELS, help="contestants; default all")
    parser.add_argument("--measure", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="timed steps per turn, the same draws in every turn")
    parser.add_argument("--one-by-one", action="store_true", help="one timed process at a time, where memory is short")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: a GPU if there is one")
    parser.add_argument(
        "--write", nargs="?", type=Path, const=Path("benchmarks/results/layers"), help="also write files of this name"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(start, json.loads(arguments.child))
        return
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the children's too
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU; use --device cpu, or install a build of torch for CUDA")
    if arguments.draws < INTERVAL:
        parser.error(f"--draws {arguments.draws}: no probe would be counted; give at least {INTERVAL}")
    cells = GRIDS[arguments.grid] if arguments.grid else [(arguments.shape, arguments.length, arguments.batch)]
    measured = []
    for shape, length, batch in cells:
        task = {"shape": shape, "length": length, "batch": batch}
        task |= {key: getattr(arguments, key) for key in ("dtype", "rank", "draws", "steps", "one_by_one")}
        measured.append(cell(task, list(arguments.only or LABELS), arguments.rounds, arguments.measure, arguments.write))
        print(table(measured[-1]), flush=True)
        if arguments.write:
            _write(measured, arguments.write)  # after each cell: a long grid may be stopped


def _read(output: Path | None) -> dict[str, Any]:
    written = None if output is None else output.with_suffix(".json")
    return json.loads(written.read_text()) if written and written.exists() else {"commands": [], "cells": []}


def _write(measured: list[dict[str, Any]], output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    task = measured[0]["task"]
    commands = list(dict.fromkeys([*_read(output)["commands"], f"python {shlex.join(sys.argv)}"]))
    how = "".join(f"    {command}\n" for command in commands)
    head = (
        f"# Cost of training a few layers at a time\n\n{how}\nOn {device()}. LoRA is on all linear layers "
        f"with dropout {DROPOUT:g}; IST and RST train a quarter of the layers. Means are over a run of {task['draws']} draws; "
        "peaks are over the same run and an update in which layer 0 trains. Bytes kept for backward are storages that autograd "
        "saves, each once, without weights. Peak memory counts from the loaded model, optimizer state (\"keep\") and probes "
        "included. Seconds are means over the draws of the fastest of the turns, probes not included.\n\n"
    )  # fmt: skip
    output.with_suffix(".json").write_text(
        json.dumps({"device": device(), "commands": commands, "cells": measured}, indent=1) + "\n"
    )
    output.with_suffix(".md").write_text(head + "\n".join(table(c) for c in measured))
    for c in measured:
        t = c["task"]
        suffix = "" if len(measured) == 1 else f"-{t['shape']}-{t['batch']}x{t['length']}"
        draw(c, output.with_name(f"{output.name}{suffix}.png"))


if __name__ == "__main__":
    main()
