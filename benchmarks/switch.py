"""What it costs to switch a weight from one adapter to the next, in milliseconds and against merging a LoRA.

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

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from intaglio import AdapterPool, Delta
from intaglio.core.entries import Elements, Entries, Slices
from intaglio.core.fingerprint import fingerprint
from intaglio.core.selection import Selection
from turns import device

THREADS = 2
BLOCK = 64  # rows of a weight that are widened to fp32 at a time


@dataclass(frozen=True)
class Case:
    """A weight, which of its dimensions adapters choose along, and the rank of the LoRA they are compared with."""

    name: str
    shape: tuple[int, int]
    dim: int
    rank: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def chosen(self) -> int:
        """Rows or columns with as many numbers as the LoRA."""
        rows, columns = self.shape
        return self.rank * (rows + columns) // (rows if self.dim else columns)

    @property
    def title(self) -> str:
        what = "columns" if self.dim else "rows"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.name} {self.shape[0]} × {self.shape[1]}, {dtype}, {self.chosen} {what}, LoRA of rank {self.rank}"


LLAMA = [
    Case("o_proj", (4096, 4096), 1, 32),
    Case("down_proj", (4096, 14336), 1, 32),
    Case("down_proj, wide", (4096, 14336), 1, 96),
    Case("up_proj", (14336, 4096), 0, 32),
    Case("q_proj", (4096, 4096), 0, 32),
]
WIDE = [replace(case, name=f"{case.name}, fp32", dtype=torch.float32) for case in LLAMA[:2]]
SQUARES = [Case(f"{size}", (size, size), 1, 32) for size in (1024, 2048, 4096, 8192)]
GROUPS = {"llama": LLAMA, "fp32": WIDE, "squares": SQUARES}


class One(nn.Module):
    """A model of one linear layer, the same every time."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        torch.manual_seed(0)
        rows, columns = case.shape
        self.proj = nn.Linear(columns, rows, bias=False, dtype=case.dtype, device="meta")
        self.proj.weight = nn.Parameter(torch.randn(case.shape).to(case.dtype), requires_grad=False)


Way = Callable[[int | None], None]
"""Goes to an adapter, 0 or 1, or to the base, None."""


def pooled(case: Case, choose: Callable[[Case, int], Entries], **options: Any) -> tuple[Tensor, Way]:
    """`AdapterPool` with two adapters at the entries that `choose(case, number)` gives."""
    model = One(case)
    weight = model.proj.weight
    pool = AdapterPool(model, **options)
    for number in (0, 1):
        entries = choose(case, number)
        base = entries.gather(weight)
        delta = Delta(Selection({"proj.weight": entries}), {"proj.weight": base * 1.5}, {"proj.weight": fingerprint(base)})
        pool.load(str(number), delta)
    return weight, lambda number: pool.use(None if number is None else str(number))


def scattered(case: Case, number: int) -> Entries:
    """Rows or columns drawn at random, others for each adapter."""
    generator = torch.Generator().manual_seed(number)
    index = torch.randperm(case.shape[case.dim], generator=generator)[: case.chosen].sort().values
    return Slices(case.shape, case.dim, index)


def contiguous(case: Case, number: int) -> Entries:
    """Adjacent rows or columns, the same for all adapters: what a co-permuted model has."""
    return Slices(case.shape, case.dim, torch.arange(case.chosen))


def apart(case: Case, number: int) -> Entries:
    """Adjacent rows or columns, others for each adapter: a head."""
    return Slices(case.shape, case.dim, torch.arange(case.chosen) + number * case.chosen)


def single(case: Case, number: int) -> Entries:
    """As many single entries drawn at random (ID3)."""
    generator = torch.Generator().manual_seed(number)
    count = case.rank * sum(case.shape)
    drawn = torch.randint(case.shape[0] * case.shape[1], (2 * count,), generator=generator).unique()
    return Elements(case.shape, drawn[torch.randperm(len(drawn), generator=generator)[:count]].sort().values)


def lora(case: Case, add: Callable[[Tensor, Tensor, Tensor], None], dtype: torch.dtype) -> tuple[Tensor, Way]:
    """Merge LoRAs; `add(W, B, A)` does W += B A. A switch is one such sum too, of twice the rank: one pass over the weight."""
    weight, standing = One(case).proj.weight, [None]
    rows, columns = case.shape
    b = [(torch.randn(rows, case.rank) / 100).to(case.dtype).to(dtype) for _ in range(2)]
    a = [torch.randn(case.rank, columns).to(case.dtype).to(dtype) for _ in range(2)]
    steps = {(None, n): (b[n], a[n]) for n in (0, 1)} | {(n, None): (-b[n], a[n]) for n in (0, 1)}
    steps |= {(n, 1 - n): (torch.cat([b[1 - n], -b[n]], 1), torch.cat([a[1 - n], a[n]])) for n in (0, 1)}

    def to(number: int | None) -> None:
        if number != standing[0]:
            add(weight, *steps[standing[0], number])
        standing[0] = number

    return weight, to


def in_blocks(weight: Tensor, b: Tensor, a: Tensor) -> None:
    """W += B A by rows, in fp32 and rounded once: where a processor has no products of bf16, several times faster."""
    buffer = torch.empty(BLOCK, weight.shape[1])
    for start in range(0, len(weight), BLOCK):
        rows = slice(start, start + BLOCK)
        weight[rows].copy_(buffer.copy_(weight[rows]).addmm_(b[rows], a))


def index_add(case: Case) -> tuple[Tensor, Way]:
    """W.index_add_ of the differences."""
    weight, standing = One(case).proj.weight, [None]
    places = [scattered(case, number).index for number in (0, 1)]
    changes = [torch.randn_like(weight.index_select(case.dim, index)) / 100 for index in places]

    def to(number: int | None) -> None:
        if standing[0] is not None:
            weight.index_add_(case.dim, places[standing[0]], changes[standing[0]], alpha=-1)
        if number is not None:
            weight.index_add_(case.dim, places[number], changes[number])
        standing[0] = number

    return weight, to


def peft(case: Case) -> tuple[Tensor, Way]:
    """PEFT's merge and unmerge of a LoRA in the base's type: the product first, in fp32, then the sum."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=case.rank, lora_alpha=case.rank, target_modules=["proj"], init_lora_weights=False)
    model = get_peft_model(One(case), config, adapter_name="0", autocast_adapter_dtype=False)
    model.add_adapter("1", config, autocast_adapter_dtype=False)
    layer = model.base_model.model.proj

    def to(number: int | None) -> None:
        if layer.merged:
            layer.unmerge()
        if number is not None:
            layer.merge(adapter_names=[str(number)])

    return layer.get_base_layer().weight, to


def reload(case: Case, folder: Path | None) -> tuple[Tensor, Way]:
    """Copy a whole merged weight, from memory or from a file that the system has cached."""
    weight = One(case).proj.weight
    whole = {number: weight * (1.0 if number is None else 1.5 + number) for number in (None, 0, 1)}
    if folder is None:
        return weight, lambda number: weight.copy_(whole[number])
    for number, tensor in whole.items():
        safetensors.torch.save_file({"weight": tensor}, folder / f"{case.name}-{number}.safetensors")

    def to(number: int | None) -> None:
        with safetensors.safe_open(folder / f"{case.name}-{number}.safetensors", "pt") as file:
            weight.copy_(file.get_tensor("weight"))

    return weight, to


def ways(case: Case, folder: Path) -> dict[str, tuple[str, Callable[[], tuple[Tensor, Way]]]]:
    """Key → label and maker of everything that is compared."""
    unit = "columns" if case.dim else "rows"
    found: dict[str, tuple[str, Callable[[], tuple[Tensor, Way]]]] = {
        "addmm": ("LoRA merge, addmm_", lambda: lora(case, lambda w, b, a: w.addmm_(b, a), case.dtype)),
        "blocks": ("LoRA merge, by rows in fp32", lambda: lora(case, in_blocks, torch.float32)),
        "contiguous": (f"pool, adjacent {unit}, one place", lambda: pooled(case, contiguous)),
        "apart": (f"pool, adjacent {unit}, two places", lambda: pooled(case, apart)),
        "rows": (f"pool, scattered {unit}, rows storage", lambda: pooled(case, scattered, storage="rows")),
        "scattered": (f"pool, scattered {unit}", lambda: pooled(case, scattered)),
        "single": ("pool, single entries", lambda: pooled(case, single)),
        "index_add": (f"index_add_ of scattered {unit}", lambda: index_add(case)),
        "peft": ("PEFT merge", lambda: peft(case)),
        "memory": ("whole weight from memory", lambda: reload(case, None)),
        "file": ("whole weight from a cached file", lambda: reload(case, folder)),
    }
    left_out = {"rows"} if case.dim == 0 else set()
    left_out |= {"blocks"} if case.dtype == torch.float32 else set()
    return {key: way for key, way in found.items() if key not in left_out}


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


def times_faster(measured: dict[str, Any], key: str, what: str) -> float:
    """How many times as fast as the quickest way to merge a LoRA; fastest turns."""
    results = measured["results"]
    rival = min(results[name][f"fastest {what}"] for name in ("addmm", "blocks") if name in results)
    return rival / results[key][f"fastest {what}"]


def _digits(ratio: float) -> str:
    """Two digits, or all before the point."""
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.2g}"


def table(measured: dict[str, Any]) -> str:
    """Markdown: medians, ratios of the fastest turns, and what is left of the base."""
    lines = [
        f"### {measured['title']}\n",
        "| | on ms | × LoRA | switch ms | × LoRA | base weights changed in the end |",
        "|---" + "|---:" * 5 + "|",
    ]
    for key, result in measured["results"].items():
        cells = [result["label"]]
        for what in ("on", "switch"):
            cells += [f"{result[what]:.3f}", _digits(times_faster(measured, key, what))]
        changed = result["changed"]
        lines.append(f"| {' | '.join(cells)} | {f'{changed:.2%}' if changed else 'none'} |")
    own, turned = (measured["results"].get(key, {}).get("forward") for key in ("scattered", "rows"))
    if own and turned:
        parts = (f"{tokens} token(s) {turned[tokens]:.2f} ms for {own[tokens]:.2f} ms" for tokens in own)
        lines.append(f"\nA product with the weight in rows storage, against its own: {', '.join(parts)}.")
    return "\n".join(lines) + "\n"


def reached(cells: list[dict[str, Any]]) -> str:
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


def draw(llama: list[dict[str, Any]], squares: list[dict[str, Any]], path: Path) -> None:
    """Times as fast as a LoRA at Llama's shapes, and milliseconds over the size of a square weight."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels, (left, right) = plt.subplots(1, 2, figsize=(14, 5.6), layout="constrained", width_ratios=[5, 4])
    _dots(left, llama)
    _curves(right, squares)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    panels.savefig(path, dpi=110)
    plt.close(panels)


def _name(key: str, cells: list[dict[str, Any]]) -> str:
    """A label for rows and columns alike."""
    label = next(cell["results"][key]["label"] for cell in cells if key in cell["results"])
    return label if key in ("rows", "blocks") else label.replace("columns", "rows or columns")


def _dots(axes: Any, cells: list[dict[str, Any]]) -> None:
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


def _curves(axes: Any, cells: list[dict[str, Any]]) -> None:
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


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [case.name for cases in GROUPS.values() for case in cases]
    parser.add_argument("--only", nargs="+", choices=names, help="cases; default all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turns", type=int, default=5, help="timed switches per way and round")
    parser.add_argument(
        "--write", nargs="?", type=Path, const=Path("benchmarks/results/switch"), help="also write files of this name"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    cells: dict[str, list[dict[str, Any]]] = {group: [] for group in GROUPS}
    for group, cases in GROUPS.items():
        for case in cases:
            if arguments.only is None or case.name in arguments.only:
                with tempfile.TemporaryDirectory() as folder:
                    results = measure(case, arguments.rounds, arguments.turns, Path(folder))
                fields = {"name": case.name, "shape": case.shape, "dim": case.dim, "title": case.title}
                cells[group].append({**fields, "results": results})
                print(table(cells[group][-1]), flush=True)
                if arguments.write:
                    _write(cells, arguments.write)  # after each case: a long run may be stopped
    print(reached([cell for group in cells.values() for cell in group]))


def _write(cells: dict[str, list[dict[str, Any]]], output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    everything = [cell for group in cells.values() for cell in group]
    head = (
        f"# Cost of a switch\n\n`python {' '.join(sys.argv)}` on {device()}. Milliseconds are medians; the ratios (how "
        "many times as fast as the faster of the two LoRA merges) compare the fastest turns, to which other work on the machine "
        "has added least. On: from the base to an adapter. Switch: from one adapter to another. The last column is the share "
        "of weights that differ from the base's when all adapters (random ones) have been taken off again.\n\n"
    )
    output.with_suffix(".json").write_text(json.dumps({"device": device(), "cells": cells}, indent=1) + "\n")
    output.with_suffix(".md").write_text(head + reached(everything) + "\n" + "\n".join(map(table, everything)))
    if cells["llama"] and cells["squares"]:
        draw(cells["llama"], cells["squares"], output.with_suffix(".png"))


if __name__ == "__main__":
    main()
