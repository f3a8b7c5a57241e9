"""Triton kernels: the change of every token's adapter, added to the base's output in one launch per side.

Each side has two. The first has one program per token and is for decoding, where each token has an adapter of its own. The
second multiplies tiles of tokens with `tl.dot` and is for prompts: a tile makes one pass for each slot among its tokens, so
that nothing has to be sorted and nothing is asked of the host. Sums are fp32 in all, a token without a slot (−1) is left as
it is, and the rows of one adapter are distinct, so that scattering needs no atomics. Their plain twin is in the tests.

Tested in Triton's interpreter (`TRITON_INTERPRET=1`). No GPU has run them yet: block sizes are guesses. The interpreter takes
the bits of bfloat16 for integers in `tl.dot`, so there both sides are widened to fp32 first, which changes no product.
"""

# A kernel is launched as kernel[grid](…).
# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

import os

import triton
import triton.language as tl
from torch import Tensor

from .slots import Pool, Slots

__all__ = ["add", "add_columns", "add_rows"]

_WIDEN = os.environ.get("TRITON_INTERPRET") == "1"


def add(y_TO: Tensor, x_TI: Tensor, slots: Slots, slot_T: Tensor, *, tiled: bool) -> None:
    """Add to each token's output the change of its slot's adapter, in place.

    Args:
        y_TO: outputs of the base weight; the last dimension is contiguous.
        x_TI: its inputs; the last dimension is contiguous.
        slots: the loaded adapters of this weight.
        slot_T: the slot of each token, an integer type; −1: none.
        tiled: tiles of tokens, for prompts; else token after token, for decoding.
    """
    add_columns(y_TO, x_TI, slots.columns, slot_T, tiled=tiled)
    add_rows(y_TO, x_TI, slots.rows, slot_T, tiled=tiled)


def add_columns(y_TO: Tensor, x_TI: Tensor, pool: Pool, slot_T: Tensor, *, tiled: bool) -> None:
    """y[t] += Σ_j x[t, index_j] · values_j. Arguments as `add`."""
    if pool.widest == 0 or len(y_TO) == 0:
        return
    tensors = (y_TO, x_TI, pool.index, pool.values, pool.spans, slot_T)
    tokens, outputs = y_TO.shape
    sizes = (y_TO.stride(0), x_TI.stride(0), pool.values.stride(0), outputs)
    if tiled:
        _columns_tiled[(triton.cdiv(tokens, 16), triton.cdiv(outputs, 64))](
            *tensors, tokens, *sizes, TOKENS=16, ENTRIES=32, OUTPUTS=64, WIDEN=_WIDEN
        )
    else:
        _columns[(tokens, triton.cdiv(outputs, 128))](*tensors, *sizes, ENTRIES=32, OUTPUTS=128)


def add_rows(y_TO: Tensor, x_TI: Tensor, pool: Pool, slot_T: Tensor, *, tiled: bool) -> None:
    """y[t, index_j] += x[t] · values_j. Arguments as `add`."""
    if pool.widest == 0 or len(y_TO) == 0:
        return
    tensors = (y_TO, x_TI, pool.index, pool.values, pool.spans, slot_T)
    tokens, inputs = x_TI.shape
    sizes = (y_TO.stride(0), x_TI.stride(0), pool.values.stride(0), inputs)
    if tiled:
        _rows_tiled[(triton.cdiv(tokens, 16), triton.cdiv(pool.widest, 32))](
            *tensors, tokens, *sizes, TOKENS=16, ENTRIES=32, INPUTS=64, WIDEN=_WIDEN
        )
    else:
        _rows[(tokens, triton.cdiv(pool.widest, 16))](*tensors, *sizes, ENTRIES=16, INPUTS=128)


@triton.jit
def _columns(
    y, x, index, values, spans, slots, y_step, x_step, values_step, outputs, ENTRIES: tl.constexpr, OUTPUTS: tl.constexpr
):
    """One token, OUTPUTS of its outputs."""
    token = tl.program_id(0)
    slot = tl.load(slots + token)
    if slot >= 0:
        start = tl.load(spans + 2 * slot)
        count = tl.load(spans + 2 * slot + 1)
        out = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
        total = tl.zeros((OUTPUTS,), dtype=tl.float32)
        for first in range(0, count, ENTRIES):
            entry = first + tl.arange(0, ENTRIES)
            place = tl.load(index + start + entry, mask=entry < count, other=0)
            gathered = tl.load(x + token * x_step + place, mask=entry < count, other=0.0).to(tl.float32)
            row = (start + entry).to(tl.int64) * values_step
            inside = (entry < count)[:, None] & (out < outputs)[None, :]
            block = tl.load(values + row[:, None] + out[None, :], mask=inside, other=0.0).to(tl.float32)
            total += tl.sum(gathered[:, None] * block, axis=0)
        if count > 0:
            at = y + token * y_step + out
            old = tl.load(at, mask=out < outputs, other=0.0).to(tl.float32)
            tl.store(at, (old + total).to(y.dtype.element_ty), mask=out < outputs)


@triton.jit
def _rows(y, x, index, values, spans, slots, y_step, x_step, values_step, inputs, ENTRIES: tl.constexpr, INPUTS: tl.constexpr):
    """One token, ENTRIES of its adapter's rows."""
    token = tl.program_id(0)
    slot = tl.load(slots + token)
    if slot >= 0:
        start = tl.load(spans + 2 * slot)
        count = tl.load(spans + 2 * slot + 1)
        entry = tl.program_id(1) * ENTRIES + tl.arange(0, ENTRIES)
        if tl.program_id(1) * ENTRIES < count:
            row = (start + entry).to(tl.int64) * values_step
            total = tl.zeros((ENTRIES,), dtype=tl.float32)
            for first in range(0, inputs, INPUTS):
                place = first + tl.arange(0, INPUTS)
                given = tl.load(x + token * x_step + place, mask=place < inputs, other=0.0).to(tl.float32)
                inside = (entry < count)[:, None] & (place < inputs)[None, :]
                block = tl.load(values + row[:, None] + place[None, :], mask=inside, other=0.0).to(tl.float32)
                total += tl.sum(block * given[None, :], axis=1)
            at = y + token * y_step + tl.load(index + start + entry, mask=entry < count, other=0)
            old = tl.load(at, mask=entry < count, other=0.0).to(tl.float32)
            tl.store(at, (old + total).to(y.dtype.element_ty), mask=entry < count)


@triton.jit
def _columns_tiled(
    y, x, index, values, spans, slots, tokens, y_step, x_step, values_step, outputs,
    TOKENS: tl.constexpr, ENTRIES: tl.constexpr, OUTPUTS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens, OUTPUTS of their outputs; one pass for each slot among them, the highest first."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    slot = tl.load(slots + token, mask=token < tokens, other=-1)
    out = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    total = tl.zeros((TOKENS, OUTPUTS), dtype=tl.float32)
    current = tl.max(slot, axis=0)
    while current >= 0:
        mine = slot == current
        start = tl.load(spans + 2 * current)
        count = tl.load(spans + 2 * current + 1)
        for first in range(0, count, ENTRIES):
            entry = first + tl.arange(0, ENTRIES)
            place = tl.load(index + start + entry, mask=entry < count, other=0)
            here = mine[:, None] & (entry < count)[None, :]
            gathered = tl.load(x + token[:, None] * x_step + place[None, :], mask=here, other=0.0)
            row = (start + entry).to(tl.int64) * values_step
            inside = (entry < count)[:, None] & (out < outputs)[None, :]
            block = tl.load(values + row[:, None] + out[None, :], mask=inside, other=0.0)
            if WIDEN:
                gathered, block = gathered.to(tl.float32), block.to(tl.float32)
            total = tl.dot(gathered, block, total, input_precision="ieee")
        current = tl.max(tl.where(slot < current, slot, -1), axis=0)
    inside = (slot >= 0)[:, None] & (out < outputs)[None, :]
    at = y + token[:, None] * y_step + out[None, :]
    old = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, (old + total).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _rows_tiled(
    y, x, index, values, spans, slots, tokens, y_step, x_step, values_step, inputs,
    TOKENS: tl.constexpr, ENTRIES: tl.constexpr, INPUTS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens, ENTRIES rows of each of their adapters; one pass for each slot among them, the highest first."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    slot = tl.load(slots + token, mask=token < tokens, other=-1)
    entry = tl.program_id(1) * ENTRIES + tl.arange(0, ENTRIES)
    current = tl.max(slot, axis=0)
    while current >= 0:
        start = tl.load(spans + 2 * current)
        count = tl.load(spans + 2 * current + 1)
        if tl.program_id(1) * ENTRIES < count:
            mine = (slot == current)[:, None]
            row = (start + entry).to(tl.int64) * values_step
            total = tl.zeros((TOKENS, ENTRIES), dtype=tl.float32)
            for first in range(0, inputs, INPUTS):
                place = first + tl.arange(0, INPUTS)
                given = tl.load(x + token[:, None] * x_step + place[None, :], mask=mine & (place < inputs)[None, :], other=0.0)
                inside = (place < inputs)[:, None] & (entry < count)[None, :]
                block = tl.load(values + row[None, :] + place[:, None], mask=inside, other=0.0)
                if WIDEN:
                    given, block = given.to(tl.float32), block.to(tl.float32)
                total = tl.dot(given, block, total, input_precision="ieee")
            chosen = tl.load(index + start + entry, mask=entry < count, other=0)
            at = y + token[:, None] * y_step + chosen[None, :]
            touched = mine & (entry < count)[None, :]
            old = tl.load(at, mask=touched, other=0.0).to(tl.float32)
            tl.store(at, (old + total).to(y.dtype.element_ty), mask=touched)
        current = tl.max(tl.where(slot < current, slot, -1), axis=0)
