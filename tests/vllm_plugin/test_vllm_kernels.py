"""The Triton kernels in Triton's interpreter, against the plain twin. No GPU is needed, but the package `triton` is."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

import pytest
import torch

pytest.importorskip("triton", reason="the kernels are written in Triton, which is not installed")

from intaglio.vllm_plugin import kernels
from support import vllm_reference as reference
from support.vllm import BATCHES, BF16, FP32, mixed, ragged, step

MAKE = {"columns": lambda d: ragged("columns", d), "rows": lambda d: ragged("rows", d), "mixed": mixed}


@pytest.mark.parametrize("tiled", [False, True], ids=["tokens", "tiles"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("side", MAKE)
def test_kernels_compute_what_the_plain_twin_does(side, batch, dtype, tiled):
    """Ragged sizes, an empty slot, tokens without one, outputs inside a wider tensor, nothing a multiple of a block."""
    slots = MAKE[side](dtype)
    y, x, slot_T = step(batch, dtype)
    whole = y._base.clone()
    expected, before = y.clone(), y.clone()
    reference.add(expected, x, slots, slot_T)
    kernels.add(y, x, slots, slot_T, tiled=tiled)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == FP32 else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(y, expected, **tolerance)
    idle = (slot_T == -1) | (slot_T == 1)
    assert torch.equal(y[idle], before[idle])
    assert torch.equal(y._base[:, :11], whole[:, :11])
    assert torch.equal(y._base[:, 11 + y.shape[1] :], whole[:, 11 + y.shape[1] :])


def test_without_any_adapter_nothing_is_launched():
    slots = mixed()
    for slot in range(5):
        slots.clear(slot)
    y, x, slot_T = step("decoding")
    before = y.clone()
    kernels.add(y, x, slots, slot_T, tiled=True)
    assert torch.equal(y, before)
