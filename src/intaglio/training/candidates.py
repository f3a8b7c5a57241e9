"""One pass over a gradient that is about to be freed: the entries that can still be among the best of all tensors."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..core.budget import TopK

__all__ = ["Scorer", "scan"]

CHUNK, BLOCK = 1 << 18, 1 << 10  # entries scored at a time; entries whose largest gradient is looked at first


class Scorer(Protocol):
    """What `scan` asks of a method."""

    def score(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """As `UpdateMethod.score`."""
        ...

    def reach(self, score: float) -> float:
        """As `UpdateMethod.reach`."""
        ...


def scan(gradient: Tensor, weight: Tensor, method: Scorer, best: TopK, rank: int, barred: list[Tensor]) -> bool:
    """Add one tensor's entries to the best so far; False, and nothing added, where a gradient is not finite.

    Args:
        gradient: flat, `[n]`.
        weight: flat, `[n]`.
        method: scores them.
        best: what is kept.
        rank: the tensor's place in the total order.
        barred: flat offsets that must not be chosen; their gradients are set to 0 meanwhile.
    """
    kept = [gradient[offset] for offset in barred]
    for offset in barred:
        gradient[offset] = 0
    finite = _scan(gradient, weight, method, best, rank, barred)
    for offset, values in zip(reversed(barred), reversed(kept), strict=True):  # it may share its storage with another gradient
        gradient[offset] = values
    return finite


def _scan(gradient: Tensor, weight: Tensor, method: Scorer, best: TopK, rank: int, barred: list[Tensor]) -> bool:
    peaks = _peaks(gradient)
    if not bool(peaks.isfinite().all()):
        return False
    for start in range(0, gradient.numel(), CHUNK):
        g, w = gradient[start : start + CHUNK], weight[start : start + CHUNK]
        least = method.reach(best.threshold)
        if least > 0:
            at = _reaching(g, peaks[start // BLOCK : (start + CHUNK) // BLOCK], least)
            best.add(rank, method.score(w[at], g[at]), at + start, g[at])
            continue
        score = method.score(w, g)
        if best.threshold <= 0:  # else their score of 0 bars them
            for offset in barred:
                score[offset[(offset >= start) & (offset < start + g.numel())] - start] = float("-inf")
        at = (score >= best.threshold).nonzero().flatten() if best.threshold > float("-inf") else (score >= 0).nonzero().flatten()
        best.add(rank, score[at], at + start, g[at])
    return True


def _peaks(gradient: Tensor) -> Tensor:
    """The largest |gradient| of each block, the last of which may be short; not finite where any of a block is not."""
    whole = gradient.numel() // BLOCK * BLOCK
    blocks, rest = gradient[:whole].view(-1, BLOCK), gradient[whole:].view(1, -1)
    # Two passes without a tensor in between; the one pass of a norm or of aminmax takes three to five times as long.
    peaks = [torch.maximum(part.amax(1), part.amin(1).neg_()) for part in (blocks, rest) if part.numel()]
    return torch.cat(peaks) if peaks else gradient


def _reaching(gradient: Tensor, peaks: Tensor, least: float) -> Tensor:
    """Offsets, ascending, where |gradient| ≥ least; unless they are many, only blocks whose peak reaches it are looked at."""
    rows = (peaks >= least).nonzero().flatten()
    if 4 * rows.numel() > peaks.numel():
        return (gradient.abs() >= least).nonzero().flatten()
    whole = gradient.numel() // BLOCK * BLOCK
    full = rows[rows < whole // BLOCK]
    row, column = (gradient[:whole].view(-1, BLOCK)[full].abs() >= least).nonzero(as_tuple=True)
    found = full[row] * BLOCK + column
    if full.numel() == rows.numel():
        return found
    return torch.cat([found, (gradient[whole:].abs() >= least).nonzero().flatten() + whole])
