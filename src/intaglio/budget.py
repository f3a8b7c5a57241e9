"""Spending a budget: from a count or a share to a number of entries, and from scores to the entries themselves."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from .selection import Selection, from_flat

__all__ = ["resolve_budget", "top_k"]


def resolve_budget(budget: int | float, total: int, *, name: str = "budget", unit: str = "candidates") -> int:
    """Turn a budget into a number of entries: an int counts entries, a float in (0, 1] is a share of `total`.

    >>> resolve_budget(0.5, 7), resolve_budget(3, 7)
    (4, 3)

    Args:
        budget: entries (int, 1 … total) or share (float, 0 < share ≤ 1; rounded half up).
        total: number of candidates, entries or units.
        name: the argument's name for the error.
        unit: what is counted, for the error.

    Raises:
        ValueError: outside those ranges, or where a share rounds to nothing.
    """
    if total == 0:
        raise ValueError(f"{name}={budget}: of the {unit} nothing is left to choose from; exclude less")
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        raise ValueError(f"{name}={budget!r}: give a whole number (a count) or a fraction in (0, 1] (a share)")
    if isinstance(budget, int):
        if not 1 <= budget <= total:
            raise ValueError(f"{name}={budget}: a count must lie between 1 and the {total:,} {unit}")
        return budget
    if not 0.0 < budget <= 1.0:
        raise ValueError(f"{name}={budget}: a share must be above 0 and at most 1.0")
    resolved = math.floor(budget * total + 0.5)
    if resolved == 0:
        least = math.ceil(1e4 / total) / 1e4
        raise ValueError(f"{name}={budget}: rounds to nothing of {total:,} {unit}; give at least {least} or a count")
    return resolved


@torch.no_grad()
def top_k(scores: Iterable[tuple[str, Tensor]], k: int) -> Selection:
    """Choose the k highest scores over all tensors, exactly, also under ties.

    Total order: score descending, then tensor order, then flat offset ascending. Tensors may come from a generator;
    one is held at a time, beside a buffer of a few k candidates.

    Args:
        scores: pairs of name and score tensor (the parameter's shape, any float type, finite or ±inf); higher is better.
        k: number of entries, 1 ≤ k ≤ all entries.

    Returns:
        Elements (Whole where a tensor is chosen entirely), in tensor order.

    Raises:
        ValueError: where a score is NaN, or there are fewer than k entries.
    """
    if k < 1:
        raise ValueError(f"k={k}: must be at least 1")
    shapes: dict[str, tuple[int, ...]] = {}
    best = _Candidates(k)
    for rank, (name, score) in enumerate(scores):
        shapes[name] = tuple(score.shape)
        flat = score.reshape(-1).to(torch.promote_types(score.dtype, torch.float32))
        if flat.dtype != best.dtype and rank:
            raise ValueError(f"the scores of {name!r} are {score.dtype}, those before it were not; score in one type")
        if bool(flat.isnan().any()):
            raise ValueError(f"the score of {name!r} is NaN")
        best.add(rank, flat)
    owner, offset = best.winners()
    chosen = {name: offset[owner == rank].sort().values for rank, name in enumerate(shapes)}
    return Selection({name: from_flat(shapes[name], flat) for name, flat in chosen.items() if flat.numel()})


class _Candidates:
    """The k best of all scores added so far, in a buffer of about 3k (more under ties), sorted only when it is full."""

    def __init__(self, k: int) -> None:
        self._k, self._threshold, self._full = k, float("-inf"), False
        self._score, self._owner, self._offset = (
            torch.empty(0),
            torch.empty(0, dtype=torch.int64),
            torch.empty(0, dtype=torch.int64),
        )

    @property
    def dtype(self) -> torch.dtype:
        """Type of the scores held."""
        return self._score.dtype

    def add(self, rank: int, flat: Tensor) -> None:
        """Add a tensor's scores; tensors come in order, so a tie with what is held loses."""
        keep = (flat > self._threshold).nonzero().flatten() if self._full else torch.arange(flat.numel(), device=flat.device)
        if keep.numel() > self._k:
            keep = keep[_leading(flat[keep], self._k)]
        self._score = torch.cat([self._score, flat[keep].cpu()])
        self._owner = torch.cat([self._owner, torch.full((keep.numel(),), rank)])
        self._offset = torch.cat([self._offset, keep.cpu()])
        if self._score.numel() > 2 * self._k:
            self._prune()

    def winners(self) -> tuple[Tensor, Tensor]:
        """(tensor rank, flat offset) of the k best."""
        if self._score.numel() < self._k:
            raise ValueError(f"k={self._k}: more than the {self._score.numel():,} entries scored")
        self._prune()
        return self._owner, self._offset

    def _prune(self) -> None:
        # Stable, and what is held stands before what came later: ties keep tensor order, then offset order.
        order = torch.sort(self._score, descending=True, stable=True).indices[: self._k]
        self._score, self._owner, self._offset = self._score[order], self._owner[order], self._offset[order]
        self._full, self._threshold = True, self._score[-1].item()


def _leading(flat: Tensor, k: int) -> Tensor:
    """Offsets, ascending, of all entries that can be among the k best of one tensor (ties at the k-th included)."""
    if flat.numel() <= k:
        return torch.arange(flat.numel(), device=flat.device)
    return (flat >= torch.topk(flat, k).values[-1]).nonzero().flatten()
