"""Heads and channels of a layer, and where each sits in the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor, nn

__all__ = ["Layer", "Projection", "is_linear", "is_transposed"]


@final
@dataclass(frozen=True)
class Projection:
    """The units of one role in one weight.

    A unit is an attention head (`width` = head_dim) or an FFN channel (`width` = 1). Every `stride` positions `together`
    units follow each other: unit u begins at `offset + (u // together)·stride + (u % together)·width` along dimension `dim`
    of the parameter.
    """

    parameter: str
    shape: tuple[int, ...]
    dim: int
    units: int
    width: int
    offset: int
    stride: int
    together: int = 1

    def index(self, units: Tensor) -> Tensor:
        """Positions along `dim` of the given units, int64 `[len(units)·width]`, sorted."""
        return self.places(units.sort().values).flatten()

    def places(self, units: Tensor) -> Tensor:
        """Positions along `dim` of the given units in their order, int64 `[len(units), width]`."""
        first = self.offset + units // self.together * self.stride + units % self.together * self.width
        return first[:, None] + torch.arange(self.width)

    def per_unit(self, values: Tensor) -> Tensor:
        """Sum of one value per position along `dim` over each unit: `[shape[dim]]` → `[units]`."""
        return values[self.index(torch.arange(self.units)).to(values.device)].view(self.units, self.width).sum(-1)

    def owners(self, index: Tensor) -> Tensor:
        """Units that own any of the positions `index` along `dim`; positions of other roles are passed over."""
        group = torch.div(index - self.offset, self.stride, rounding_mode="floor")
        within = index - self.offset - group * self.stride
        unit = group * self.together + within // self.width
        inside = (group >= 0) & (within < self.together * self.width) & (unit < self.units)
        return unit[inside].unique()


@final
@dataclass(frozen=True)
class Layer:
    """One layer of the stack.

    Attributes:
        name: its module path.
        projections: by role; a layer whose attention cannot be read has only those of its FFN.
        followers: by role, parameters with one value (or row) per position of that role's heads, by full name.
        per_head: parameters with one value per query head, by full name.
        unread: why it has no heads, a clause that ends a sentence; "" where it has.
    """

    name: str
    projections: Mapping[str, Projection]
    followers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    per_head: tuple[str, ...] = ()
    unread: str = ""


def is_linear(module: nn.Module) -> bool:
    """Whether a module is one product with a 2-D weight, stored either way."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether a projection stores its weight as [in, out] (GPT-2's Conv1D) instead of [out, in]."""
    return type(module).__name__ == "Conv1D"
