"""Entries chosen once, by the gradient of the first update: the controls that step-by-step unmasking must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from ..core import scores
from ..method_kinds.update_method import UpdateMethod

__all__ = ["SNIP", "StaticGradient"]


@final
@dataclass(frozen=True)
class StaticGradient(UpdateMethod):
    """Train the `budget` entries of largest |gradient| at the first update, from that update on.

    Args:
        budget: entries (int) or share of the candidates (float in (0, 1]); default 0.01.
        include: shell patterns of parameter names; default all that the model trains.
        exclude: patterns of parameters that stay frozen; default none.

    Raises:
        ValueError: at attach, for a budget outside the candidates or a pattern that matches nothing.

    Example:
        >>> StaticGradient(budget=1000).granted(1000, step=1)
        1000

    Paper: the gradient mask of SPEFT (arXiv 2412.13488, section 3), which reports it as good as masks that change.

    Differences: one global choice over all tensors instead of one per tensor; exact under ties; the gradient is that of the
    first training update, so no pass over the data is spent on it.
    """

    name = "gradient"
    summary = "scattered entries of largest gradient at the first update"

    budget: int | float = 0.01
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def score(self, weight: Tensor, gradient: Tensor) -> Tensor:
        return scores.gradient(gradient)

    def least_gradient(self, score: float) -> float:
        return max(score, 0.0) * (1 - 1e-6)  # a gradient of more digits is rounded to fp32

    def granted(self, budget: int, step: int) -> int:
        return budget


@final
@dataclass(frozen=True)
class SNIP(UpdateMethod):
    """Train the `budget` entries of largest |gradient · weight| at the first update, from that update on.

    Args:
        budget: entries (int) or share of the candidates (float in (0, 1]); default 0.01.
        include: shell patterns of parameter names; default all that the model trains.
        exclude: patterns of parameters that stay frozen; default none.

    Raises:
        ValueError: at attach, for a budget outside the candidates or a pattern that matches nothing.

    Example:
        >>> SNIP(budget=0.005).budget
        0.005

    Paper: SNIP (arXiv 1810.02340, section 4), there for pruning; as a mask of what to tune in SPEFT (arXiv 2412.13488).

    Differences: as `StaticGradient`; the entries of largest saliency are trained, where pruning keeps them.
    """

    name = "snip"
    summary = "scattered entries of largest gradient × weight at the first update"

    budget: int | float = 0.01
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def score(self, weight: Tensor, gradient: Tensor) -> Tensor:
        return scores.snip(weight, gradient)

    def granted(self, budget: int, step: int) -> int:
        return budget
