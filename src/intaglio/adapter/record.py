"""A parameter's entry in an adapter's config, from which follow the shapes of its tensors, and whether a base is the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard, final

import torch
from torch import Tensor

from ..core.entries import Elements, Entries, Slices, Whole
from . import packing

__all__ = ["Record", "stored_index"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # that a base which is trained can have


@final
@dataclass(frozen=True)
class Record:
    """One parameter's entry in `adapter_config.json`.

    Args:
        kind: "whole", "slices" or "elements".
        shape: of the whole parameter.
        dtype: of the base's parameter.
        fingerprint: of the base's values at the chosen places.
        dim: the dimension that slices index; None for the others.
        indices: how many there are; None for a whole parameter.
    """

    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    fingerprint: str
    dim: int | None = None
    indices: int | None = None

    @classmethod
    def of(cls, entries: Entries, dtype: torch.dtype, fingerprint: str) -> Record:
        """Describe `entries` of a base of type `dtype`."""
        dim = entries.dim if isinstance(entries, Slices) else None
        indices = entries.index.numel() if isinstance(entries, Slices | Elements) else None
        return cls(entries.kind, entries.shape, dtype, fingerprint, dim, indices)

    @classmethod
    def parse(cls, name: str, fields: Any) -> Record:
        """Read and check one entry of the config's `parameters`.

        Raises:
            ValueError: naming the parameter, where a field is missing, of the wrong type or out of range.
        """
        if not isinstance(fields, Mapping) or not isinstance(fields.get("fingerprint"), str):
            raise ValueError(f"{name}: damaged adapter: its entry in the config is no record with a fingerprint")
        kind = fields.get("kind")
        if kind not in ("whole", "slices", "elements"):
            raise ValueError(f"{name}: damaged adapter: unknown kind {kind!r}")
        shape, dtype = fields.get("shape"), next((t for t in _DTYPES if str(t) == f"torch.{fields.get('dtype')}"), None)
        if not isinstance(shape, list | tuple) or not all(_is_count(n) for n in shape):
            raise ValueError(f"{name}: damaged adapter: shape {shape!r} is no list of sizes")
        if 0 in shape or torch.Size(shape).numel() >= 2**62:
            raise ValueError(f"{name}: damaged adapter: shape {list(shape)} is that of no parameter")
        if dtype is None:
            raise ValueError(f"{name}: damaged adapter: {fields.get('dtype')!r} is no floating-point type of 16 bits or more")
        dim = fields.get("dim") if kind == "slices" else None
        indices = None if kind == "whole" else fields.get("indices")
        if kind == "slices" and not (_is_count(dim) and dim < len(shape)):
            raise ValueError(f"{name}: damaged adapter: dim={dim!r} does not fit shape {list(shape)}")
        if kind != "whole" and not (_is_count(indices) and indices > 0):
            raise ValueError(f"{name}: damaged adapter: indices={indices!r} is no count")
        places = torch.Size(shape).numel() if dim is None else shape[dim]
        if indices is not None and indices > places:
            raise ValueError(f"{name}: damaged adapter: {indices} indices of {places} places")
        return cls(kind, tuple(shape), dtype, fields["fingerprint"], dim, indices)

    def to_dict(self) -> dict[str, Any]:
        """What `parse` reads, as JSON values."""
        fields: dict[str, Any] = {"kind": self.kind, "shape": list(self.shape)}
        fields |= {} if self.dim is None else {"dim": self.dim}
        fields |= {} if self.indices is None else {"indices": self.indices}
        return fields | {"dtype": str(self.dtype).removeprefix("torch."), "fingerprint": self.fingerprint}

    @property
    def values_shape(self) -> tuple[int, ...]:
        """Shape of the compact values."""
        if self.indices is None:
            return self.shape
        return (self.indices,) if self.dim is None else (*self.shape[: self.dim], self.indices, *self.shape[self.dim + 1 :])

    @property
    def index_shape(self) -> tuple[int]:
        """Shape of the stored indices; see `stored_index`."""
        assert self.indices is not None
        return (packing.packed_size(self.indices, self._numel) if self._packed else self.indices,)

    @property
    def index_dtype(self) -> torch.dtype:
        """Type of the stored indices; see `stored_index`."""
        return torch.int16 if self._packed else _wide(self._numel)

    def offsets(self, index: Tensor) -> Tensor:
        """Stored indices as int64 `[indices]`; only those that `entries` has accepted."""
        assert self.indices is not None
        return packing.unpack(index, self.indices) if self._packed else index.long()

    def entries(self, index: Tensor | None) -> Entries:
        """The entries at stored indices.

        Raises:
            ValueError: where they are not integers, of another count, unsorted, repeated or out of range.
        """
        if index is None:
            return Whole(self.shape)
        if index.dtype != self.index_dtype:
            raise ValueError(f"indices must be of integers, {self.index_dtype}; found {index.dtype}")
        if tuple(index.shape) != self.index_shape:
            raise ValueError(f"{self.index_shape[0]} stored indices expected, {index.numel()} found")
        if self._packed:
            packing.check(index, self.values_shape[0])
        offsets = self.offsets(index)
        return Elements(self.shape, offsets) if self.dim is None else Slices(self.shape, self.dim, offsets)

    @property
    def _numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def _packed(self) -> bool:
        return self.kind == Elements.kind and self.indices is not None and packing.pays(self.indices, self._numel)


def stored_index(entries: Entries) -> Tensor | None:
    """The index that is stored for `entries`; None for a whole parameter.

    Elements pack to two bytes each where that is smaller (`packing`); the rest is int32, or int64 for a parameter too large
    for it.
    """
    if not isinstance(entries, Slices | Elements):
        return None
    if isinstance(entries, Elements) and packing.pays(entries.count, entries.numel):
        return packing.pack(entries.index, entries.numel)
    return entries.index.to(_wide(entries.numel))


def _wide(numel: int) -> torch.dtype:
    return torch.int32 if numel <= torch.iinfo(torch.int32).max else torch.int64


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
