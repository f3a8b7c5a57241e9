"""Packed offsets: the same back, and nothing else accepted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from intaglio.adapter import packing
from intaglio.adapter.record import Record, stored_index
from intaglio.core.entries import Elements, Slices


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_pack_and_unpack(data: st.DataObject) -> None:
    numel = data.draw(st.one_of(st.integers(1, 300), st.integers(2**16 - 2, 2**16 + 2), st.integers(1, 2**21)), "numel")
    chosen = data.draw(st.sets(st.integers(0, numel - 1), max_size=50))
    index = torch.tensor(sorted(chosen), dtype=torch.int64)
    packed = packing.pack(index, numel)
    assert (packed.dtype, packed.numel()) == (torch.int16, packing.packed_size(index.numel(), numel))
    packing.check(packed, index.numel())
    assert torch.equal(packing.unpack(packed, index.numel()), index)


def test_offsets_beyond_32_bits() -> None:
    """ID3 checklist 5: offsets on both sides of 2^16, 2^31 and 2^32 come back."""
    index = torch.tensor([5, 2**16 - 1, 2**16, 2**31, 2**32 + 7, 2**33 - 1])
    assert torch.equal(packing.unpack(packing.pack(index, 2**33), 6), index)


def test_every_offset_of_a_full_block() -> None:
    index = torch.arange(2**17)
    assert torch.equal(packing.unpack(packing.pack(index, 2**17), 2**17), index)


@pytest.mark.parametrize(
    ("count", "numel", "pays"), [(1, 10, False), (2, 10, False), (3, 10, True), (4, 65537, False), (5, 65537, True)]
)
def test_packed_where_it_is_smaller(count: int, numel: int, pays: bool) -> None:
    entries = Elements((numel,), torch.arange(count))
    index = stored_index(entries)
    assert index is not None
    assert index.dtype == (torch.int16 if pays else torch.int32)
    assert index.nbytes == min(4 * count, 2 * packing.packed_size(count, numel))
    assert torch.equal(Record.of(entries, torch.float32, "").entries(index).flat(), torch.arange(count))


def test_slices_are_not_packed() -> None:
    index = stored_index(Slices((70000, 2), 0, torch.arange(5)))
    assert index is not None
    assert index.dtype == torch.int32


@pytest.mark.parametrize("damage", ["too few", "negative", "unsorted", "range", "type", "shape"])
def test_damaged_packed_indices_are_refused(damage: str) -> None:
    entries = Elements((70000,), torch.tensor([3, 9, 65536, 65537, 69000]))
    record, index = Record.of(entries, torch.float32, ""), stored_index(entries)
    assert index is not None
    if damage == "too few":
        index[-2] -= 1
    elif damage == "negative":
        index[-4:] = torch.tensor([6, -1], dtype=torch.int32).view(torch.int16)
    elif damage == "unsorted":
        index[[0, 1]] = index[[1, 0]]
    elif damage == "range":
        index[4] = -1  # 65535 in the last block, which has 4464 weights
    elif damage == "type":
        index = index.int()
    else:
        index = index[:-1]
    with pytest.raises(ValueError, match=r"indices|index"):
        record.entries(index)
