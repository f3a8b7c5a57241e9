"""Adapters by name, within a bound of memory: what was used longest ago is dropped, and read again from its folder."""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from .names import check_name
from .source import Source, weights_size

__all__ = ["AdapterError", "AdapterInUse", "DuplicateAdapter", "Shelf", "UnknownAdapter"]

Held = TypeVar("Held")
Found = TypeVar("Found")


class AdapterError(ValueError):
    """An adapter that cannot be used: a bad name, a damaged folder, another base, too large, or of an unsupported kind."""


class UnknownAdapter(AdapterError):
    """A name that no loaded adapter has."""


class DuplicateAdapter(AdapterError):
    """A name that a loaded adapter has already."""


class AdapterInUse(AdapterError):
    """An adapter that somebody is using."""


@dataclass(eq=False)
class _Entry(Generic[Held]):
    value: Held | None  # None where it was dropped
    sizes: Mapping[Hashable, int]  # of the value's tensors
    source: Source | None  # None where it cannot be read again, and is never dropped
    uses: int = 0
    leaving: bool = False


class Shelf(ABC, Generic[Held]):
    """Adapters by name, in the form in which they are used; any thread may call, and none waits while files are read.

    A subclass says what is held, and how it is read and measured.

    Args:
        capacity_bytes: most bytes to keep in memory; default None, no bound. Beyond it, values used longest ago are dropped.
        max_entries: most adapters to know at once, dropped or not; default None, no bound.

    Attributes:
        capacity_bytes: as given; another bound counts from the next call on.
        loads: how often values were loaded, or read again.
        evictions: how often values were dropped.

    Raises:
        ValueError: for a bound that is no positive number.
    """

    def __init__(self, *, capacity_bytes: int | None = None, max_entries: int | None = None) -> None:
        for argument, bound in (("capacity_bytes", capacity_bytes), ("max_entries", max_entries)):
            if bound is not None and (isinstance(bound, bool) or not bound > 0):
                raise ValueError(f"{argument}={bound!r}: give a number above 0, or None for no bound")
        self.capacity_bytes, self.max_entries = capacity_bytes, max_entries
        self.loads = self.evictions = 0
        self._lock = threading.Condition()
        self._entries: dict[str, _Entry[Held]] = {}  # used longest ago first
        self._coming: set[str] = set()

    @abstractmethod
    def _read(self, folder: Path) -> Held:
        """The values of the adapter in a folder, every check passed."""

    @abstractmethod
    def _sizes(self, value: Held) -> Mapping[Hashable, int]:
        """Bytes of the tensors in `value`; one that other adapters hold too has the same key there, and counts once."""

    def _standing(self) -> Mapping[Hashable, int]:
        """Sizes of what is in memory anyway, wherever it came from."""
        return {}

    @property
    def names(self) -> list[str]:
        """The adapters, by name."""
        with self._lock:
            return sorted(self._entries)

    @property
    def resident_bytes(self) -> int:
        """Bytes in memory, each tensor once."""
        with self._lock:
            return sum(_merged([self._standing(), *(entry.sizes for entry in self._entries.values())]).values())

    def __contains__(self, name: object) -> bool:
        with self._lock:
            return name in self._entries

    def acquire(self, name: str) -> None:
        """Count one more user of an adapter, which stays until its `release`.

        Raises:
            UnknownAdapter: where there is none of this name, or it is being unloaded.
        """
        with self._lock:
            self._entry(name, leaving=False).uses += 1

    def release(self, name: str) -> None:
        """Count one user less."""
        with self._lock:
            self._entry(name).uses -= 1
            self._lock.notify_all()

    def fetch(self, name: str) -> Held:
        """The values of an adapter, which is now the one used last; read again where they were dropped.

        Raises:
            UnknownAdapter: where there is none of this name.
            AdapterError: where its folder is gone, damaged, or has changed since it was loaded.
        """
        with self._lock:
            entry = self._entry(name)
            value = entry.value
        if value is None:
            assert entry.source is not None
            try:
                value = entry.source.read(self._read)
            except (ValueError, OSError) as error:
                why = f"was dropped from memory and cannot be read again ({error})"
                raise AdapterError(f"{name!r}: {why}; unload it and load it anew") from error
        with self._lock:
            if entry.value is None:  # else another thread was faster
                entry.value, entry.sizes = value, self._sizes(value)
                self.loads += 1
            value = entry.value
            if self._entries.get(name) is entry:  # not unloaded meanwhile
                self._entries[name] = self._entries.pop(name)
            self._shrink()
        return value

    def unload(self, name: str, *, wait: float = 0.0) -> None:
        """Forget an adapter. It gets no new users while this waits for those that it has.

        Args:
            name: of a loaded adapter.
            wait: most seconds to wait for its users; default 0.

        Raises:
            UnknownAdapter: where there is none of this name, or it is being unloaded.
            AdapterInUse: where it still has users; it stays loaded.
        """
        with self._lock:
            entry = self._entry(name, leaving=False)
            entry.leaving = True
            if not self._lock.wait_for(lambda: entry.uses == 0, wait):
                entry.leaving = False
                raise AdapterInUse(f"{name!r}: {entry.uses} requests are using this adapter; wait for them, or cancel them")
            del self._entries[name]

    @contextmanager
    def _reserved(self, name: str) -> Iterator[None]:
        """Keep a new name from others for a block that reads an adapter and puts it here.

        Raises:
            AdapterError: for a bad name, or too many adapters.
            DuplicateAdapter: where the name is taken.
        """
        try:
            check_name(name)
        except ValueError as error:
            raise AdapterError(str(error)) from error
        with self._lock:
            taken = self._entries.keys() | self._coming
            if name in taken:
                raise DuplicateAdapter(f"{name!r}: an adapter of this name is loaded; unload it first, or take another name")
            if self.max_entries is not None and len(taken) >= self.max_entries:
                raise AdapterError(f"{name!r}: max_entries={self.max_entries} adapters are loaded; unload one first")
            self._coming.add(name)
        try:
            yield
        finally:
            with self._lock:
                self._coming.discard(name)

    def _open(self, name: str, path: str | os.PathLike[str], reader: Callable[[Path], Found]) -> tuple[Source, Found]:
        """A folder that is to be loaded, and what `reader` makes of it.

        Raises:
            AdapterError: where it is damaged, changes meanwhile, or is too large.
        """
        try:
            folder = Path(path).resolve()
            self._check_room(name, weights_size(folder))
            source = Source.of(folder)
            return source, source.read(reader)
        except AdapterError:
            raise
        except (ValueError, OSError) as error:
            raise AdapterError(f"{name!r}: {error}") from error

    def _check_room(self, name: str, needed: int) -> None:
        """Refuse what cannot be in memory together with what is never dropped."""
        with self._lock:
            lasting = sum(self._lasting().values())
        if self.capacity_bytes is not None and needed + lasting > self.capacity_bytes:
            beside = f" beside the {lasting:,} of adapters without a folder" if lasting else ""
            raise AdapterError(f"{name!r}: needs {needed:,} bytes{beside}, more than capacity_bytes={self.capacity_bytes:,}")

    def _put(self, name: str, value: Held, source: Source | None) -> None:
        """Keep an adapter under its reserved name.

        Raises:
            AdapterError: where it is too large.
        """
        with self._lock:
            entry = _Entry(value, self._sizes(value), source)
            self._check_room(name, sum(entry.sizes.values()))
            self._entries[name] = entry
            self.loads += 1
            self._shrink()

    def _entry(self, name: str, *, leaving: bool = True) -> _Entry[Held]:
        """The entry of a name; one that is being unloaded only if `leaving`."""
        entry = self._entries.get(name)
        if entry is None or (entry.leaving and not leaving):
            known = sorted(self._entries)
            listed = ", ".join(known[:10]) + (" …" if len(known) > 10 else "")
            raise UnknownAdapter(f"{name!r}: no such adapter; loaded are {listed or 'none'}")
        return entry

    def _lasting(self) -> dict[Hashable, int]:
        """Sizes of what is never dropped."""
        return _merged(entry.sizes for entry in self._entries.values() if entry.source is None)

    def _shrink(self) -> None:
        """Drop what is beyond the capacity, values used longest ago first; never the last used, which are being asked for."""
        if self.capacity_bytes is None:
            return
        kept = _merged([self._standing(), self._lasting()])
        room = self.capacity_bytes - sum(kept.values())
        for age, entry in enumerate(reversed(self._entries.values())):
            if entry.source is not None and entry.value is not None:
                room -= sum(size for key, size in entry.sizes.items() if key not in kept)
                kept |= entry.sizes
                if room < 0 and age > 0:
                    entry.value, entry.sizes = None, {}
                    self.evictions += 1


def _merged(sizes: Iterable[Mapping[Hashable, int]]) -> dict[Hashable, int]:
    return {key: size for each in sizes for key, size in each.items()}
