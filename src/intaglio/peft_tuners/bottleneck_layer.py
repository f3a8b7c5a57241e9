"""The layer of a bottleneck adapter: a wrapper that adds to what a module puts out."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn

from .bottleneck_config import ACTIVATIONS, BottleneckConfig
from .wrapper import Wrapper

__all__ = ["NO_MERGE", "BottleneckLayer"]

NO_MERGE = "a bottleneck adapter is nonlinear and cannot be merged into weights; keep it as an adapter, or train LoRA instead"


@final
class BottleneckLayer(Wrapper):
    """A wrapper that adds to a module's output what the active adapters make of its input or output.

    Several active adapters read the same, the bare module's, and their changes add up. Of a module that puts out a tuple
    (attention), the first tensor is read and changed.

    Args:
        base_layer: the module.
        path: its name in the base model, for messages.

    Attributes:
        bottleneck_down, bottleneck_up: adapter → D, U.
        bottleneck_dropout: adapter → `nn.Dropout`, or nothing.
    """

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("bottleneck_dropout", "bottleneck_config")

    def __init__(self, base_layer: nn.Module, path: str) -> None:
        super().__init__(base_layer, path)
        self.bottleneck_down, self.bottleneck_up = nn.ModuleDict(), nn.ModuleDict()
        self.bottleneck_dropout = nn.ModuleDict()
        self.bottleneck_config: dict[str, BottleneckConfig] = {}

    def update_layer(self, adapter: str, config: BottleneckConfig, reads: int, adds: int) -> None:
        """Make room for an adapter.

        Args:
            adapter: its name.
            config: its settings.
            reads: size of what it reads, in the last dimension.
            adds: size of the module's output.
        """
        down = nn.Linear(reads, config.bottleneck_size, bias=False)  # Kaiming-uniform, PyTorch's own
        up = nn.Linear(config.bottleneck_size, adds, bias=False)
        if config.init_weights:
            nn.init.zeros_(up.weight)
        self.bottleneck_down[adapter], self.bottleneck_up[adapter] = down, up
        self.bottleneck_dropout[adapter] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.bottleneck_config[adapter] = config
        self._move_adapter_to_device_of_base_layer(adapter)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output with the active adapters' changes."""
        y = self.base_layer(*args, **kwargs)
        present = [name for name in self.active_adapters if name in self.bottleneck_down]
        if self.disable_adapters or not present:
            return y
        out = y if isinstance(y, Tensor) else y[0]
        changed = out
        for adapter in present:
            series = self.bottleneck_config[adapter].placement == "series"
            changed = changed + self._change(adapter, out if series else _first(args, kwargs)).to(out.dtype)
        return changed if isinstance(y, Tensor) else (changed, *y[1:])

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: no weight does what a nonlinear adapter does.

        Raises:
            ValueError: always, with what to do instead.
        """
        raise ValueError(NO_MERGE)

    def unmerge(self) -> None:
        """Nothing is ever merged."""

    def _change(self, adapter: str, x: Tensor) -> Tensor:
        config, down, up = self.bottleneck_config[adapter], self.bottleneck_down[adapter], self.bottleneck_up[adapter]
        assert isinstance(down, nn.Linear)
        x = self._cast_input_dtype(x, down.weight.dtype)
        return up(ACTIVATIONS[config.activation](down(self.bottleneck_dropout[adapter](x)))) * config.scaling

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
        """PEFT's own answer; for a module without a weight of its own, that of its first parameter."""
        device, dtype = super()._get_base_layer_device_and_dtype(base_layer)
        first = next(base_layer.parameters(), None)
        return (device, dtype) if device is not None or first is None else (first.device, first.dtype)


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What goes into a module; transformers name it `hidden_states`."""
    return args[0] if args else kwargs["hidden_states"]
