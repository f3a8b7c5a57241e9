"""The adapters a server knows: checked when they are loaded, kept compact in memory, found again on disk when evicted."""

from __future__ import annotations

import os
import time
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import final

from torch import nn

from ..adapter.shelf import AdapterError, AdapterInUse, DuplicateAdapter, Shelf, UnknownAdapter
from .changes import Adapter, LinearLayers
from .reading import read_adapter

__all__ = [
    "AdapterError",
    "AdapterInUse",
    "AdapterInfo",
    "AdapterStore",
    "DuplicateAdapter",
    "UnknownAdapter",
]


@final
@dataclass(frozen=True)
class AdapterInfo:
    """Facts of a loaded adapter.

    Attributes:
        name: as given to `load`.
        path: its folder.
        parent: the base model's name, as the adapter gives it; None where it gives none.
        created: when it was loaded, seconds since 1970.
        bytes: in memory while it is resident.
        kind: "slices" (a Delta) or "lora" (a stock PEFT folder).
    """

    name: str
    path: str
    parent: str | None
    created: int
    bytes: int
    kind: str


@final
class AdapterStore(Shelf[Adapter]):
    """Adapters of one base by name, safe to use from many threads.

    What does not fit into `capacity_bytes` is evicted, least recently used first, and read from its folder again when a
    request asks for it; files that have changed since are refused then. Adapters of running requests stay with them.

    Args:
        model: the base. Every adapter is checked against its live weights.
        base: name of the base, for messages and as `parent` of adapters that name none; default None.
        capacity_bytes: most bytes of adapters to keep in memory; default None, no limit.
        max_entries: most adapters to know at once, resident or not; default None, no limit.

    Attributes:
        layers: of the base, that adapters may change.

    Raises:
        ValueError: for a limit that is no positive number.

    Example:
        >>> store = AdapterStore(model, capacity_bytes=2**30)
        >>> store.load("alice", "adapters/alice").kind
        'slices'
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        base: str | None = None,
        capacity_bytes: int | None = None,
        max_entries: int | None = None,
    ) -> None:
        super().__init__(capacity_bytes=capacity_bytes, max_entries=max_entries)
        self.layers, self.base = LinearLayers(model), base
        self._infos: dict[str, AdapterInfo] = {}

    def load(self, name: str, path: str | os.PathLike[str]) -> AdapterInfo:
        """Read, check and keep an adapter.

        Args:
            name: 1 to 128 letters, digits, `_`, `.`, `:` and `-`, a letter, digit or `_` first.
            path: an adapter folder of Intaglio's, or a stock PEFT LoRA folder.

        Raises:
            DuplicateAdapter: where the name is taken.
            AdapterError: for a bad name or a folder that cannot be served; nothing is loaded then.
        """
        with self._reserved(name):
            folder, found = self._open(name, path, lambda folder: read_adapter(folder, self.layers))
            adapter, kind, parent = found
            info = AdapterInfo(name, str(path), parent or self.base, int(time.time()), adapter.nbytes, kind)
            with self._lock:  # for both at once
                self._put(name, adapter, folder)
                self._infos[name] = info
        return info

    def unload(self, name: str, *, wait: float = 0.0) -> None:
        with self._lock:  # which waiting lets go of
            super().unload(name, wait=wait)
            del self._infos[name]

    def infos(self) -> list[AdapterInfo]:
        """What is known of all loaded adapters, by name."""
        with self._lock:
            return sorted(self._infos.values(), key=lambda info: info.name)

    def _read(self, folder: Path) -> Adapter:
        return read_adapter(folder, self.layers)[0]

    def _sizes(self, value: Adapter) -> dict[Hashable, int]:
        return {value.serial: value.nbytes}
