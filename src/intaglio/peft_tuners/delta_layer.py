"""The layer that PEFT puts around a module: tuned values replace the base's at their places, per adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..adapter.record import Record
from ..core.entries import Entries
from ..core.selection import Selection
from ..model.structure import is_linear, is_transposed
from .rows import split_rows
from .tensors import call_with, check_base, fresh, replaced, vacant
from .thin_product import add_slices

__all__ = ["DeltaLayer"]


@final
class DeltaLayer(nn.Module, BaseTunerLayer):
    """Stands in a module's place and lets adapters replace entries of that module's own parameters.

    The effective weight is the base's with the tuned values, rounded to its type, at the chosen places. Merging swaps
    the values in and keeps the originals, so that unmerging restores every bit.

    Args:
        base_layer: the module.
        path: its name in the base model, for messages.

    Attributes:
        intaglio_values: adapter → parameter → tuned values, trainable.
        intaglio_indices: adapter → parameter → stored indices.
        intaglio_records: adapter → parameter → `Record`.
    """

    adapter_layer_names = ("intaglio_values",)
    other_param_names = ("intaglio_indices", "intaglio_records")

    def __init__(self, base_layer: nn.Module, path: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.intaglio_values, self.intaglio_indices = nn.ModuleDict(), nn.ModuleDict()
        self.intaglio_records: dict[str, dict[str, Record]] = {}
        self._path = path
        self._tied: dict[str, tuple[DeltaLayer, str]] = {}  # parameters that another wrapped module owns
        self._disjoint: set[frozenset[str]] = set()  # adapters seen to replace different entries
        self._unchecked: set[str] = set()  # adapters whose tensors were never held against the base
        self._originals: dict[str, dict[str, Tensor]] = {}  # of merged adapters
        self._disable_adapters, self.merged_adapters = False, []
        if is_transposed(base_layer):  # PEFT's layers tell their sizes; other modules' own are passed on
            self.in_features, self.out_features = self._base("weight").shape
        self.register_load_state_dict_post_hook(_check_loaded)

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
            adapter: its name.
            records: parameter → record.
            entries: parameter → places of a fresh adapter; absent where tensors will be loaded.
            tied: parameters that are another wrapped module's, by (layer, name there).
            noise: start away from the base, for tests.
        """
        values, indices = nn.ParameterDict(), BufferDict(persistent=True)
        for name, record in records.items():
            weight = self._base(name)
            index, start = fresh(entries[name], weight, noise=noise) if name in entries else vacant(record, weight)
            values[name] = nn.Parameter(start)
            if index is not None:
                indices[name] = index
        self.intaglio_values[adapter], self.intaglio_indices[adapter] = values, indices
        self.intaglio_records[adapter] = dict(records)
        self._tied.update(tied)
        self._disjoint.clear()
        if entries.keys() != records.keys():
            self._unchecked.add(adapter)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._disjoint.clear()
        self._unchecked.discard(adapter_name)

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """The base module's forward, with the active adapters' weights, or one adapter per row of the batch."""
        if self.disable_adapters:
            for layer in {self, *(owner for owner, _ in self._tied.values())}:
                if layer.merged:
                    layer.unmerge()
            return self.base_layer(*args, **kwargs)
        if adapter_names is not None:
            return self._forward_rows(adapter_names, args, kwargs)
        return self._forward([] if self.merged else self.active_adapters, args, kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Swap the tuned values into the base, keeping its own for `unmerge`.

        Raises:
            ValueError: for adapters that change the same entries, tensors that do not fit the base, and, with
                `safe_merge`, values that are not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.intaglio_values]
        self._check(names, also=self.merged_adapters)
        for adapter in names:
            if safe_merge and not all(bool(v.isfinite().all()) for v in self._values(adapter).values()):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")
        for adapter in names:
            self._originals[adapter] = {}
            for name, values in self._values(adapter).items():
                weight, entries = self._base(name), self._entries(adapter, name)
                self._originals[adapter][name] = entries.gather(weight)
                entries.scatter_(weight, values.detach())
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Put the base's values back, bit for bit; a layer that no merged adapter changed has nothing to do."""
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            for name, original in self._originals.pop(adapter).items():
                self._entries(adapter, name).scatter_(self._base(name), original)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT's `convert_to_lora` can take this layer: the weight of a linear layer, and nothing else."""
        linear = is_linear(self.base_layer)
        return linear and self.intaglio_records.get(adapter_name, {}).keys() <= {"weight"}

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Tuned minus base weight in fp32, dense, of the weight's shape; what PEFT converts to LoRA."""
        weight = self._unmerged("weight").detach()
        if "weight" not in self.intaglio_records.get(adapter, {}):
            return torch.zeros_like(weight, dtype=torch.float32)
        self._check([adapter])
        entries, change = self._entries(adapter, "weight"), torch.zeros_like(weight, dtype=torch.float32)
        tuned = self._values(adapter)["weight"].detach().to(weight.dtype)
        entries.scatter_(change, tuned.float() - entries.gather(weight).float())
        return change

    def cast_values(self, adapter: str) -> None:
        """Hold an adapter's values in the base's type instead of fp32: less memory, and small steps are lost."""
        for name, values in self._values(adapter).items() if adapter in self.intaglio_values else ():
            values.data = values.data.to(self._base(name).dtype)

    def effective(self, name: str, adapters: list[str]) -> Tensor:
        """The parameter `name` with the adapters' values in place, out of place and differentiable in them."""
        weight = self._base(name)
        for adapter in [] if self.merged else adapters:
            if adapter in self.intaglio_records and name in self.intaglio_records[adapter]:
                weight = replaced(weight, self._values(adapter)[name], self._index(adapter, name), self._dim(adapter, name))
        return weight

    def _forward(self, adapters: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        present = [adapter for adapter in adapters if adapter in self.intaglio_values]
        for layer in {self, *(owner for owner, _ in self._tied.values())}:
            layer._check([adapter for adapter in present if adapter in layer.intaglio_values])
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
        index, dim = self._index(adapter, "weight"), self._dim(adapter, "weight")
        assert index is not None  # _is_thin has seen slices
        assert dim is not None
        values, transposed = self._values(adapter)["weight"], is_transposed(self.base_layer)
        return add_slices(x, y, values, self._base("weight"), index, dim, transposed=transposed)

    def _check(self, adapters: list[str], also: list[str] | tuple[str, ...] = ()) -> None:
        """Refuse adapters that were loaded and do not fit the base, and sets of them that overlap."""
        for adapter in adapters:
            if adapter in self._unchecked:
                self.check_tensors(adapter)
        together = [*also, *adapters]
        if len(together) < 2 or frozenset(together) in self._disjoint:
            return
        for position, adapter in enumerate(together):
            mine = Selection({name: self._entries(adapter, name) for name in self.intaglio_records[adapter]})
            for other in together[position + 1 :]:
                theirs = Selection({name: self._entries(other, name) for name in self.intaglio_records[other]})
                if mine.overlap(theirs):
                    raise ValueError(
                        f"{self._path}: adapters {adapter!r} and {other!r} both replace entries of it, so that the result "
                        "would depend on their order; activate one of them, or train the second with exclude="
                    )
        self._disjoint.add(frozenset(together))

    def check_tensors(self, adapter: str) -> None:
        """Refuse loaded tensors that are damaged, missing, or belong to another base.

        Raises:
            ValueError: naming the parameter, what was expected and what was found.
        """
        for name, record in self.intaglio_records[adapter].items():
            full, values = f"{self._path}.{name}", self._values(adapter)[name]
            try:
                entries = record.entries(self._stored_index(adapter, name))
            except ValueError as error:
                raise ValueError(f"{full}: adapter {adapter!r} is damaged, or its tensors were never loaded: {error}") from error
            if not bool(values.isfinite().all()):
                raise ValueError(f"{full}: values of adapter {adapter!r} are not all finite, or were never loaded")
            check_base(full, record, entries, self._unmerged(name))
        self._unchecked.discard(adapter)

    def has_tensors(self, adapter: str) -> bool:
        """Whether any tensors were loaded for an adapter that needs them."""
        tensors = [*self._values(adapter).values(), *self.intaglio_indices[adapter].buffers()]
        return not any(t.is_meta or bool((t.isnan() if t.is_floating_point() else t == -1).all()) for t in tensors)

    def _unmerged(self, name: str) -> Tensor:
        """The base's own parameter, with merged values taken out."""
        weight = self._base(name)
        for adapter in reversed(self.merged_adapters):
            if name in self._originals[adapter]:
                weight = weight.detach().clone()
                self._entries(adapter, name).scatter_(weight, self._originals[adapter][name])
        return weight

    def _values(self, adapter: str) -> nn.ParameterDict:
        values = self.intaglio_values[adapter]
        assert isinstance(values, nn.ParameterDict)
        return values

    def _index(self, adapter: str, name: str) -> Tensor | None:
        stored = self._stored_index(adapter, name)
        return None if stored is None else self.intaglio_records[adapter][name].offsets(stored)

    def _stored_index(self, adapter: str, name: str) -> Tensor | None:
        return self._indices(adapter)[name] if self.intaglio_records[adapter][name].indices is not None else None

    def _indices(self, adapter: str) -> BufferDict:
        indices = self.intaglio_indices[adapter]
        assert isinstance(indices, BufferDict)
        return indices

    def _dim(self, adapter: str, name: str) -> int | None:
        return self.intaglio_records[adapter][name].dim

    def _entries(self, adapter: str, name: str) -> Entries:
        return self.intaglio_records[adapter][name].entries(self._stored_index(adapter, name))

    def _base(self, name: str) -> Tensor:
        parameter = getattr(self.base_layer, name)  # FSDP keeps a view of its flat parameter there
        assert isinstance(parameter, Tensor)
        return parameter

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Follow the base to its device; the values keep their type."""
        weight = next(self.base_layer.parameters(recurse=False))
        for container in (self.intaglio_values, self.intaglio_indices):
            if adapter_name in container and not any(p.is_meta for p in container[adapter_name].parameters()):
                container[adapter_name].to(device or weight.device)

    def __getattr__(self, name: str) -> Any:
        """What the wrapper does not have is the module's: sizes, flags, child modules."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer" or name.startswith("_"):
                raise
            return getattr(self.base_layer, name)

    def __repr__(self) -> str:
        return f"intaglio.{super().__repr__()}"


def _check_loaded(layer: DeltaLayer, _: Any) -> None:
    """After `load_state_dict`: hold against the base what has been loaded."""
    layer._disjoint.clear()
    for adapter in layer.intaglio_records:
        if layer.has_tensors(adapter):
            layer.check_tensors(adapter)
