"""The layer that PEFT puts around a module: it computes with the tuned values of the active adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from ..adapter.record import Record
from ..core.entries import Entries
from ..model.structure import is_linear, is_transposed
from .rows import split_rows
from .tensors import call_with
from .thin_product import add_slices
from .tuned_module import TunedModule

__all__ = ["DeltaLayer"]


@final
class DeltaLayer(TunedModule):
    """A module of the base in whose parameters adapters replace entries.

    The effective weight is the base's with the tuned values, rounded to its type, at the chosen places. Slices of a linear
    layer are computed as a thin product; all else by calling the module with its effective weights.

    Arguments and attributes: `TunedModule`.
    """

    def __init__(self, base_layer: nn.Module, path: str) -> None:
        super().__init__(base_layer, path)
        self._tied: dict[str, tuple[DeltaLayer, str]] = {}  # parameters that another wrapped module owns

    def update_layer(
        self,
        adapter: str,
        records: Mapping[str, Record],
        entries: Mapping[str, Entries],
        tied: Mapping[str, tuple[DeltaLayer, str]],
        *,
        noise: bool = False,
    ) -> None:
        """Make room for an adapter.

        Args:
            adapter, records, entries, noise: as in `hold`.
            tied: parameters that are another wrapped module's, by (layer, name there).
        """
        self.hold(adapter, records, entries, noise=noise)
        self._tied.update(tied)

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """The base module's forward, with the active adapters' weights, or one adapter per row of the batch."""
        if self.disable_adapters:
            for layer in self._with_owners():
                if layer.merged:
                    layer.unmerge()
            return self.base_layer(*args, **kwargs)
        if adapter_names is not None:
            return self._forward_rows(adapter_names, args, kwargs)
        return self._forward([] if self.merged else self.active_adapters, args, kwargs)

    def effective(self, name: str, adapters: list[str]) -> Tensor:
        """The parameter `name` with the adapters' values in place, out of place and differentiable in them."""
        weight = self.base_parameter(name)
        for adapter in [] if self.merged else adapters:
            tuned = self.tuned(adapter).get(name)
            weight = weight if tuned is None else tuned.placed(weight)
        return weight

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT's `convert_to_lora` can take this layer: the weight of a linear layer, and nothing else."""
        linear = is_linear(self.base_layer)
        return linear and self.intaglio_records.get(adapter_name, {}).keys() <= {"weight"}

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Tuned minus base weight in fp32, dense, of the weight's shape; what PEFT converts to LoRA."""
        weight, tuned = self.unmerged("weight").detach(), self.tuned(adapter).get("weight")
        change = torch.zeros_like(weight, dtype=torch.float32)
        if tuned is not None:
            self.check([adapter])
            values = tuned.values.detach().to(weight.dtype)
            tuned.entries.scatter_(change, values.float() - tuned.entries.gather(weight).float())
        return change

    def _forward(self, adapters: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        present = [adapter for adapter in adapters if adapter in self.intaglio_values]
        for layer in self._with_owners():
            layer.check([adapter for adapter in present if adapter in layer.intaglio_values])
        if self._is_thin(present) and args:
            y = self.base_layer(*args, **kwargs)
            for adapter in present:
                y = self._add_thin(adapter, args[0], y)
            return y
        own = {name for adapter in present for name in self.intaglio_records[adapter]}
        weights = {name: self.effective(name, present) for name in own}
        weights |= {name: owner.effective(theirs, present) for name, (owner, theirs) in self._tied.items() if present}
        return call_with(self.base_layer, weights, args, kwargs) if weights else self.base_layer(*args, **kwargs)

    def _forward_rows(self, names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if self.merged:
            raise ValueError("adapter_names: an adapter is merged into the base; call unmerge_adapter() first")
        parts, positions = [], []
        for name, index, rows, options in split_rows(self._path, names, args, kwargs):
            parts.append(self._forward([] if name == "__base__" else [name], rows, options))
            positions.append(index)
            if not isinstance(parts[-1], Tensor) or len(parts[-1]) != len(index):
                raise ValueError(f"adapter_names: {self._path} does not return one row per input row; use one adapter at a time")
        return torch.cat(parts).index_select(0, torch.cat(positions).argsort())

    def _is_thin(self, adapters: list[str]) -> bool:
        """Whether the change is a thin product: slices of the weight of a plain linear layer, and nothing else."""
        plain = type(self.base_layer) is nn.Linear or is_transposed(self.base_layer)
        records = [self.intaglio_records[adapter] for adapter in adapters]
        return plain and not self._tied and all(r.keys() == {"weight"} and r["weight"].kind == "slices" for r in records)

    def _add_thin(self, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        tuned = self.tuned(adapter)["weight"]
        index, dim = tuned.index, tuned.record.dim
        assert index is not None  # _is_thin has seen slices
        assert dim is not None
        weight, transposed = self.base_parameter("weight"), is_transposed(self.base_layer)
        return add_slices(x, y, tuned.values, weight, index, dim, transposed=transposed)

    def _with_owners(self) -> set[DeltaLayer]:
        """This layer and those that own its tied parameters."""
        return {self, *(owner for owner, _ in self._tied.values())}
