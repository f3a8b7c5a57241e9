"""Sorted offsets at two bytes each: the low 16 bits of every offset, then how many fall into each block of 65,536."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check", "pack", "packed_size", "pays", "unpack"]

_BLOCK = 2**16


def packed_size(count: int, numel: int) -> int:
    """Number of int16 that `pack` gives for `count` offsets below `numel`."""
    return count + 2 * _blocks(numel)


def pays(count: int, numel: int) -> bool:
    """Whether packed offsets are fewer bytes than int32."""
    return packed_size(count, numel) < 2 * count


def pack(index: Tensor, numel: int) -> Tensor:
    """Pack sorted offsets below `numel`, `[n]`, to int16 `[packed_size(n, numel)]`."""
    index = index.long()
    counts = torch.bincount(index // _BLOCK, minlength=_blocks(numel)).to(torch.int32)
    low = index % _BLOCK
    return torch.cat([(low - _BLOCK * (low >= _BLOCK // 2)).to(torch.int16), counts.view(torch.int16)])


def unpack(packed: Tensor, count: int) -> Tensor:
    """The offsets, int64 `[count]`, that `pack` was given; unread tensors go through `check` first."""
    counts = _counts(packed, count)
    block = torch.arange(counts.numel(), device=packed.device)
    return block.repeat_interleave(counts, output_size=count) * _BLOCK + packed[:count].long() % _BLOCK


def check(packed: Tensor, count: int) -> None:
    """Refuse what `pack` cannot have made of `count` offsets; the order of the offsets is not looked at.

    Raises:
        ValueError: where the blocks do not hold `count` offsets together.
    """
    held = _counts(packed, count)
    if bool((held < 0).any()) or int(held.sum()) != count:
        raise ValueError(f"{count} indices expected, the blocks of the packed ones hold {int(held.clamp(min=0).sum())}")


def _counts(packed: Tensor, count: int) -> Tensor:
    return packed[count:].clone().view(torch.int32).long()  # a copy, for its address is aligned


def _blocks(numel: int) -> int:
    return -(-numel // _BLOCK)
