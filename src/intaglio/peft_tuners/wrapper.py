"""Wrappers that PEFT puts around modules, and the tuner that puts them there: what our types have in common."""

from __future__ import annotations

from abc import ABC
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from ..model.structure import is_transposed

__all__ = ["Wrapper", "WrappingTuner"]


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


class WrappingTuner(BaseTuner, ABC):
    """A tuner of PEFT that puts wrappers around modules of any kind, not only those that own a `weight`."""

    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  # typed so by the base class

    def put(self, layer: Wrapper, parent: nn.Module, name: str, adapter: str, *, inference_mode: bool) -> None:
        """Put a layer with a new adapter in its module's place, where it is not there already, and activate it there.

        Args:
            layer: the wrapper.
            parent: the module that holds the wrapped one.
            name: of the wrapped module there.
            adapter: name of the new adapter.
            inference_mode: whether its parameters stay frozen.
        """
        target = parent.get_submodule(name)
        if layer is not target:
            layer._active_adapter = adapter
            self._replace_module(parent, name, layer, target)
        layer.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        return peft_config

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)
