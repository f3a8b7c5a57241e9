"""Rows of the adapters that are running, side by side in one tensor, so that one call can read those of any of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch

from .changes import Adapter

__all__ = ["Table"]


@final
class Table:
    """The rows `[n, width]` that adapters write with.

    An adapter's rows stay when it stops running, until others need the room: a user who asks again finds them.

    Args:
        width: outputs of the layers whose changes it holds.

    Attributes:
        rows: all rows, `[room, width]`. Another tensor after `place` had to make room.
        starts: serial of an adapter → its first row.
    """

    def __init__(self, width: int) -> None:
        self.rows, self.starts = torch.empty(0, width), dict[int, int]()
        self._sizes: dict[int, int] = {}

    def place(self, adapters: Sequence[Adapter]) -> None:
        """Have the rows of these adapters in the table."""
        wanted = {adapter.serial for adapter in adapters}
        for adapter in adapters:
            if adapter.serial in self.starts:
                self.starts[adapter.serial] = self.starts.pop(adapter.serial)  # the last to give way
                continue
            start = self._room(adapter.written[self.rows.shape[1]], wanted)
            if start is None:
                self._rebuild(adapters)
                return
            self._write(adapter, start)

    def _room(self, size: int, wanted: set[int]) -> int | None:
        """The start of a gap of `size` rows, after those that are not wanted have given way, the oldest first."""
        start = self._gap(size)
        for serial in [serial for serial in self.starts if serial not in wanted]:
            if start is not None:
                break
            del self.starts[serial], self._sizes[serial]
            start = self._gap(size)
        return start

    def _gap(self, size: int) -> int | None:
        end = 0
        for start, serial in sorted((start, serial) for serial, start in self.starts.items()):
            if start - end >= size:
                return end
            end = start + self._sizes[serial]
        return end if self.rows.shape[0] - end >= size else None

    def _rebuild(self, adapters: Sequence[Adapter]) -> None:
        """A larger table with these adapters alone."""
        width = self.rows.shape[1]
        need = sum(adapter.written[width] for adapter in adapters)
        like = next(c.write for p, c in adapters[0].changes.items() if p in adapters[0].offsets and c.write.shape[1] == width)
        room = self.rows.shape[0]
        room = room if need <= room else max(need, room * 3 // 2)
        self.rows = torch.empty(0, width)  # frees the old one first
        self.rows = like.new_empty(room, width)
        self.starts, self._sizes, start = {}, {}, 0
        for adapter in adapters:
            self._write(adapter, start)
            start += adapter.written[width]

    def _write(self, adapter: Adapter, start: int) -> None:
        width = self.rows.shape[1]
        for path, offset in adapter.offsets.items():
            change = adapter.changes[path]
            if change.write.shape[1] == width:
                self.rows[start + offset : start + offset + change.channels] = change.write
        self.starts[adapter.serial], self._sizes[adapter.serial] = start, adapter.written[width]
