"""The part that our PEFT layers share: a module that stands in another's place."""

from __future__ import annotations

from abc import ABC
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..model.structure import is_transposed

__all__ = ["Wrapper"]


class Wrapper(nn.Module, BaseTunerLayer, ABC):
    """A module that stands in another's place; what it does not have itself is the other's: sizes, flags, child modules.

    Args:
        base_layer: the other module.
        path: its name in the base model, for messages.
    """

    def __init__(self, base_layer: nn.Module, path: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._path = path
        self._disable_adapters, self.merged_adapters = False, []
        if is_transposed(base_layer):  # PEFT's layers tell their sizes; other modules' own are passed on
            self.in_features, self.out_features = base_layer.get_parameter("weight").shape

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer" or name.startswith("_"):
                raise
            return getattr(self.base_layer, name)

    def __repr__(self) -> str:
        return f"intaglio.{super().__repr__()}"
