"""The computation on a CPU: a step's tokens are sorted out once, then every layer adds its adapters in a few calls.

Suffixes: T tokens, N entries over all short runs, I inputs, O outputs. Its plain twin is in the tests.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .slots import Pool, Slots

__all__ = ["Batch", "add", "add_columns", "add_rows"]

_LONG = 8  # from so many tokens of one adapter in a row (a prompt) a matrix product is faster than row after row


@dataclass(frozen=True, eq=False)
class Bag:
    """The entries that the tokens of short runs touch, token after token: one line per token and entry.

    Args:
        rows: where the entry lies in the pool, int64 `[N]`.
        tokens: whose it is.
        places: the column or row of the weight.
        offsets: where each token's entries start, int64 `[T + 1]`; a token without an adapter has none.
        spans: (token, start in the pool, count) of each token that has some.
    """

    rows: Tensor
    tokens: Tensor
    places: Tensor
    offsets: Tensor
    spans: list[tuple[int, int, int]]


class Batch:
    """Which tokens of a step use which slot, for all layers; decoding steps with the same users share it.

    Args:
        slot_T: the slot of each token, −1: none.
    """

    def __init__(self, slot_T: Tensor) -> None:
        self.slot_T = slot_T.clone()
        slots, lengths = torch.unique_consecutive(self.slot_T, return_counts=True)
        self._short: list[tuple[int, int]] = []  # token, slot
        self.long: list[tuple[int, int, int]] = []  # first token, last + 1, slot
        start = 0
        for slot, length in zip(slots.tolist(), lengths.tolist(), strict=True):
            if slot >= 0 and length >= _LONG:
                self.long.append((start, start + length, slot))
            elif slot >= 0:
                self._short += [(token, slot) for token in range(start, start + length)]
            start += length
        self._bags: dict[Pool, tuple[int, Bag | None]] = {}

    def fits(self, slot_T: Tensor) -> bool:
        """Whether these are the tokens it was made for."""
        return torch.equal(self.slot_T, slot_T)

    def bag(self, pool: Pool) -> Bag | None:
        """What the short runs touch in `pool`, worked out again when an adapter was loaded; None: nothing."""
        version, bag = self._bags.get(pool, (-1, None))
        if version != pool.version:
            bag = self._collect(pool)
            self._bags[pool] = pool.version, bag
        return bag

    def _collect(self, pool: Pool) -> Bag | None:
        spans = [(token, *pool.span(slot)) for token, slot in self._short if pool.span(slot)[1]]
        if not spans:
            return None
        counts_T = torch.zeros(len(self.slot_T), dtype=torch.int64)
        for token, _, count in spans:
            counts_T[token] = count
        rows = torch.cat([torch.arange(start, start + count) for _, start, count in spans])
        tokens = torch.repeat_interleave(torch.arange(len(counts_T)), counts_T)
        offsets = functional.pad(counts_T.cumsum(0), (1, 0))
        return Bag(rows, tokens, pool.index[rows].long(), offsets, spans)


def add(y_TO: Tensor, x_TI: Tensor, slots: Slots, batch: Batch) -> None:
    """Add to each token's output the change of its slot's adapter, in place.

    Args:
        y_TO: outputs of the base weight, float `[tokens, outputs]`, of any strides.
        x_TI: its inputs, of the adapters' type.
        slots: the loaded adapters of this weight.
        batch: whose tokens they are.
    """
    add_columns(y_TO, x_TI, slots.columns, batch)
    add_rows(y_TO, x_TI, slots.rows, batch)


def add_columns(y_TO: Tensor, x_TI: Tensor, pool: Pool, batch: Batch) -> None:
    """y[t] += Σ_j x[t, index_j] · values_j. Arguments as `add`.

    For tokens that have each their own adapter this is a bag of embeddings: the pool is the table, the gathered inputs
    are the weights, and no adapter's values are copied together first.
    """
    bag = batch.bag(pool)
    if bag is not None:
        weights = x_TI[bag.tokens, bag.places]
        y_TO += functional.embedding_bag(
            bag.rows, pool.values, bag.offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
        )
    for start, stop, slot in batch.long:
        index, values = pool.get(slot)
        if len(index):
            y_TO[start:stop].addmm_(x_TI[start:stop, index], values)


def add_rows(y_TO: Tensor, x_TI: Tensor, pool: Pool, batch: Batch) -> None:
    """y[t, index_j] += x[t] · values_j. Arguments as `add`. No two sums meet: the rows of one adapter are distinct."""
    bag = batch.bag(pool)
    if bag is not None:
        products = torch.cat([pool.values[start : start + count] @ x_TI[token] for token, start, count in bag.spans])
        y_TO[bag.tokens, bag.places] += products
    for start, stop, slot in batch.long:
        index, values = pool.get(slot)
        if len(index):
            y_TO[start:stop, index] += x_TI[start:stop] @ values.T
