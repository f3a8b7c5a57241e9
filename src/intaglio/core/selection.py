"""A selection says what may change: it maps parameter names to entries, and an absent name is frozen.

Methods answer with a `Selection`; everything else (training, saving, merging, plotting) reads it and never asks which
method gave it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import final

from .algebra import difference, same, shared, union
from .entries import Entries

__all__ = ["Selection"]


@final
class Selection(Mapping[str, Entries]):
    """Parameter name → entries, in the order given.

    >>> s = Selection({"w": Slices((4, 6), 1, torch.tensor([0, 5]))})
    >>> s.size, s["w"].flat().tolist()
    (8, [0, 5, 6, 11, 12, 17, 18, 23])
    """

    def __init__(self, entries: Mapping[str, Entries] | None = None) -> None:
        self._entries = dict(entries or {})

    def __getitem__(self, name: str) -> Entries:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"Selection({len(self)} parameters, {self.size:,} entries)"

    def __eq__(self, other: object) -> bool:
        """Equal where the same entries are chosen, whatever their kind (Slices of all rows equal Whole)."""
        if not isinstance(other, Selection):
            return NotImplemented
        return self.keys() == other.keys() and all(same(self[name], other[name]) for name in self)

    __hash__ = None  # type: ignore[assignment]

    @property
    def size(self) -> int:
        """Number of chosen entries over all parameters."""
        return sum(entries.count for entries in self.values())

    def union(self, other: Mapping[str, Entries]) -> Selection:
        """Entries in either selection; slices along one dimension stay slices."""
        merged = dict(self._entries)
        for name, entries in other.items():
            merged[name] = union(merged[name], entries) if name in merged else entries
        return Selection(merged)

    def intersection(self, other: Mapping[str, Entries]) -> Selection:
        """Entries in both selections."""
        kept = {name: shared(entries, other[name]) for name, entries in self.items() if name in other}
        return Selection({name: entries for name, entries in kept.items() if entries is not None})

    def difference(self, other: Mapping[str, Entries]) -> Selection:
        """Entries of this selection that are not in `other`."""
        kept = {name: difference(entries, other.get(name)) for name, entries in self.items()}
        return Selection({name: entries for name, entries in kept.items() if entries is not None})

    def overlap(self, other: Mapping[str, Entries]) -> int:
        """Number of entries in both selections."""
        return self.size - self.difference(other).size
