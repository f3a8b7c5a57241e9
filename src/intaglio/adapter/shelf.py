"""Loaded adapters by name, within a bound of memory: values used longest ago are dropped and read again from their folders."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import final

from ..core.entries import Elements, Slices
from .delta import Delta
from .folder import WEIGHTS, read_config
from .names import check_name
from .overlay import Piece

__all__ = ["Shelf", "Source", "open_source"]


@dataclass
class Source:
    """Where an adapter comes from.

    Attributes:
        folder: where its values can be read again; None for one that was given as a Delta, or fused, which stays in memory.
        stamp: what tells the folder's weights from others.
    """

    folder: Path | None = None
    stamp: str = ""


@dataclass
class _Adapter:
    source: Source
    pieces: dict[str, Piece] | None  # None where they were dropped


def open_source(source: Delta | str | os.PathLike[str]) -> tuple[Source, Delta]:
    """Read an adapter, from a folder or as it is.

    Raises:
        ValueError: as `Delta.load`.
    """
    if isinstance(source, Delta):
        return Source(), source
    folder = Path(source).resolve()
    return Source(folder, _stamp(folder)), Delta.load(folder)


@final
class Shelf:
    """Adapters by name, ready to be put on a model.

    Args:
        prepare: checks a Delta against the model and makes its pieces.
        standing: what stands on the model, which counts too.
        capacity: bytes that all may take; None for no bound.
    """

    def __init__(
        self, prepare: Callable[[Delta], dict[str, Piece]], standing: Callable[[], Iterable[Piece]], capacity: int | None
    ) -> None:
        if capacity is not None and (isinstance(capacity, bool) or not capacity > 0):
            raise ValueError(f"capacity_bytes={capacity!r}: give a number of bytes above 0, or None for no bound")
        self._prepare, self._standing, self._capacity = prepare, standing, capacity
        self._adapters: dict[str, _Adapter] = {}  # used longest ago first

    @property
    def names(self) -> list[str]:
        """The adapters, by name."""
        return sorted(self._adapters)

    @property
    def nbytes(self) -> int:
        """Bytes of values, indices, and the base's values at their places, each tensor once."""
        held = (adapter.pieces or {} for adapter in self._adapters.values())
        return sum(_sizes([*self._standing(), *(piece for pieces in held for piece in pieces.values())]).values())

    def refuse(self, name: str) -> None:
        """Refuse a name that no adapter may get.

        Raises:
            ValueError: where it is no name, or taken.
        """
        check_name(name)
        if name in self._adapters:
            raise ValueError(f"name={name!r}: an adapter of this name is loaded; unload it first, or take another name")

    def add(self, name: str, source: Source, delta: Delta) -> None:
        """Prepare and keep an adapter.

        Raises:
            ValueError: as `refuse` and `prepare`, and where it does not fit into the capacity.
        """
        self.refuse(name)
        self._refuse_oversized(name, _needed(delta))
        self._keep(name, _Adapter(source, self._prepare(delta)))

    def add_fused(self, name: str, pieces: dict[str, Piece]) -> None:
        """Keep pieces that come from no folder.

        Raises:
            ValueError: as `refuse`, and where they do not fit into the capacity.
        """
        self.refuse(name)
        self._refuse_oversized(name, sum(_sizes(pieces.values()).values()))
        self._keep(name, _Adapter(Source(), pieces))

    def get(self, name: str) -> dict[str, Piece]:
        """An adapter's pieces, read again where they were dropped; it is the one used last now.

        Raises:
            ValueError: for an unknown name, or a folder that can no longer be read or holds something else.
        """
        adapter = self._known(name)
        if adapter.pieces is None:
            adapter.pieces = self._read_again(name, adapter.source)
        pieces = adapter.pieces
        self._keep(name, self._adapters.pop(name))
        return pieces

    def remove(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            ValueError: for an unknown name.
        """
        self._known(name)
        del self._adapters[name]

    def clear(self) -> None:
        """Forget every adapter."""
        self._adapters.clear()

    def __contains__(self, name: object) -> bool:
        return name in self._adapters

    def __len__(self) -> int:
        return len(self._adapters)

    def _known(self, name: str) -> _Adapter:
        if name not in self._adapters:
            raise ValueError(f"{name!r}: no such adapter; loaded are {', '.join(self.names) or 'none'}")
        return self._adapters[name]

    def _read_again(self, name: str, source: Source) -> dict[str, Piece]:
        assert source.folder is not None
        try:
            if _stamp(source.folder) != source.stamp:
                raise ValueError(f"{source.folder}: holds other weights now")
            return self._prepare(Delta.load(source.folder))
        except ValueError as error:
            raise ValueError(f"{name!r}: was dropped from memory and cannot be read again ({error}); load it anew") from error

    def _keep(self, name: str, adapter: _Adapter) -> None:
        """Put an adapter last, and drop values that are beyond the capacity, those used longest ago first."""
        self._adapters[name] = adapter
        if self._capacity is None:
            return
        kept = _sizes([*self._standing(), *self._lasting()])
        room = self._capacity - sum(kept.values())
        for other in reversed(self._adapters.values()):
            if other.source.folder is not None and other.pieces is not None:
                sizes = _sizes(other.pieces.values())
                room -= sum(size for key, size in sizes.items() if key not in kept)
                kept |= sizes
                if room < 0:
                    other.pieces = None

    def _lasting(self) -> Iterator[Piece]:
        """Pieces that can be read from no folder."""
        for adapter in self._adapters.values():
            if adapter.source.folder is None:
                yield from (adapter.pieces or {}).values()

    def _refuse_oversized(self, name: str, needed: int) -> None:
        lasting = sum(_sizes(self._lasting()).values())
        if self._capacity is not None and needed + lasting > self._capacity:
            raise ValueError(
                f"{name!r}: needs {needed:,} bytes, and {lasting:,} are held by adapters without a folder; "
                f"capacity_bytes={self._capacity:,} cannot hold both: give more"
            )


def _stamp(folder: Path) -> str:
    """The hash of a folder's weights, which its config names; transformers writes configs that do not."""
    named, path = read_config(folder).get("sha256"), folder / WEIGHTS
    if isinstance(named, str):
        return named
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def _sizes(pieces: Iterable[Piece]) -> dict[int, int]:
    """Bytes of the tensors that pieces hold, each once."""
    tensors = []
    for piece in pieces:
        entries = piece.place.entries
        tensors += [piece.values, piece.place.base, *([entries.index] if isinstance(entries, Slices | Elements) else [])]
    return {id(tensor): tensor.nbytes for tensor in tensors}


def _needed(delta: Delta) -> int:
    """Bytes that an adapter takes by itself."""
    indices = sum(entries.index.nbytes for entries in delta.selection.values() if isinstance(entries, Slices | Elements))
    return 2 * sum(values.nbytes for values in delta.values.values()) + indices
