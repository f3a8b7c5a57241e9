"""The number and width of a layer's attention heads and FFN channels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, final

from torch import nn

from .families import Role

__all__ = ["Units"]

_FFN = {"up", "gate", "down"}


@final
@dataclass(frozen=True)
class Units:
    """The heads and channels of one layer: how many there are, and how wide.

    Attributes:
        query, key_value: heads of each kind.
        head_width: positions of one head, in the weight of any of its projections.
        channels: of the FFN, each one position wide.
    """

    query: int
    key_value: int
    head_width: int
    channels: int

    @classmethod
    def of(cls, model: nn.Module, reads: int, channels: int) -> Units:
        """Head counts from the config; `reads` is the input width of the attention output projection."""
        config: Any = getattr(model, "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        query = getattr(config, "num_attention_heads", None)
        if not isinstance(query, int):
            raise ValueError(f"model {type(model).__name__}: its config names no num_attention_heads")
        key_value = getattr(config, "num_key_value_heads", None) or query
        width = getattr(config, "head_dim", None) or reads // query
        if query * width != reads:
            raise ValueError(
                f"model {type(model).__name__}: {query} heads of {width} do not give the {reads} inputs of its attention output"
            )
        return cls(query, key_value, width, channels)

    def count(self, role: str) -> int:
        """Units of a role."""
        if role in _FFN:
            return self.channels
        return self.key_value if role in ("k", "v") else self.query

    def width(self, role: str) -> int:
        """Positions of one unit of a role."""
        return 1 if role in _FFN else self.head_width

    def positions(self, roles: Iterable[str]) -> int:
        """Positions that these roles occupy together."""
        return sum(self.count(role) * self.width(role) for role in roles)

    def place(self, role: str, weight: Role) -> tuple[int, int]:
        """(offset, stride) of a role's units inside its weight."""
        width = self.width(role)
        position = weight.order.index(role) if weight.fused else 0
        if weight.fused == "heads":
            return position * width, len(weight.order) * width
        return self.positions(weight.order[:position]), width
