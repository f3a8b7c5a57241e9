"""Cost of many adapters in one layer while it generates: a row per adapter, against LoRA, batched and looped.

Shapes of Llama-3-8B; LoRA has rank 32 and S2FT as many parameters. Contestants take turns within each round; what the base's
own product costs is shown beside them and is not part of any.

    python benchmarks/parallel.py                       # batch 16, 16 adapters, bfloat16
    python benchmarks/parallel.py --dtype float32

* looped LoRA: two products per adapter, as PEFT's adapter_names runs it.
* batched LoRA: two batched products over factors that lie stacked already, the rival of the ratios.
* ours: what `intaglio.runtime.mixing` runs: rows are stacked as they come, sizes may differ.
* one-hot LoRA: the same adapter as an exported LoRA on an engine that does not know it is one-hot, stacked and batched.
* in a larger slot: the same, padded to a rank that vLLM takes (64 or 256).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from intaglio.runtime.changes import Adapter, Change
from intaglio.runtime.mixing import Batch
from lib import command_line, pictures
from lib import results as files
from lib.machine import device
from lib.tables import table as markdown

RANK = 32
# projection → inputs, outputs, channels of S2FT with as many parameters as LoRA of rank 32, and whether they are columns
LAYERS = {
    "o_proj": (4096, 4096, 64, True),
    "down_proj": (14336, 4096, 144, True),
    "up_proj": (4096, 14336, 144, False),
    "v_proj": (4096, 1024, 40, False),
}
LABELS = {
    "base": "base product alone",
    "looped": "looped LoRA",
    "batched": "batched LoRA",
    "ours": "ours",
    "ragged": "ours, sizes from half to one and a half",
    "one_hot": "one-hot LoRA",
    "slot": "one-hot LoRA in a larger slot",
}


def contestants(layer: str, batch: int, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """What each does for a step of one layer, without the base's product."""
    inputs, outputs, channels, by_columns = LAYERS[layer]
    x, y = torch.randn(batch, inputs).to(dtype), torch.zeros(batch, outputs, dtype=dtype)
    weight = torch.randn(outputs, inputs).to(dtype)
    slot = 64 if channels <= 64 else 256

    def lora(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(batch, rank, inputs).to(dtype), torch.randn(batch, outputs, rank).to(dtype)

    def batched(rank: int) -> Callable[[], Any]:
        a, b = lora(rank)
        return lambda: y.add_(torch.bmm(b, torch.bmm(a, x.unsqueeze(2)))[:, :, 0])

    def looped() -> Callable[[], Any]:
        a, b = lora(RANK)

        def run() -> None:
            for row in range(batch):
                y[row : row + 1] += (x[row : row + 1] @ a[row].T) @ b[row].T

        return run

    def ours(counts: list[int]) -> Callable[[], Any]:
        adapters = [Adapter({layer: _change(inputs, outputs, count, by_columns, dtype)}) for count in counts]
        step = Batch(adapters, [1] * batch, {})
        return lambda: step.mix_(layer, y, x)

    ragged = [channels // 2 + channels * i // (batch - 1) for i in range(batch)]
    return {
        "base": lambda: F.linear(x, weight),
        "looped": looped(),
        "batched": batched(RANK),
        "ours": ours([channels] * batch),
        "ragged": ours(ragged),
        "one_hot": batched(channels),
        "slot": batched(slot),
    }


def _change(inputs: int, outputs: int, count: int, by_columns: bool, dtype: torch.dtype) -> Change:
    if by_columns:
        return Change(torch.randperm(inputs)[:count].sort().values, torch.randn(count, outputs).to(dtype))
    return Change(torch.randn(count, inputs).to(dtype), torch.randperm(outputs)[:count].sort().values)


def measure(layer: str, batch: int, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """Median seconds of each contestant."""
    running = contestants(layer, batch, dtype)
    times: dict[str, list[float]] = {name: [] for name in running}
    with torch.no_grad():
        for turn in range(rounds + 2):  # two to warm up
            for name, run in running.items():
                run()
                began = time.perf_counter()
                run()
                run()
                if turn >= 2:
                    times[name].append((time.perf_counter() - began) / 2)
    return {name: statistics.median(found) for name, found in times.items()}


def table(results: dict[str, dict[str, float]], dtype: str, batch: int) -> str:
    """Markdown: times over batched LoRA's, and that in ms."""
    head = "| ÷ batched LoRA | " + " | ".join(f"{layer} r{RANK} / s{LAYERS[layer][2]}" for layer in results) + " |"
    rows = [
        [label, *(f"{result[name] / result['batched']:.2f}" for result in results.values())] for name, label in LABELS.items()
    ]
    rows.append(["batched LoRA, ms", *(f"{1e3 * result['batched']:.2f}" for result in results.values())])
    return "\n".join([f"### {batch} rows, {batch} adapters, {dtype}\n", *markdown(head, rows)]) + "\n"


def draw(measured: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    """Bars of milliseconds, a panel per layer and type."""
    names = list(LABELS)[::-1]
    labels = [LABELS[name] for name in names]
    special = {"base": pictures.YELLOW, "ours": pictures.RED, "ragged": pictures.RED}
    colours = [special.get(name, pictures.BLUE) for name in names]
    size = (14, 0.4 + 2.4 * len(measured))
    options = {"figsize": size, "sharey": True, "squeeze": False, "dpi": 110}
    with pictures.panels(path, len(measured), len(LAYERS), **options) as (_, panels):
        for row, (dtype, results) in zip(panels, measured.items(), strict=True):
            for axes, (layer, result) in zip(row, results.items(), strict=True):
                values = [1e3 * result[name] for name in names]
                pictures.bars(axes, labels, values, ".2f", colour=colours, room=1.2, size=7)
                axes.set_title(f"{layer}, {dtype}", fontsize=9, loc="left")
        for axes in panels[-1]:
            axes.set_xlabel("ms per step")


def main() -> None:
    """Measure, print and write."""
    parser = command_line.parser(__doc__)
    parser.add_argument("--batch", type=int, default=16, help="rows, each with an adapter of its own")
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=15)
    command_line.add_output(parser, "parallel")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    measured, pages = {}, []
    for dtype in arguments.dtype:
        measured[dtype] = {layer: measure(layer, arguments.batch, getattr(torch, dtype), arguments.rounds) for layer in LAYERS}
        pages.append(table(measured[dtype], dtype, arguments.batch))
        print(pages[-1])
    how = f"`{command_line.command()}` on {device()}; medians of {arguments.rounds} rounds."
    text = f"# Many adapters in one layer\n\n{how}\n\n" + "\n".join(pages)
    files.write(arguments.output, {"device": device(), "seconds": measured}, text, lambda path: draw(measured, path))


if __name__ == "__main__":
    main()
