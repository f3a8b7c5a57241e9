"""The Triton kernels against LoRA at equal parameter count: bytes read and time, on a GPU.

One decoding step and one step of prompts, bfloat16, every request with an adapter of its own, at the shapes of Llama-3-8B.
LoRA is two batched products over factors that lie ready per adapter, so that nothing is gathered for it; "one-hot LoRA" is the
same on what `intaglio export --to lora` writes, whose rank is the number of chosen columns or rows.

    python benchmarks/kernels.py                # needs a GPU
    python benchmarks/kernels.py --interpret    # without one: tiny sizes in Triton's interpreter, results compared, nothing timed
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lib import command_line
from lib.tables import row, table


@dataclass(frozen=True)
class Case:
    """One weight and what was changed of it."""

    name: str
    side: str
    inputs: int
    outputs: int
    chosen: int

    @property
    def width(self) -> int:
        return self.outputs if self.side == "columns" else self.inputs

    @property
    def equal_rank(self) -> int:
        """LoRA's rank at the same number of values."""
        return max(1, round(self.chosen * self.width / (self.inputs + self.outputs)))


LLAMA = [
    Case("o_proj", "columns", 4096, 4096, 64),
    Case("down_proj", "columns", 14336, 4096, 144),
    Case("down_proj", "columns", 14336, 4096, 430),
    Case("v_proj", "rows", 4096, 1024, 40),
    Case("up_proj", "rows", 4096, 14336, 144),
]
TINY = [Case("o_proj", "columns", 48, 48, 5), Case("up_proj", "rows", 48, 80, 7)]


def contestants(case: Case, adapters: int, length: int, device: str, dtype: torch.dtype) -> dict[str, tuple[Callable, int]]:
    """Label -> (what adds the adapters to an output in place, bytes of adapters it reads); each adapter has `length` tokens."""
    from intaglio.vllm_plugin import kernels
    from intaglio.vllm_plugin.slots import OneHot, Slots

    slots = Slots(adapters, case.inputs, case.outputs, dtype, device)
    size = case.inputs if case.side == "columns" else case.outputs
    stacked = {rank: factors(case, adapters, rank, device, dtype) for rank in (case.equal_rank, case.chosen)}
    a, b = stacked[case.chosen]
    for slot in range(adapters):  # the second rank's factors are the same change as one-hot LoRA
        index = torch.randperm(size, device=device)[: case.chosen].sort().values
        values = torch.randn(case.chosen, case.width, device=device).to(dtype) / size**0.5
        slots.put(slot, OneHot(case.side, index.int(), values))  # type: ignore[arg-type]
        one_hot = torch.nn.functional.one_hot(index, size).to(dtype)
        a[slot], b[slot] = (one_hot, values.T) if case.side == "columns" else (values, one_hot.T)
    slot_T = torch.arange(adapters, device=device).repeat_interleave(length)

    def compact(y: Tensor, x: Tensor) -> None:
        kernels.add(y, x, slots, slot_T, tiled=length > 1)

    def lora(rank: int) -> Callable[[Tensor, Tensor], None]:
        a, b = stacked[rank]

        def add(y: Tensor, x: Tensor) -> None:
            shrunk = torch.bmm(x.view(adapters, length, -1), a.mT)
            y.view(adapters, length, -1).baddbmm_(shrunk, b.mT)

        return add

    per_value = torch.finfo(dtype).bits // 8
    read = {rank: adapters * rank * (case.inputs + case.outputs) * per_value for rank in stacked}
    return {
        "index and values": (compact, adapters * case.chosen * (4 + case.width * per_value)),
        f"LoRA, rank {case.equal_rank}": (lora(case.equal_rank), read[case.equal_rank]),
        f"one-hot LoRA, rank {case.chosen}": (lora(case.chosen), read[case.chosen]),
    }


def factors(case: Case, adapters: int, rank: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A and B of all adapters, random."""
    a = torch.randn(adapters, rank, case.inputs, device=device).to(dtype)
    return a, torch.randn(adapters, case.outputs, rank, device=device).to(dtype)


def compare(case: Case, adapters: int, length: int, device: str, dtype: torch.dtype) -> float:
    """The largest difference between the kernels and one-hot LoRA, relative to the largest change."""
    ways = [add for add, _ in contestants(case, adapters, length, device, dtype).values()]
    x = torch.randn(adapters * length, case.inputs, device=device).to(dtype)
    base = torch.zeros(adapters * length, case.outputs, device=device, dtype=dtype)
    ours, theirs = base.clone(), base.clone()
    ways[0](ours, x)
    ways[2](theirs, x)
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def measure(cases: list[Case], adapters: int, lengths: list[int]) -> None:
    """Print a table of medians."""
    import triton

    print(f"{torch.cuda.get_device_name()}, bfloat16, {adapters} adapters, all different\n")
    head = "| weight | chosen | tokens each | way | adapters read, MB | time, µs | GB/s |"
    print("\n".join(table(head, [], "lrrl")))
    for case in cases:
        for length in lengths:
            x = torch.randn(adapters * length, case.inputs, device="cuda", dtype=torch.bfloat16)
            y = torch.zeros(adapters * length, case.outputs, device="cuda", dtype=torch.bfloat16)
            for label, (add, read) in contestants(case, adapters, length, "cuda", torch.bfloat16).items():
                ms = triton.testing.do_bench(lambda add=add, x=x, y=y: add(y, x), return_mode="median")
                figures = [f"{read / 1e6:.2f}", f"{ms * 1e3:.1f}", f"{read / ms / 1e6:.0f}"]
                print(row([f"{case.name}, {case.side}", case.chosen, length, label, *figures]))


def main() -> None:
    """Measure on a GPU; without one, say so."""
    parser = command_line.parser(__doc__)
    parser.add_argument("--interpret", action="store_true", help="compare tiny sizes in Triton's interpreter, on the CPU")
    parser.add_argument("--adapters", type=int, default=16)
    arguments = parser.parse_args()
    if arguments.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    try:
        import triton  # noqa: F401
    except ImportError:
        print("Triton is not installed (pip install triton): nothing to measure")
        return
    if arguments.interpret:
        for case in TINY:
            for length in (1, 20):
                difference = compare(case, 3, length, "cpu", torch.float32)
                print(f"{case.name}, {case.side}, {length} tokens each: differs from one-hot LoRA by {difference:.1e}")
                assert difference < 1e-5
    elif not torch.cuda.is_available():
        print("no GPU here: nothing to measure (--interpret compares the results in Triton's interpreter)")
    else:
        for case in LLAMA:
            print(f"{case.name}: differs from one-hot LoRA by {compare(case, 4, 20, 'cuda', torch.bfloat16):.1e}")
        measure(LLAMA, arguments.adapters, [1, 128])


if __name__ == "__main__":
    main()
