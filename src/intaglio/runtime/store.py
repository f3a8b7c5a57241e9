"""The adapters a server knows: checked when they are loaded, kept compact in memory, found again on disk when evicted."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import final

from torch import nn

from ..adapter.folder import CONFIG, WEIGHTS
from ..adapter.names import check_name
from .changes import Adapter, Layers
from .reading import read_adapter

__all__ = [
    "AdapterError",
    "AdapterInUse",
    "AdapterInfo",
    "AdapterStore",
    "DuplicateAdapter",
    "UnknownAdapter",
]


class AdapterError(ValueError):
    """The adapter cannot be served: a bad name, a damaged folder, another base, too large, or of an unsupported kind."""


class UnknownAdapter(AdapterError):
    """No adapter of this name is loaded."""


class DuplicateAdapter(AdapterError):
    """An adapter of this name is loaded already."""


class AdapterInUse(AdapterError):
    """Requests are using the adapter."""


@final
@dataclass(frozen=True)
class AdapterInfo:
    """What is known of a loaded adapter.

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


@dataclass(eq=False)
class _Entry:
    info: AdapterInfo
    stamp: tuple[tuple[int, int, int], ...]  # of the files, so that no reload takes others
    adapter: Adapter | None
    uses: int = 0
    leaving: bool = False


@final
class AdapterStore:
    """Adapters of one base by name, safe to use from many threads.

    What does not fit into `capacity_bytes` is evicted, least recently used first, and read from its folder again when a
    request asks for it; files that have changed since are refused then. Adapters of running requests stay with them.

    Args:
        model: the base. Every adapter is checked against its live weights.
        base: name of the base, for messages and as `parent` of adapters that name none; default None.
        capacity_bytes: most bytes of adapters to keep in memory; default None, no limit.
        max_entries: most adapters to know at once, resident or not; default None, no limit.

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
        for argument, value in (("capacity_bytes", capacity_bytes), ("max_entries", max_entries)):
            if value is not None and value < 1:
                raise ValueError(f"{argument}={value}: give a positive number, or None for no limit")
        self.layers, self.base = Layers(model), base
        self.capacity_bytes, self.max_entries = capacity_bytes, max_entries
        self.loads = self.evictions = 0
        self._entries: dict[str, _Entry] = {}  # in the order of their last use
        self._coming: set[str] = set()
        self._changed = threading.Condition()

    def load(self, name: str, path: str | Path) -> AdapterInfo:
        """Read, check and keep an adapter.

        Args:
            name: of letters, digits and `-_.:`, at most 128; may not be a part of a path.
            path: an adapter folder of Intaglio's, or a stock PEFT LoRA folder.

        Raises:
            DuplicateAdapter: where the name is taken.
            AdapterError: for a bad name or a folder that cannot be served; nothing is loaded then.
        """
        self._reserve(name)
        try:
            stamp, adapter, info = self._read(name, Path(path))
            with self._changed:
                self._entries[name] = _Entry(info, stamp, adapter)
                self.loads += 1
                self._evict(name)
        finally:
            with self._changed:
                self._coming.discard(name)
        return info

    def unload(self, name: str, *, wait: float = 0.0) -> None:
        """Forget an adapter. No new request gets it while this waits for those that use it.

        Args:
            name: of a loaded adapter.
            wait: most seconds to wait for requests that use it; default 0.

        Raises:
            UnknownAdapter: where there is none of this name.
            AdapterInUse: where requests still use it; it stays loaded.
        """
        with self._changed:
            entry = self._get(name)
            entry.leaving = True
            if not self._changed.wait_for(lambda: entry.uses == 0, wait):
                entry.leaving = False
                raise AdapterInUse(f"{name}: {entry.uses} requests are using this adapter; wait for them, or cancel them")
            del self._entries[name]

    def infos(self) -> list[AdapterInfo]:
        """What is known of all loaded adapters, by name."""
        with self._changed:
            return sorted((entry.info for entry in self._entries.values()), key=lambda info: info.name)

    def __contains__(self, name: object) -> bool:
        with self._changed:
            return name in self._entries

    @property
    def resident_bytes(self) -> int:
        """Bytes of the adapters in memory."""
        with self._changed:
            return sum(entry.info.bytes for entry in self._entries.values() if entry.adapter is not None)

    def acquire(self, name: str) -> None:
        """Count one more request that uses the adapter; `release` it when the request is over.

        Raises:
            UnknownAdapter: where there is none of this name, or it is being unloaded.
        """
        with self._changed:
            self._get(name).uses += 1

    def release(self, name: str) -> None:
        """Count one request less."""
        with self._changed:
            self._entries[name].uses -= 1
            self._changed.notify_all()

    def fetch(self, name: str) -> Adapter:
        """The adapter itself, for a request that has acquired it; read again if it was evicted.

        Raises:
            UnknownAdapter: where there is none of this name.
            AdapterError: where its files are gone or have changed since `load`.
        """
        with self._changed:
            entry = self._entries.get(name)
            if entry is None:
                raise UnknownAdapter(f"{name}: no adapter of this name is loaded")
            adapter = entry.adapter
        if adapter is None:
            self._check_unchanged(name, entry)
            _, adapter, _ = self._read(name, Path(entry.info.path))
            self._check_unchanged(name, entry)
        with self._changed:
            self.loads += entry.adapter is None
            entry.adapter = adapter
            self._entries[name] = self._entries.pop(name)  # used last
            self._evict(name)
        return adapter

    def _reserve(self, name: str) -> None:
        try:
            check_name(name)
        except ValueError as error:
            raise AdapterError(str(error)) from error
        with self._changed:
            if name in self._entries or name in self._coming:
                raise DuplicateAdapter(f"{name}: an adapter of this name is loaded; unload it first, or choose another name")
            if self.max_entries is not None and len(self._entries) + len(self._coming) >= self.max_entries:
                raise AdapterError(f"{name}: max_entries={self.max_entries} adapters are loaded; unload one first")
            self._coming.add(name)

    def _get(self, name: str) -> _Entry:
        entry = self._entries.get(name)
        if entry is None or entry.leaving:
            raise UnknownAdapter(f"{name}: no adapter of this name is loaded")
        return entry

    def _read(self, name: str, path: Path) -> tuple[tuple[tuple[int, int, int], ...], Adapter, AdapterInfo]:
        """The adapter at `path`, after every check has passed."""
        try:
            stamp = _stamp(path)
            if self.capacity_bytes is not None and (size := stamp[-1][-1]) > self.capacity_bytes:
                raise ValueError(f"its weights take {size:,} bytes, more than capacity_bytes={self.capacity_bytes:,}")
            adapter, kind, parent = read_adapter(path, self.layers)
            if self.capacity_bytes is not None and adapter.nbytes > self.capacity_bytes:
                raise ValueError(f"it takes {adapter.nbytes:,} bytes in memory, more than capacity_bytes={self.capacity_bytes:,}")
            if _stamp(path) != stamp:
                raise ValueError(f"{path} has changed while it was read; load it when it is written")
        except (ValueError, OSError) as error:
            raise AdapterError(f"{name}: {error}") from error
        except (KeyError, RecursionError, OverflowError) as error:
            raise AdapterError(f"{name}: {path}: damaged ({type(error).__name__})") from error
        info = AdapterInfo(name, str(path), parent or self.base, int(time.time()), adapter.nbytes, kind)
        return stamp, adapter, info

    def _check_unchanged(self, name: str, entry: _Entry) -> None:
        try:
            changed = _stamp(Path(entry.info.path)) != entry.stamp
        except (ValueError, OSError) as error:
            raise AdapterError(f"{name}: {error}") from error
        if changed:
            raise AdapterError(f"{name}: {entry.info.path} has changed since it was loaded; unload it and load it again")

    def _evict(self, kept: str) -> None:
        """Drop the least recently used adapters that do not fit; never `kept`."""
        if self.capacity_bytes is None:
            return
        resident = {name: entry for name, entry in self._entries.items() if entry.adapter is not None}
        total = sum(entry.info.bytes for entry in resident.values())
        for name, entry in resident.items():
            if total <= self.capacity_bytes:
                return
            if name != kept:
                entry.adapter, total = None, total - entry.info.bytes
                self.evictions += 1


def _stamp(path: Path) -> tuple[tuple[int, int, int], ...]:
    """Inode, time of change and size of the adapter's files."""
    stats = [(path / file).stat() for file in (CONFIG, WEIGHTS) if (path / file).is_file()]
    if len(stats) != 2:
        raise ValueError(f"{path}: not an adapter folder; {CONFIG} and {WEIGHTS} are needed")
    return tuple((stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in stats)
