"""Many adapters in one batch: forward hooks add to each row what its own adapter changes.

The batch is one long list of rows, as continuous batching feeds it, cut into segments that belong to one adapter or to none.
A long segment (a prompt) is two small products. The short ones (a token each, while answers are generated) go together,
however unequal their adapters are: one gather reads all their channels, and one weighted sum of rows of a common table
writes them (`embedding_bag`: nothing is padded, every value is read once).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .changes import Adapter, Change, LinearLayers
from .table import Table

__all__ = ["Batch", "Mixer", "mix_plainly"]

_SHORT = 4  # rows of a segment up to which it goes with the others


@final
class Mixer:
    """Hooks through which a model runs with an adapter per row.

    Args:
        model: the base; its weights stay as they are. One thread at a time may run it.
        layers: its linear layers; default: found here.

    Example:
        >>> mixer = Mixer(model)
        >>> with mixer.using([alice, None]):  # the first sequence is Alice's, the second the base's
        ...     model.generate(**batch)
    """

    def __init__(self, model: nn.Module, layers: LinearLayers | None = None) -> None:
        layers = layers or LinearLayers(model)
        self._batch: Batch | None = None
        self._last: Batch | None = None
        self._tables: dict[int, Table] = {}
        self._handles = [layer.register_forward_hook(self._hook(path)) for path, layer in layers.by_path.items()]

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def forget(self) -> None:
        """Let go of the adapters of the last batch, which is kept in case that the next one is the same."""
        self._last = None

    @contextmanager
    def using(self, adapters: Sequence[Adapter | None], lengths: Sequence[int] | None = None) -> Iterator[None]:
        """Run what is inside with these adapters.

        Args:
            adapters: of each segment of the batch; None is the base.
            lengths: rows of each segment; default: all equal, one segment per sequence of an ordinary batch.
        """
        if self._last is None or not self._last.is_of(adapters, lengths):
            self._last = None  # and with it a table that may have to grow
            self._last = Batch(adapters, lengths, self._tables)
        self._batch = self._last if any(adapter is not None for adapter in adapters) else None
        try:
            yield
        finally:
            self._batch = None

    def _hook(self, path: str) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if self._batch is not None:
                self._batch.mix_(path, output.flatten(0, -2), inputs[0].flatten(0, -2))
                output.nan_to_num_()  # one adapter's overflow may not reach others: attention has 0 · NaN

        return hook


@final
class Batch:
    """The segments of one step, and for each layer how they are run; made once, used while the batch stays the same."""

    def __init__(self, adapters: Sequence[Adapter | None], lengths: Sequence[int] | None, tables: dict[int, Table]) -> None:
        self._adapters, self._lengths = list(adapters), None if lengths is None else list(lengths)
        self._tables = tables
        distinct = {adapter.serial: adapter for adapter in adapters if adapter is not None}.values()
        for width in {width for adapter in distinct for width in adapter.written}:
            tables.setdefault(width, Table(width)).place([a for a in distinct if width in a.written])
        self._steps: dict[tuple[str, int], list[_Step]] = {}

    def is_of(self, adapters: Sequence[Adapter | None], lengths: Sequence[int] | None) -> bool:
        return (
            len(self._adapters) == len(adapters)
            and all(a is b for a, b in zip(self._adapters, adapters, strict=True))
            and self._lengths == (None if lengths is None else list(lengths))
        )

    @torch.no_grad()
    def mix_(self, path: str, y_TO: Tensor, x_TI: Tensor) -> None:
        key = path, y_TO.shape[0]
        if key not in self._steps:
            self._steps[key] = self._plan(path, y_TO, x_TI)
        for step in self._steps[key]:
            step.run_(y_TO, x_TI)

    def _plan(self, path: str, y_TO: Tensor, x_TI: Tensor) -> list[_Step]:
        together: dict[tuple[bool, bool], list[tuple[int, Adapter, Change]]] = {}
        steps: list[_Step] = []
        for adapter, start, stop in self._segments(y_TO.shape[0]):
            change = None if adapter is None else adapter.changes.get(path)
            if adapter is None or change is None:
                continue
            if stop - start > _SHORT:
                steps.append(_Long(start, stop, change))
            else:
                together.setdefault(change.form, []).extend((row, adapter, change) for row in range(start, stop))
        for (by_index, to_index), rows in together.items():
            h = _Gather(rows, x_TI) if by_index else _Products(rows)
            write = _Scatter(rows, y_TO) if to_index else _Bags(path, rows, y_TO, self._tables[y_TO.shape[1]])
            steps.append(_Together(h, write))
        return steps

    def _segments(self, rows: int) -> Iterator[tuple[Adapter | None, int, int]]:
        lengths = self._lengths or [rows // len(self._adapters)] * len(self._adapters)
        if sum(lengths) != rows:
            raise RuntimeError(f"a layer was given {rows} rows, the batch has {sum(lengths)}: its adapters cannot be told")
        start = 0
        for adapter, length in zip(self._adapters, lengths, strict=True):
            yield adapter, start, start + length
            start += length


class _Step(ABC):
    """A step of what a layer does for the adapters of a batch."""

    @abstractmethod
    def run_(self, y_TO: Tensor, x_TI: Tensor) -> None:
        """Add to the outputs `[rows, out]` what follows from the inputs `[rows, in]`."""


@final
class _Long(_Step):
    """A segment by itself."""

    def __init__(self, start: int, stop: int, change: Change) -> None:
        self._rows, self._change = slice(start, stop), change

    def run_(self, y_TO: Tensor, x_TI: Tensor) -> None:
        self._change.apply_(y_TO[self._rows], x_TI[self._rows])


@final
class _Together(_Step):
    """Many short segments: read the channels of all, write them all."""

    def __init__(self, read: _Gather | _Products, write: _Scatter | _Bags) -> None:
        self._read, self._write = read, write

    def run_(self, y_TO: Tensor, x_TI: Tensor) -> None:
        self._write(y_TO, self._read(x_TI))


_Rows = list[tuple[int, Adapter, Change]]


@final
class _Gather:
    """Channels that are inputs: h[k] = x[row of k, read of k]."""

    def __init__(self, rows: _Rows, x_TI: Tensor) -> None:
        self._places = _flat_places(rows, [change.read for _, _, change in rows], x_TI)

    def __call__(self, x_TI: Tensor) -> Tensor:
        return x_TI.reshape(-1).index_select(0, self._places)


@final
class _Products:
    """Channels that are read with values: a small product per row."""

    def __init__(self, rows: _Rows) -> None:
        self._rows = [(row, change.read.T) for row, _, change in rows]

    def __call__(self, x_TI: Tensor) -> Tensor:
        return torch.cat([x_TI[row : row + 1] @ read_IN for row, read_IN in self._rows], 1)[0]


@final
class _Scatter:
    """Channels that go to outputs: y[row of k, write of k] += h[k]; all places are distinct."""

    def __init__(self, rows: _Rows, y_TO: Tensor) -> None:
        self._places = _flat_places(rows, [change.write for _, _, change in rows], y_TO)

    def __call__(self, y_TO: Tensor, h: Tensor) -> None:
        y_TO.view(-1).index_add_(0, self._places, h)


@final
class _Bags:
    """Channels that are written with values: y[row] += Σ h[k] · table[place of k]."""

    def __init__(self, path: str, rows: _Rows, y_TO: Tensor, table: Table) -> None:
        counts = _counts(rows, y_TO.device)
        starts = torch.tensor([table.starts[a.serial] + a.offsets[path] for _, a, _ in rows], device=y_TO.device)
        self._offsets = F.pad(counts.cumsum(0), (1, 0))
        total = int(self._offsets[-1])
        self._places = torch.arange(total, device=y_TO.device)
        self._places += torch.repeat_interleave(starts - self._offsets[:-1], counts, output_size=total)
        self._table = table.rows
        every = [row for row, _, _ in rows] == list(range(y_TO.shape[0]))
        self._rows = None if every else torch.tensor([row for row, _, _ in rows], device=y_TO.device)

    def __call__(self, y_TO: Tensor, h: Tensor) -> None:
        added = F.embedding_bag(
            self._places, self._table, self._offsets, mode="sum", per_sample_weights=h, include_last_offset=True
        )
        if self._rows is None:
            y_TO.add_(added)
        else:
            y_TO.index_add_(0, self._rows, added)


def mix_plainly(y_TO: Tensor, x_TI: Tensor, path: str, adapters: Sequence[Adapter | None]) -> Tensor:
    """What `Mixer` computes, one row and one adapter at a time: the twin that the tests compare it with.

    Args:
        y_TO: outputs of the base's layer, `[rows, out]`.
        x_TI: its inputs, `[rows, in]`.
        path: of the layer.
        adapters: one per row.
    """
    y_TO = y_TO.clone()
    for row, adapter in enumerate(adapters):
        if adapter is not None and path in adapter.changes:
            adapter.changes[path].apply_(y_TO[row : row + 1], x_TI[row : row + 1])
    return y_TO


def _counts(rows: _Rows, device: torch.device) -> Tensor:
    return torch.tensor([change.channels for _, _, change in rows], device=device)


def _flat_places(rows: _Rows, indices: list[Tensor], matrix: Tensor) -> Tensor:
    """Places of `indices` in the flattened matrix, each list in the row it belongs to."""
    starts = torch.tensor([row * matrix.shape[1] for row, _, _ in rows], device=matrix.device)
    return torch.cat(indices) + torch.repeat_interleave(starts, _counts(rows, matrix.device))
