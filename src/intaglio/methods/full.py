"""Full fine-tuning, the baseline every sparse method is measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import nn

from ..core.entries import Whole
from ..core.probe import Probe
from ..core.selection import Selection
from ..method_kinds import fields
from ..method_kinds.method import NOTHING, Method, matching

__all__ = ["Full"]


@final
@dataclass(frozen=True)
class Full(Method):
    """Train every entry of every parameter.

    Weights of less than 32 bits get an fp32 master copy, as mixed-precision training does.

    Args:
        include: shell patterns of parameter names; default all. `("*.mlp.*",)` trains the FFNs whole.

    Raises:
        ValueError: at attach, where a pattern matches no parameter.

    Example:
        >>> Full().to_dict()
        {'name': 'full', 'include': ['*']}

    Differences: none; this is the textbook method.
    """

    name = "full"
    summary = "every weight: the baseline"

    include: tuple[str, ...] = ("*",)

    def _problems(self) -> list[str]:
        return fields.patterns(include=self.include)

    def selectable(self, model: nn.Module) -> set[str]:
        return set(matching(model, self.include))

    def choose(self, model: nn.Module, probe: Probe | None = None, exclude: Selection = NOTHING) -> Selection:
        whole = Selection({name: Whole(tuple(p.shape)) for name, p in matching(model, self.include).items()})
        return whole.difference(exclude)
