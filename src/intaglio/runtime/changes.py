"""The changes that an adapter makes to the outputs of linear layers, in a form in which many adapters run in one batch.

For inputs x, n channels h are read and written back:

    h = x[:, read]   or   h = x @ readᵀ          read: int64 [n], or values [n, in]
    y[:, write] += h   or   y += h @ write       write: int64 [n], or values [n, out]

Columns idx of a weight are (read = idx, write = D[:, idx]ᵀ), rows are (read = D[idx], write = idx), with D = tuned − base;
LoRA is (read = A, write = s Bᵀ), and where A or Bᵀ is one-hot its index stands for it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor, nn

from ..adapter.delta import Delta
from ..core.entries import Slices
from ..core.fingerprint import fingerprint
from ..model.structure import is_linear, is_transposed

__all__ = ["Adapter", "Change", "LinearLayers", "from_delta", "one_hot"]

_LARGEST = 1e4  # no weight is this large, and with more an activation could overflow and spoil its batch
_serial = itertools.count()


@final
@dataclass(frozen=True, eq=False)
class Change:
    """The channels that one adapter adds to one linear layer.

    Args:
        read: which inputs the n channels are, int64 `[n]`, or what reads them, values `[n, in]`.
        write: to which outputs they go, int64 `[n]`, distinct, or what writes them, values `[n, out]`.
    """

    read: Tensor
    write: Tensor

    @property
    def channels(self) -> int:
        """How many there are."""
        return self.read.shape[0]

    @property
    def form(self) -> tuple[bool, bool]:
        """Whether `read` and `write` are indices."""
        return self.read.dtype == torch.int64, self.write.dtype == torch.int64

    def apply_(self, y_TO: Tensor, x_TI: Tensor) -> None:
        """Add this change to rows that are all this adapter's."""
        by_index, to_index = self.form
        h_TN = x_TI.index_select(1, self.read) if by_index else x_TI @ self.read.T
        if to_index:
            y_TO[:, self.write] += h_TN
        else:
            y_TO.addmm_(h_TN, self.write)


@final
@dataclass(frozen=True, eq=False)
class Adapter:
    """The changes of one adapter, by the path of the linear layer; all values lie in one block of memory.

    Attributes:
        changes: path → change.
        serial: tells this adapter from every other one that was ever made.
        written: width → number of rows `[n, out]` that its changes write with.
    """

    changes: Mapping[str, Change]
    serial: int = field(default_factory=lambda: next(_serial))
    offsets: Mapping[str, int] = field(init=False)
    written: Mapping[int, int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "changes", _packed(self.changes))
        offsets, written = {}, {}
        for path, change in self.changes.items():
            if not change.form[1]:
                width = change.write.shape[1]
                offsets[path] = written.get(width, 0)
                written[width] = offsets[path] + change.channels
        object.__setattr__(self, "offsets", offsets)
        object.__setattr__(self, "written", written)

    @property
    def nbytes(self) -> int:
        """Bytes of all indices and values."""
        return sum(t.numel() * t.element_size() for c in self.changes.values() for t in (c.read, c.write))


@final
class LinearLayers:
    """The linear layers of a model that an adapter may change: those whose weight is their own and that see every row.

    Args:
        model: the base. Its output head is left out, which sees the last token of each row only.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        uses: dict[int, int] = {}
        for _, parameter in model.named_parameters(remove_duplicate=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
        get_head: Callable[[], object] = getattr(model, "get_output_embeddings", lambda: None)
        head = get_head()
        self.by_path = {
            path: module
            for path, module in model.named_modules()
            if is_linear(module) and module is not head and uses.get(id(module.weight)) == 1
        }

    def of(self, parameter: str) -> tuple[str, nn.Module]:
        """Path and layer of a weight.

        Raises:
            ValueError: where the name is none of such a layer's weight.
        """
        path, _, name = parameter.rpartition(".")
        if name != "weight" or path not in self.by_path:
            raise ValueError(
                f"{parameter}: not the weight of a linear layer of its own inside this model; many adapters in one batch "
                "change those only: apply this adapter alone (AdapterPool), or export it merged"
            )
        return path, self.by_path[path]

    def sizes(self, path: str) -> tuple[int, int]:
        """Inputs and outputs of a layer."""
        weight = self.by_path[path].weight
        assert isinstance(weight, Tensor)
        first, second = weight.shape
        return (first, second) if is_transposed(self.by_path[path]) else (second, first)


def from_delta(delta: Delta, layers: LinearLayers) -> Adapter:
    """The changes of a delta of rows or columns, D = tuned − base taken against the live weights.

    Args:
        delta: its values are checked against the base's fingerprints.
        layers: of the base.

    Raises:
        ValueError: naming the parameter, for another base, another type, scattered entries, or anything but linear weights.
    """
    changes: dict[str, Change] = {}
    found: dict[str, Future[str]] = {}
    with ThreadPoolExecutor(1) as pool:  # half of the time is hashing, which leaves the interpreter to others
        for name in delta.selection:
            path, base = _base(delta, name, layers)
            found[name] = pool.submit(fingerprint, base)
            changes[path] = _change(delta, name, layers.by_path[path], base)
    for name, future in found.items():
        if future.result() != delta.fingerprints[name]:
            raise ValueError(
                f"{name}: base fingerprint {delta.fingerprints[name]} expected, {future.result()} found: this adapter was "
                f"trained on another base ({delta.base!r})"
            )
    delta.check_rest(layers.model)
    return Adapter(changes)


def one_hot(factor_NW: Tensor) -> Tensor | None:
    """Where the single 1 of each row stands, int64 `[n]`; None where a row is anything else."""
    index = factor_NW.argmax(1)
    ones = factor_NW.gather(1, index[:, None])[:, 0]
    return index if bool((ones == 1).all()) and int(factor_NW.count_nonzero()) == factor_NW.shape[0] else None


def check_values(name: str, values: Tensor) -> None:
    """Refuse values that would spoil the batch they run in.

    Raises:
        ValueError: for NaN, infinity, or numbers that no weight has.
    """
    largest = values.abs().max().item() if values.numel() else 0.0
    if not largest <= _LARGEST:  # catches NaN too
        raise ValueError(f"{name}: holds {largest:g}; values must be finite and at most {_LARGEST:g}")


def _base(delta: Delta, name: str, layers: LinearLayers) -> tuple[str, Tensor]:
    """The layer's path, and the base's values where the delta has its own."""
    entries, tuned = delta.selection[name], delta.values[name]
    path, layer = layers.of(name)
    if not isinstance(entries, Slices):
        raise ValueError(
            f"{name}: holds {entries.kind}; many adapters in one batch take rows or columns (slices). Apply this adapter "
            "alone (AdapterPool), export it merged, or as an ordinary LoRA by SVD (intaglio export)"
        )
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if tuple(weight.shape) != entries.shape or weight.dtype != tuned.dtype:
        raise ValueError(
            f"{name}: made for {list(entries.shape)} in {tuned.dtype}, the model has {list(weight.shape)} in {weight.dtype}"
        )
    return path, entries.to(weight.device).gather(weight)


def _change(delta: Delta, name: str, layer: nn.Module, base: Tensor) -> Change:
    entries = delta.selection[name]
    assert isinstance(entries, Slices)  # _base has refused all else
    difference = delta.values[name].to(base) - base
    check_values(name, difference)
    rows = difference if entries.dim == 0 else difference.T
    index = entries.index.to(base.device)
    of_inputs = (entries.dim == 0) == is_transposed(layer)
    return Change(index, rows) if of_inputs else Change(rows, index)


def _packed(changes: Mapping[str, Change]) -> dict[str, Change]:
    """The same changes with their values in one block, so that a large adapter is one piece of memory to give back."""
    values = [t for change in changes.values() for t in (change.read, change.write) if t.is_floating_point()]
    block = torch.empty(0) if not values else values[0].new_empty(sum(t.numel() for t in values))
    places = iter(block.split([t.numel() for t in values]))

    def place(tensor: Tensor) -> Tensor:
        return next(places).view(tensor.shape).copy_(tensor) if tensor.is_floating_point() else tensor

    return {path: Change(place(change.read), place(change.write)) for path, change in changes.items()}
