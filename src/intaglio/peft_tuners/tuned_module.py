"""The part of sparse adapters in one module of the base, and its exact exchange with the module's own weights."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ..adapter.record import Record
from ..core.entries import Entries
from ..core.selection import Selection
from .tensors import Tuned, fresh, vacant
from .wrapper import Wrapper

__all__ = ["TunedModule"]


class TunedModule(Wrapper):
    """A module of the base with adapters' values for entries of its own parameters: held, checked, merged and taken out.

    Merging swaps the values in and keeps the originals, so that unmerging restores every bit.

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
        super().__init__(base_layer, path)
        self.intaglio_values, self.intaglio_indices = nn.ModuleDict(), nn.ModuleDict()
        self.intaglio_records: dict[str, dict[str, Record]] = {}
        self._disjoint: set[frozenset[str]] = set()  # adapters seen to replace different entries
        self._unchecked: set[str] = set()  # adapters whose tensors were never held against the base
        self._originals: dict[str, dict[str, Tensor]] = {}  # of merged adapters
        self.register_load_state_dict_post_hook(TunedModule._check_loaded)

    def hold(self, adapter: str, records: Mapping[str, Record], entries: Mapping[str, Entries], *, noise: bool) -> None:
        """Make room for an adapter.

        Args:
            adapter: its name.
            records: parameter → record.
            entries: parameter → places of a fresh adapter; absent where tensors will be loaded.
            noise: start away from the base, for tests.
        """
        values, indices = nn.ParameterDict(), BufferDict(persistent=True)
        for name, record in records.items():
            weight = self.base_parameter(name)
            index, start = fresh(entries[name], weight, noise=noise) if name in entries else vacant(record, weight)
            values[name] = nn.Parameter(start)
            if index is not None:
                indices[name] = index
        self.intaglio_values[adapter], self.intaglio_indices[adapter] = values, indices
        self.intaglio_records[adapter] = dict(records)
        self._disjoint.clear()
        if entries.keys() != records.keys():
            self._unchecked.add(adapter)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._disjoint.clear()
        self._unchecked.discard(adapter_name)

    def tuned(self, adapter: str) -> dict[str, Tuned]:
        """Parameter → what an adapter puts in place of its entries; empty for an adapter that is not here."""
        if adapter not in self.intaglio_records:
            return {}
        values, indices = self.intaglio_values[adapter], self.intaglio_indices[adapter]
        assert isinstance(values, nn.ParameterDict)
        assert isinstance(indices, BufferDict)
        return {
            name: Tuned(record, values[name], None if record.indices is None else indices[name])
            for name, record in self.intaglio_records[adapter].items()
        }

    def cast_values(self, adapter: str) -> None:
        """Hold an adapter's values in the base's type instead of fp32: less memory, and small steps are lost."""
        for name, tuned in self.tuned(adapter).items():
            tuned.values.data = tuned.values.data.to(self.base_parameter(name).dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Swap the tuned values into the base, keeping its own for `unmerge`.

        Raises:
            ValueError: for adapters that change the same entries, tensors that do not fit the base, and, with
                `safe_merge`, values that are not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.intaglio_values]
        self.check(names, also=self.merged_adapters)
        for adapter in names:
            if safe_merge and not all(bool(tuned.values.isfinite().all()) for tuned in self.tuned(adapter).values()):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")
        for adapter in names:
            self._originals[adapter] = {}
            for name, tuned in self.tuned(adapter).items():
                weight, entries = self.base_parameter(name), tuned.entries
                self._originals[adapter][name] = entries.gather(weight)
                entries.scatter_(weight, tuned.values.detach())
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Put the base's values back, bit for bit; a layer that no merged adapter changed has nothing to do."""
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            tuned = self.tuned(adapter)
            for name, original in self._originals.pop(adapter).items():
                tuned[name].entries.scatter_(self.base_parameter(name), original)

    def unmerged(self, name: str) -> Tensor:
        """The base's own parameter, with merged values taken out."""
        weight = self.base_parameter(name)
        for adapter in reversed(self.merged_adapters):
            if name in self._originals[adapter]:
                weight = weight.detach().clone()
                self.tuned(adapter)[name].entries.scatter_(weight, self._originals[adapter][name])
        return weight

    def check(self, adapters: list[str], also: list[str] | tuple[str, ...] = ()) -> None:
        """Refuse adapters that were loaded and do not fit the base, and sets of them, with `also`, that overlap.

        Raises:
            ValueError: naming the parameter, or the module and two adapters.
        """
        for adapter in adapters:
            if adapter in self._unchecked:
                self.check_tensors(adapter)
        together = [*also, *adapters]
        if len(together) < 2 or frozenset(together) in self._disjoint:
            return
        chosen = [Selection({name: t.entries for name, t in self.tuned(adapter).items()}) for adapter in together]
        for (first, mine), (second, theirs) in itertools.combinations(zip(together, chosen, strict=True), 2):
            if mine.overlap(theirs):
                raise ValueError(
                    f"{self._path}: adapters {first!r} and {second!r} both replace entries of it, so that the result "
                    "would depend on their order; activate one of them, or train the second with exclude="
                )
        self._disjoint.add(frozenset(together))

    def check_tensors(self, adapter: str) -> None:
        """Refuse loaded tensors that are damaged, missing, or belong to another base.

        Raises:
            ValueError: naming the parameter, what was expected and what was found.
        """
        for name, tuned in self.tuned(adapter).items():
            tuned.check(f"{self._path}.{name}", adapter, self.unmerged(name))
        self._unchecked.discard(adapter)

    def _check_loaded(self, _: Any) -> None:
        """Hold what has been loaded against the base, after `load_state_dict`."""
        self._disjoint.clear()
        for adapter in self.intaglio_records:
            if self.has_tensors(adapter):
                self.check_tensors(adapter)

    def has_tensors(self, adapter: str) -> bool:
        """Whether any tensors were loaded for an adapter that needs them."""
        return all(tuned.is_loaded() for tuned in self.tuned(adapter).values())

    def base_parameter(self, name: str) -> Tensor:
        """The module's parameter, with merged values."""
        parameter = getattr(self.base_layer, name)  # FSDP keeps a view of its flat parameter there
        assert isinstance(parameter, Tensor)
        return parameter

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Follow the base to its device; the values keep their type."""
        weight = next(self.base_layer.parameters(recurse=False))
        for container in (self.intaglio_values, self.intaglio_indices):
            if adapter_name in container and not any(p.is_meta for p in container[adapter_name].parameters()):
                container[adapter_name].to(device or weight.device)
