"""Bias terms alone: the smallest fixed choice that is known to work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

from torch import nn

from ..core.entries import Whole
from ..core.probe import Probe
from ..core.selection import Selection
from ..method_kinds import fields
from ..method_kinds.method import NOTHING, Method, matching

__all__ = ["BitFit"]

Tensors = Literal["biases", "one_dimensional"]


@final
@dataclass(frozen=True)
class BitFit(Method):
    """Train every bias and nothing else: of projections (query, key and value too), of norms, of the head.

    A bias is a parameter named `bias` or `…_bias`. Llama and most models after it have none; there,
    `tensors="one_dimensional"` trains the scales of their norms instead.

    Args:
        tensors: "biases", or "one_dimensional": every parameter of one dimension, norm scales included; default
            "biases". The second is what the selective-PEFT toolkit calls BitFit.
        include: shell patterns of parameter names; default all.
        exclude: shell patterns of parameter names that are left alone, e.g. `("classifier.*",)`; default none.

    Raises:
        ValueError: for an unknown `tensors`; at attach, where there is no such parameter or a pattern matches nothing.

    Example:
        >>> BitFit(exclude=("classifier.*", "pooler.*")).tensors
        'biases'

    Paper: arXiv 2106.10199, section 3.

    Differences: a classifier's bias is trained with the others, its weight is not, where the authors train the head
    whole; biases in any shape count (of experts, one row for each).
    """

    name = "bitfit"
    summary = "the biases, whole"

    tensors: Tensors = "biases"
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def _problems(self) -> list[str]:
        return fields.patterns(include=self.include, exclude=self.exclude) + fields.choice("tensors", self.tensors, Tensors)

    def selectable(self, model: nn.Module) -> set[str]:
        return set(self._chosen(model))

    def choose(self, model: nn.Module, probe: Probe | None = None, exclude: Selection = NOTHING) -> Selection:
        return self._chosen(model).difference(exclude)

    def _chosen(self, model: nn.Module) -> Selection:
        matched = matching(model, self.include, self.exclude)
        found = {name: Whole(tuple(p.shape)) for name, p in matched.items() if self._counts(name, p)}
        if not found:
            hint = "tensors='one_dimensional' trains the scales of its norms" if self.tensors == "biases" else "include more"
            raise ValueError(f"tensors={self.tensors!r}: {type(model).__name__} has none where it may be trained; {hint}")
        return Selection(found)

    def _counts(self, name: str, parameter: nn.Parameter) -> bool:
        if self.tensors == "one_dimensional":
            return parameter.dim() == 1
        return f"_{name.rpartition('.')[2]}".endswith("_bias")
