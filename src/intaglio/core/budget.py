"""A budget, spent: from a count or a share to a number of entries, and from scores to the entries themselves."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from .entries import from_flat
from .selection import Selection

__all__ = ["TopK", "largest_remainder", "resolve_budget", "top_k", "without"]


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


def largest_remainder(total: int, weights: Sequence[int], ties: random.Random | None = None) -> list[int]:
    """Split `total` in proportion to `weights`; what the floors leave goes to the largest remainders.

    >>> largest_remainder(10, [1, 1, 2])
    [3, 2, 5]

    Args:
        total: what is split.
        weights: at least 0 each, not all 0.
        ties: draws which of equal remainders come first; default None, those that stand first.
    """
    whole = sum(weights)
    parts = [total * weight // whole for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda i: (-(total * weights[i] % whole), ties.random() if ties else i))
    for i in by_remainder[: total - sum(parts)]:
        parts[i] += 1
    return parts


def without(scores: Iterable[tuple[str, Tensor]], excluded: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The scores with those of excluded entries, given by flat offset, behind all others."""
    for name, score in scores:
        if name in excluded:
            score = score.contiguous()
            score.view(-1)[excluded[name].to(score.device)] = float("-inf")
        yield name, score


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
    dtype, best = None, TopK(k)
    for rank, (name, score) in enumerate(scores):
        shapes[name] = tuple(score.shape)
        flat = score.reshape(-1).to(torch.promote_types(score.dtype, torch.float32))
        if flat.dtype != (dtype or flat.dtype):
            raise ValueError(f"the scores of {name!r} are {score.dtype}, those before it were not; score in one type")
        dtype = flat.dtype
        if bool(flat.isnan().any()):
            raise ValueError(f"the score of {name!r} is NaN")
        best.add(rank, flat)
    owner, offset, _ = best.winners()
    if owner.numel() < k:
        raise ValueError(f"k={k}: more than the {owner.numel():,} entries scored")
    chosen = {name: offset[owner == rank].sort().values for rank, name in enumerate(shapes)}
    return Selection({name: from_flat(shapes[name], flat) for name, flat in chosen.items() if flat.numel()})


@final
class TopK:
    """The k best of all scores added so far, in a CPU buffer of a few k, sorted only when it is full.

    Total order: score descending, then tensor rank, then offset ascending, whatever order they are added in.

    Attributes:
        k: how many are wanted.
        threshold: a score below it cannot be among them any more; −inf until k scores were added.
    """

    _OFFSET_BITS = 40  # a tensor of up to 2^40 entries; rank and offset share one int64 key

    def __init__(self, k: int) -> None:
        self.k, self.threshold = k, float("-inf")
        self._scores: list[Tensor] = []
        self._keys: list[Tensor] = []
        self._payloads: list[Tensor] = []
        self._held = 0

    def add(self, rank: int, score: Tensor, offset: Tensor | None = None, payload: Tensor | None = None) -> None:
        """Add scores of one tensor.

        Args:
            rank: the tensor's place in the total order, from 0.
            score: `[n]`, without NaN.
            offset: flat offsets of the scores in the tensor, int64 `[n]`, ascending; default 0 … n − 1.
            payload: one number to keep with each score, `[n]`; default the score.
        """
        keep = _leading(score, self.k, self.threshold)
        chosen = (keep if offset is None else offset[keep]).cpu()
        self._scores.append(score[keep].cpu())
        self._keys.append(chosen + (rank << self._OFFSET_BITS))
        self._payloads.append((score if payload is None else payload)[keep].cpu())
        self._held += keep.numel()
        if self._held > 4 * self.k or (self._held >= self.k and self.threshold == float("-inf")):
            self._prune()

    def revise(self, rank: int, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        """Replace what is held of one tensor: `change(offsets, payloads) → (scores, payloads)`. Returns the offsets."""
        score, key, payload = self._merged()
        mine = (key >> self._OFFSET_BITS) == rank
        offset = key[mine] & ((1 << self._OFFSET_BITS) - 1)
        score[mine], payload[mine] = change(offset, payload[mine])
        return offset

    def held(self) -> tuple[Tensor, Tensor, Tensor]:
        """(scores, keys, payloads) of the k best, best first; a key is tensor rank and offset in one number."""
        self._prune()
        return self._scores[0], self._keys[0], self._payloads[0]

    @classmethod
    def of(cls, k: int, score: Tensor, key: Tensor, payload: Tensor) -> TopK:
        """The k best of what others held."""
        best = cls(k)
        best._scores, best._keys, best._payloads, best._held = [score], [key], [payload], key.numel()
        return best

    def winners(self, k: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(tensor ranks, flat offsets, payloads) of the k best, best first; of all, where there are fewer."""
        self._prune()
        key, payload = self._keys[0][: k or self.k], self._payloads[0][: k or self.k]
        return key >> self._OFFSET_BITS, key & ((1 << self._OFFSET_BITS) - 1), payload

    def _merged(self) -> tuple[Tensor, Tensor, Tensor]:
        empty = torch.empty(0)
        score, payload = torch.cat(self._scores or [empty]), torch.cat(self._payloads or [empty])
        key = torch.cat(self._keys or [empty.long()])
        self._scores, self._keys, self._payloads = [score], [key], [payload]
        return score, key, payload

    def _prune(self) -> None:
        score, key, payload = self._merged()
        order = key.argsort()
        order = order[score[order].sort(descending=True, stable=True).indices][: self.k]
        self._scores, self._keys, self._payloads = [score[order]], [key[order]], [payload[order]]
        self._held = order.numel()
        if self._held == self.k:
            self.threshold = self._scores[0][-1].item()


def _leading(score: Tensor, k: int, threshold: float) -> Tensor:
    """Offsets, ascending, of the k best of one tensor's scores that reach the threshold; of ties the first."""
    if threshold > float("-inf"):
        keep = (score >= threshold).nonzero().flatten()
        return keep if keep.numel() <= k else keep[_leading(score[keep], k, float("-inf"))]
    if score.numel() <= k:
        return torch.arange(score.numel(), device=score.device)
    least = torch.topk(score, k).values[-1]
    above = (score > least).nonzero().flatten()
    tied = (score == least).nonzero().flatten()[: k - above.numel()]
    return torch.cat([above, tied]).sort().values
