"""Training for long: memory, open files and the time of a step stay what they were.

    python benchmarks/soak.py --write
    python benchmarks/soak.py --updates 200 --only s2ft id3

Every method makes 2,000 updates of a tiny model in a process of its own; 200 times a method is attached and detached; and 1,000
times an `AdapterPool` goes from one adapter to another. Compared are the second and the last quarter: resident memory, tensors
that Python keeps, open files, threads, and the median time of a step.
"""

from __future__ import annotations

import gc
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from lib import command_line, results
from lib.machine import device, held, settle

# Settings that train a tiny model; a method without a row runs on its defaults.
SETTINGS: dict[str, dict[str, Any]] = {
    "s2ft": {"o": 0.25, "down": 0.25},
    "id3": {"budget": 0.02, "steps": 10_000},
    "gradient": {"budget": 0.02},
    "snip": {"budget": 0.02},
    "random": {"budget": 0.02},
    "pafi": {"budget": 0.02},
    "shira": {"budget": 0.02},
    "fishmask": {"budget": 0.02},
    "bitfit": {"tensors": "one_dimensional"},
    "ist": {"layers": 1, "interval": 10, "of": {"name": "s2ft", "o": 0.25, "down": 0.25}},
    "rst": {"layers": 1, "of": {"name": "full"}},
    "lisa": {"layers": 1},
}
GROWTH = {"memory": 4e6, "tensors": 4, "files": 0, "threads": 0}  # that is not counted: allocators round


def figures(seconds: list[float]) -> dict[str, float]:
    """What the process holds now, and the median of the last steps."""
    settle()
    import torch

    tensors = sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())
    now = {"memory": held(), "tensors": tensors, "files": len(os.listdir("/proc/self/fd")), "threads": threading.active_count()}
    return now | {"seconds": statistics.median(seconds)}


def repeat(step: Callable[[int], object], count: int) -> dict[str, Any]:
    """Do something many times; what was held after half of it, and at the end."""
    seconds, found = [], []
    for number in range(count):
        begin = time.perf_counter()
        step(number)
        seconds.append(time.perf_counter() - begin)
        if number + 1 in (count // 2, count):
            found.append(figures(seconds[-count // 4 :]))
    return {"count": count, "half": found[0], "end": found[1]}


def tiny() -> tuple[Any, dict[str, Any]]:
    """A model, and a batch for it."""
    import torch
    import transformers as tf

    from lib.tiny_folder import SIZES

    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=96, **SIZES)).train()
    ids = torch.randint(3, 96, (2, 16), generator=torch.Generator().manual_seed(0))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def training(name: str, updates: int) -> dict[str, Any]:
    """Updates of one method."""
    import torch

    from intaglio import Batches, attach
    from intaglio.methods import build

    model, batch = tiny()
    method = build({"name": name} | SETTINGS.get(name, {}))
    probe = Batches([batch]) if method.needs_probe or method.learns else None
    tuner = attach(model, method, probe=probe)
    optimizer = tuner.optimizer(torch.optim.AdamW, lr=1e-4)

    def step(number: int) -> None:
        model(**batch).loss.backward()
        tuner.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()

    return repeat(step, updates)


def attaching(name: str, updates: int) -> dict[str, Any]:
    """Attach, make an update, detach."""
    import torch

    from intaglio import S2FT, attach

    model, batch = tiny()

    def step(number: int) -> None:
        tuner = attach(model, S2FT(o=0.25, down=0.25, seed=number))
        optimizer = tuner.optimizer(torch.optim.AdamW, lr=1e-4)
        model(**batch).loss.backward()
        optimizer.step()
        tuner.detach()

    return repeat(step, updates // 10)


def switching(name: str, updates: int) -> dict[str, Any]:
    """One adapter after the other in a pool."""
    from intaglio import S2FT, AdapterPool, Random, attach

    model, _ = tiny()
    deltas = {}
    for key, method in (("a", S2FT(o=0.25, down=0.25)), ("b", Random(budget=0.02))):
        tuner = attach(model, method)
        deltas[key] = tuner.delta()
        tuner.detach()
    pool = AdapterPool(model)
    for key, delta in deltas.items():
        pool.load(key, delta)
    return repeat(lambda number: pool.use("ab"[number % 2]), updates // 2)


def wrong(row: dict[str, Any]) -> list[str]:
    """Figures of a row that have grown."""
    half, end = row["half"], row["end"]
    grown = [key for key, allowed in GROWTH.items() if end[key] - half[key] > allowed]
    return grown + (["seconds"] if end["seconds"] > 1.5 * half["seconds"] else [])


def table(rows: dict[str, Any]) -> str:
    """The rows, as Markdown."""
    lines = ["| what | times | MB | tensors | open files | threads | ms, median | grown |", "|---|--:|--:|--:|--:|--:|--:|---|"]
    for name, row in rows.items():
        half, end = row["half"], row["end"]
        memory = f"{half['memory'] / 1e6:.1f} → {end['memory'] / 1e6:.1f}"
        counts = [f"{half[key]:.0f} → {end[key]:.0f}" for key in ("tensors", "files", "threads")]
        seconds = f"{1e3 * half['seconds']:.2f} → {1e3 * end['seconds']:.2f}"
        lines.append(
            f"| {name} | {row['count']:,} | {memory} | {' | '.join(counts)} | {seconds} | {', '.join(wrong(row)) or '–'} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Soak what is asked for, each in a process of its own."""
    parser = command_line.parser(__doc__)
    parser.add_argument("--updates", type=int, default=2_000)
    parser.add_argument("--only", nargs="+")
    command_line.add_write(parser, "soak")
    arguments = parser.parse_args()
    import json

    import transformers

    from intaglio.methods import METHODS
    from lib import forked

    assert transformers.LlamaForCausalLM  # imported once, before the forks
    work = dict.fromkeys(METHODS, training) | {"attach and detach": attaching, "switch adapters": switching}
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        for what in arguments.only or work:
            answer, log = Path(name) / "answer", Path(name) / "log"
            status = forked.run(
                lambda what=what, answer=answer: answer.write_text(json.dumps(work[what](what, arguments.updates))), log
            )
            if status:
                sys.exit(f"{what}: {log.read_text()}")
            rows[what] = json.loads(answer.read_text())
            print(table({what: rows[what]}).splitlines()[-1], flush=True)
    if arguments.write:
        text = f"# Training for long\n\n`{command_line.command()}`, {device()}. Half of the times → the end.\n\n{table(rows)}\n"
        results.write(arguments.write, {"device": device(), "rows": rows}, text)
    if any(wrong(row) for row in rows.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
