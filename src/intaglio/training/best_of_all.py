"""The best entries over all processes, exactly, without the candidates travelling: by radix selection."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..core.budget import TopK
from . import ranks

__all__ = ["best_of_all"]


def best_of_all(best: TopK, k: int) -> TopK:
    """The k best of what all processes hold, the same in each, in the order in which one process would have them.

    What travels is counts, 8 KB for each choice and 16 more where it ends among equals, and then the chosen ones.

    Args:
        best: this process's, of entries that no other holds; scores are fp32 and at least 0.
        k: how many are wanted.
    """
    if ranks.count() == 1:
        return best
    score, key, payload = best.held()
    chosen = _among_best(score, key, k)
    return TopK.of(k, *(ranks.joined(tensor[chosen]) for tensor in (score, key, payload)))


def _among_best(score: Tensor, key: Tensor, k: int) -> Tensor:
    """Which of this process's entries are among the k best of all: by score, then by smallest key.

    By radix selection: the processes count how many scores begin with each byte, which tells the byte that the k-th begins
    with, and go on to the next byte among those that share it. Four bytes settle a score; ties go on with the key's eight.
    """
    bits = score.float().view(torch.int32).long()  # of numbers ≥ 0: ordered as the numbers are
    sure, tied, left = _smallest(~bits & 0xFFFFFFFF, torch.ones_like(bits, dtype=torch.bool), k, range(24, -8, -8))
    return sure | _smallest(key, tied, left, range(56, -8, -8))[0] if left else sure


def _smallest(number: Tensor, among: Tensor, k: int, shifts: Iterable[int]) -> tuple[Tensor, Tensor, int]:
    """Of `among`, the k smallest numbers of all processes: (surely chosen, equal at the edge, how many of these)."""
    sure = torch.zeros_like(among)
    for shift in shifts:
        digit = (number >> shift) & 255
        counts = ranks.total(torch.bincount(digit[among], minlength=256)).tolist()
        if sum(counts) <= k:
            return sure | among, torch.zeros_like(among), 0
        edge = 0
        while counts[edge] < k:
            k -= counts[edge]
            edge += 1
        sure |= among & (digit < edge)
        among = among & (digit == edge)
        if counts[edge] == k:
            return sure | among, torch.zeros_like(among), 0
    return sure, among, k
