"""Scattered entries drawn uniformly: the control any informed choice of single weights must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from ..core import scores
from ..method_kinds.entry_method import ScoredMethod

__all__ = ["Random"]


@final
@dataclass(frozen=True)
class Random(ScoredMethod):
    """Train `budget` single entries drawn uniformly from all candidate tensors, fixed before training.

    Args:
        budget: entries (int) or share of the candidates (float in (0, 1]); default 0.01.
        include: shell patterns of parameter names; default all.
        exclude: shell patterns of parameter names that are left alone; default none.
        seed: the same seed gives the same entries on every machine, rank and call order; default 0.

    Raises:
        ValueError: at attach, for a budget outside the candidates or a pattern that matches nothing.

    Example:
        >>> Random(budget=1000, include=("*.mlp.*",)).name
        'random'

    Paper: the random mask of SHiRA (arXiv 2406.13175, section 3) and of SpFT studies.

    Differences: one global draw over all tensors with an exact total, instead of a draw per tensor; the mask is
    rebuilt from (seed, name) and also stored in the adapter.
    """

    name = "random"
    summary = "scattered entries, drawn uniformly"

    budget: int | float = 0.01
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    seed: int = 0

    def score(self, name: str, weight: Tensor) -> Tensor:
        return scores.random(tuple(weight.shape), seed=self.seed, key=name)
