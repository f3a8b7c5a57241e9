"""The ways to go from one adapter to the next that `switch.py` compares, each with a weight of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from intaglio import AdapterPool
from intaglio.core.entries import Elements, Entries, Slices
from lib.random_adapters import changed

BLOCK = 64  # rows of a weight that are widened to fp32 at a time


@dataclass(frozen=True)
class Case:
    """A weight, the dimension that adapters choose along, and the rank of the LoRA they are compared with."""

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
    weights = {"proj.weight": model.proj.weight}
    pool = AdapterPool(model, **options)
    for number in (0, 1):
        pool.load(str(number), changed(weights, [("proj.weight", choose(case, number))], lambda name, base: base * 1.5))
    return model.proj.weight, lambda number: pool.use(None if number is None else str(number))


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
