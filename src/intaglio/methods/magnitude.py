"""Entries chosen by the size of the pre-trained weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from ..core import scores
from ..method_kinds.entry_method import ScoredMethod

__all__ = ["PaFi"]


@final
@dataclass(frozen=True)
class PaFi(ScoredMethod):
    """Train the `budget` entries of smallest magnitude, score −|w|, fixed before training and free of data.

    Args:
        budget: entries (int) or share of the candidates (float in (0, 1]); default 0.01.
        include: shell patterns of parameter names; default all.
        exclude: shell patterns of parameter names that are left alone; default none.

    Raises:
        ValueError: at attach, for a budget outside the candidates or a pattern that matches nothing.

    Example:
        >>> PaFi(budget=0.005).budget
        0.005

    Paper: PaFi, arXiv 2305.16742, section 3.

    Differences: exact under ties (tensor order, then offset), where a threshold takes too many or too few.
    """

    name = "pafi"
    summary = "scattered entries of smallest magnitude"

    budget: int | float = 0.01
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def score(self, name: str, weight: Tensor) -> Tensor:
        return -scores.magnitude(weight)
