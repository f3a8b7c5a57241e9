"""Compact slots: of each loaded adapter a weight's index and values, of any number, side by side in one buffer.

Sizes are written as suffixes: R rank, I inputs, O outputs, N chosen columns or rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["OneHot", "Pool", "Slots", "recognise"]

Side = Literal["columns", "rows"]


@dataclass(frozen=True, eq=False)
class OneHot:
    """The change of one weight that a one-hot LoRA stands for.

        columns: y += Σ_j x[index_j] · values_j          values [N, O], the changed columns of W as rows
        rows:    y[index_j] += x · values_j              values [N, I], the changed rows of W

    Args:
        side: what was changed.
        index: positions of the columns or rows, int32 `[N]`, distinct; N may be 0.
        values: tuned minus base.
    """

    side: Side
    index: Tensor
    values: Tensor


def recognise(a_RI: Tensor, b_OR: Tensor) -> OneHot | None:
    """Read index and values out of a LoRA whose one factor holds zeros and ones, as `intaglio export --to lora` writes it.

    Zero rows of A and columns of B (padding up to the rank) contribute nothing and are dropped. Nothing is rounded: values
    are copied as they are. B may have been multiplied by LoRA's scale already where A is the one-hot factor; a scaled
    one-hot B is not recognised, since multiplying A by it could round.

    Args:
        a_RI: lora_A.weight.
        b_OR: lora_B.weight.

    Returns:
        None for any other LoRA: a value beside 0 and 1, two in one row, or a position chosen twice.

    Example:
        >>> recognise(torch.eye(2, 6), torch.ones(4, 2)).index.tolist()
        [0, 1]
    """
    chosen = _one_hot(a_RI)
    if chosen is not None:
        return OneHot("columns", chosen[1].int(), b_OR.T[chosen[0]].contiguous())
    chosen = _one_hot(b_OR.T)
    if chosen is not None:
        return OneHot("rows", chosen[1].int(), a_RI[chosen[0]].contiguous())
    return None


def _one_hot(rows: Tensor) -> tuple[Tensor, Tensor] | None:
    """The rows that are not zero, and where each holds its single one; None where that is not what they hold."""
    present = rows != 0
    counts = present.sum(1)
    kept = counts.nonzero().flatten()
    index = present[kept].int().argmax(1) if kept.numel() else kept
    single = bool((counts <= 1).all()) and bool((rows[kept, index] == 1).all())
    return (kept, index) if single and index.unique().numel() == index.numel() else None


class Pool:
    """Index and values of one side of one weight for all slots, each as long as it is, in one buffer.

    A slot's entries lie side by side; `spans[slot]` is where they start and how many they are (0: none), which is all that
    a kernel has to read. A new slot takes the first gap that is wide enough, and the buffer grows where there is none.

    Args:
        slots: how many adapters can be loaded at a time.
        width: length of one value row.
        dtype: of the values.
        device: of all tensors.
    """

    def __init__(self, slots: int, width: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        self.index = torch.empty(0, dtype=torch.int32, device=device)
        self.values = torch.empty(0, width, dtype=dtype, device=device)
        self.spans = torch.zeros(slots, 2, dtype=torch.int32, device=device)
        self.version = 0  # counts changes: what was computed from an earlier one is stale
        self._spans = [(0, 0)] * slots

    def put(self, slot: int, index: Tensor, values: Tensor) -> None:
        """Fill a slot, in place of what it held.

        Args:
            slot: from 0.
            index: int `[N]`, distinct.
            values: `[N, width]`, cast to the pool's type.
        """
        self.clear(slot)
        start, count = self._room(index.numel()), index.numel()
        self.index[start : start + count] = index
        self.values[start : start + count] = values
        self._set(slot, start, count)

    def clear(self, slot: int) -> None:
        """Empty a slot; its room is used again."""
        self._set(slot, 0, 0)

    def get(self, slot: int) -> tuple[Tensor, Tensor]:
        """Index and values of a slot, as views."""
        start, count = self._spans[slot]
        return self.index[start : start + count], self.values[start : start + count]

    def span(self, slot: int) -> tuple[int, int]:
        """Where a slot's entries start and how many they are."""
        return self._spans[slot]

    @property
    def widest(self) -> int:
        """Entries of the largest slot."""
        return max((count for _, count in self._spans), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, gaps included."""
        return sum(t.numel() * t.element_size() for t in (self.index, self.values, self.spans))

    def _set(self, slot: int, start: int, count: int) -> None:
        self._spans[slot] = start, count
        self.spans[slot] = torch.tensor([start, count], dtype=torch.int32)
        self.version += 1

    def _room(self, count: int) -> int:
        """Where `count` entries fit."""
        end = 0
        for start, taken in sorted(span for span in self._spans if span[1]):
            if start - end >= count:
                return end
            end = start + taken
        if end + count > len(self.index):
            self._grow(max(end + count, len(self.index) * 9 // 8))  # an eighth more, lest each of many loads copies all
        return end

    def _grow(self, capacity: int) -> None:
        index, values = self.index.new_zeros(capacity), self.values.new_zeros(capacity, self.values.shape[1])
        index[: len(self.index)] = self.index
        values[: len(self.values)] = self.values
        self.index, self.values = index, values


class Slots:
    """All adapters of one weight: columns of some, rows of others.

    Args:
        slots: how many adapters can be loaded at a time.
        inputs: of the weight.
        outputs: of the weight.
        dtype: of the values.
        device: of all tensors.
    """

    def __init__(self, slots: int, inputs: int, outputs: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        self.columns = Pool(slots, outputs, dtype, device)
        self.rows = Pool(slots, inputs, dtype, device)

    def put(self, slot: int, change: OneHot) -> None:
        """Fill a slot, in place of what it held."""
        self.clear(slot)
        (self.columns if change.side == "columns" else self.rows).put(slot, change.index, change.values)

    def clear(self, slot: int) -> None:
        """Empty a slot."""
        self.columns.clear(slot)
        self.rows.clear(slot)

    @property
    def nbytes(self) -> int:
        """Bytes of both sides."""
        return self.columns.nbytes + self.rows.nbytes
