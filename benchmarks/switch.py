"""Cost of a switch from one adapter to the next, for one weight: milliseconds, and ratios to merging a LoRA.

`AdapterPool` writes saved values into the live weight; a LoRA that is merged has to be taken off and put on by products as
large as the weight; a merged weight can also be copied whole, from memory or from a file. All have as many trainable numbers
as a LoRA of the given rank.

    python benchmarks/switch.py                                  # Llama-3-8B's shapes, and squares of 1024 to 8192
    python benchmarks/switch.py --only o_proj down_proj --rounds 20

"on" goes from the base to an adapter, "switch" from one adapter to another. A LoRA merges once for "on", twice for "switch".
The ways take turns within one process, each with a weight of its own, so that a noisy machine is equally unkind to all:
compare the ratios.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lib import command_line, results, switch_report
from lib.cells import Cell
from lib.machine import device
from lib.switchers import GROUPS, Case, One, Way, ways

THREADS = 2


@torch.no_grad()
def measure(case: Case, rounds: int, turns: int, folder: Path) -> dict[str, Any]:
    """Milliseconds of every way, which take turns, and how many weights are not the base's in the end."""
    base = One(case).proj.weight
    made = {key: make() for key, (_, make) in ways(case, folder).items()}
    times: dict[str, dict[str, list[float]]] = {key: {"on": [], "switch": []} for key in made}
    for _ in range(rounds):
        for key, (_, to) in made.items():
            to(0)
            for _ in range(turns):
                to(None)
                times[key]["on"].append(_timed(to, 0))
                times[key]["switch"].append(_timed(to, 1))
            to(None)
    forward = {key: _forward(made[key][0]) for key in ("scattered", "rows") if key in made}
    return {
        key: {
            "label": ways(case, folder)[key][0],
            **{what: statistics.median(found) * 1e3 for what, found in times[key].items()},
            **{f"fastest {what}": min(found) * 1e3 for what, found in times[key].items()},
            "changed": (weight != base).float().mean().item(),
            "forward": forward.get(key),
        }
        for key, (weight, _) in made.items()
    }


def _timed(to: Way, number: int) -> float:
    start = time.perf_counter()
    to(number)
    return time.perf_counter() - start


def _forward(weight: Tensor) -> dict[int, float]:
    """Milliseconds of a product with so many tokens, fastest of five."""
    found = {}
    for tokens in (1, 128):
        x = torch.randn(tokens, weight.shape[1]).to(weight.dtype)
        found[tokens] = min(_timed(lambda _, x=x: nn.functional.linear(x, weight), 0) for _ in range(5)) * 1e3
    return found


def main() -> None:
    """Measure, print and write."""
    parser = command_line.parser(__doc__)
    names = [case.name for cases in GROUPS.values() for case in cases]
    parser.add_argument("--only", nargs="+", choices=names, help="cases; default all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turns", type=int, default=5, help="timed switches per way and round")
    command_line.add_write(parser, "switch")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    cells: dict[str, list[Cell]] = {group: [] for group in GROUPS}
    for group, cases in GROUPS.items():
        for case in cases:
            if arguments.only is None or case.name in arguments.only:
                with tempfile.TemporaryDirectory() as folder:
                    found = measure(case, arguments.rounds, arguments.turns, Path(folder))
                fields = {"name": case.name, "shape": case.shape, "dim": case.dim, "title": case.title}
                cells[group].append({**fields, "results": found})
                print(switch_report.table(cells[group][-1]), flush=True)
                if arguments.write:
                    _write(cells, arguments.write)  # after each case: a long run may be stopped
    print(switch_report.reached([cell for group in cells.values() for cell in group]))


def _write(cells: dict[str, list[Cell]], output: Path) -> None:
    everything = [cell for group in cells.values() for cell in group]
    head = (
        f"# Cost of a switch\n\n`{command_line.command()}` on {device()}. Milliseconds are medians; the ratios (how "
        "many times as fast as the faster of the two LoRA merges) compare the fastest turns, to which other work on the machine "
        "has added least. On: from the base to an adapter. Switch: from one adapter to another. The last column is the share "
        "of weights that differ from the base's when all adapters (random ones) have been taken off again.\n\n"
    )
    text = head + switch_report.reached(everything) + "\n" + "\n".join(map(switch_report.table, everything))
    llama, squares = cells["llama"], cells["squares"]
    draw = (lambda path: switch_report.draw(llama, squares, path)) if llama and squares else None
    results.write(output, {"device": device(), "cells": cells}, text, draw)


if __name__ == "__main__":
    main()
