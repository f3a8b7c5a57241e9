"""Ragged slots and batches for the tests of the vLLM plugin; no vLLM is needed."""

import torch

from intaglio.vllm_plugin.slots import OneHot, Slots

FP32, BF16 = torch.float32, torch.bfloat16
INPUTS, OUTPUTS = 70, 45  # no multiple of any block
# Tokens' slots: one each, a base request between, one user twice; runs of prompts; nobody; nothing.
BATCHES = {
    "decoding": [3, -1, 0, 4, 0, 1, 2],
    "prompts": [2] * 19 + [-1] * 5 + [0, 4, 4] + [0] * 33 + [3],
    "base only": [-1] * 4,
    "no tokens": [],
}
COUNTS = (5, 0, 33, 1, 40)  # entries of slots 0 to 4; slot 1 is loaded and empty


def one_hot(side, count, seed, inputs=INPUTS, outputs=OUTPUTS):
    generator = torch.Generator().manual_seed(seed)
    size, width = (inputs, outputs) if side == "columns" else (outputs, inputs)
    index = torch.randperm(size, generator=generator)[:count].sort().values
    return OneHot(side, index.int(), torch.randn(count, width, generator=generator))


def ragged(side, dtype=FP32):
    slots = Slots(len(COUNTS), INPUTS, OUTPUTS, dtype)
    for slot, count in enumerate(COUNTS):
        slots.put(slot, one_hot(side, count, slot))
    return slots


def mixed(dtype=FP32):
    """Columns in some slots, rows in others."""
    slots = Slots(len(COUNTS), INPUTS, OUTPUTS, dtype)
    for slot, count in enumerate(COUNTS):
        slots.put(slot, one_hot("columns" if slot % 2 else "rows", count, slot))
    return slots


def step(batch, dtype=FP32):
    """Outputs of a base weight, a slice of a wider packed one as q, k and v are, its inputs, and the tokens' slots."""
    slot_T = torch.tensor(BATCHES[batch], dtype=torch.int64)
    generator = torch.Generator().manual_seed(7)
    packed = torch.randn(len(slot_T), OUTPUTS + 30, generator=generator).to(dtype)
    return packed[:, 11 : 11 + OUTPUTS], torch.randn(len(slot_T), INPUTS, generator=generator).to(dtype), slot_T
