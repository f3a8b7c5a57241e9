"""Entries that a slot trains now, with their values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Held", "find"]


@dataclass(frozen=True)
class Held:
    """Entries that a slot trains, in the order they came.

    Attributes:
        index: flat offsets, int32 (int64 for a parameter too large for it), `[n]`.
        values: what is trained, `[n]`.
        base: the base's values there, in its type, `[n]`.
        born: the update that chose each, from 1, int32 `[n]`.
    """

    index: Tensor
    values: Tensor
    base: Tensor
    born: Tensor

    @classmethod
    def none(cls, target: Tensor) -> Held:
        """No entries of a parameter."""
        wide = target.numel() > torch.iinfo(torch.int32).max
        index = torch.empty(0, dtype=torch.int64 if wide else torch.int32, device=target.device)
        return cls(
            index, index.to(torch.promote_types(target.dtype, torch.float32)), index.to(target.dtype), index.to(torch.int32)
        )

    @classmethod
    def of(cls, state: Mapping[str, Tensor], device: torch.device) -> Held:
        """Entries by the names of the attributes; `vars(held)` gives them."""
        return cls(*(state[key].to(device) for key in ("index", "values", "base", "born")))

    def joined(self, fresh: Held) -> Held:
        """These entries, then others."""
        return Held(*(torch.cat(pair) for pair in zip(vars(self).values(), vars(fresh).values(), strict=True)))

    def keep_(self, earlier: Held, place: Tensor) -> None:
        """Take over, where `place` is not −1, what stood at that place of `earlier`."""
        kept = place >= 0
        for tensor, before in zip(vars(self).values(), vars(earlier).values(), strict=True):
            tensor[kept] = before[place[kept]]


def find(haystack: Tensor, needles: Tensor) -> Tensor:
    """Position of each needle in a tensor of distinct numbers, −1 where it is missing."""
    if haystack.numel() == 0:
        return torch.full_like(needles, -1)
    ordered, order = haystack.sort()
    place = torch.searchsorted(ordered, needles).clamp_(max=haystack.numel() - 1)
    return torch.where(ordered[place] == needles, order[place], -1)
