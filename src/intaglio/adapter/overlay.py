"""The values that stand on a model's base weights, and how others are put in their place.

Base values at the places of every adapter are saved when it is loaded. Putting one on writes them back where the one before
had changed the weights, then writes its own values: nothing is added or subtracted, so nothing ever rounds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import final
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from ..core.algebra import shared, within
from ..core.entries import Elements, Entries, Slices
from ..core.fingerprint import fingerprint
from ..model.permute import Layout

__all__ = ["Overlay", "Piece", "Place"]


@final
@dataclass(frozen=True, eq=False)
class Place:
    """Entries of one parameter, as they lie in the model, and the base's values there."""

    entries: Entries
    base: Tensor


@final
@dataclass(frozen=True, eq=False)
class Piece:
    """Values that an adapter puts at one place."""

    place: Place
    values: Tensor


@final
class Overlay:
    """The values that stand on a model's base weights.

    Adapters with the same entries share one `Place`: from one to the other, nothing is restored.

    Args:
        model: holds the base; nothing of ours stands on it.
        layout: where its positions lie, if it was permuted.
        rows: keep weights that are changed by scattered columns in column-major storage, where a column is one run of memory.
    """

    def __init__(self, model: nn.Module, layout: Layout, *, rows: bool) -> None:
        self._layout, self._rows = layout, rows
        paths = {name: name.rpartition(".") for name, _ in model.named_parameters()}
        self._owners = {name: (model.get_submodule(path), key) for name, (path, _, key) in paths.items()}
        self._users = Counter(parameter.untyped_storage().data_ptr() for parameter in model.parameters())
        self._live: dict[str, Piece] = {}
        self._places: WeakValueDictionary[tuple[object, ...], Place] = WeakValueDictionary()
        self._seen: dict[str, tuple[nn.Parameter, int]] = {}
        self._turned: set[str] = set()

    @property
    def moved(self) -> Collection[str]:
        """Parameters whose positions do not lie as in the base."""
        return self._layout.orders

    @property
    def standing(self) -> dict[str, Piece]:
        """What stands on the model, by parameter."""
        return dict(self._live)

    def base_at(self, name: str, entries: Entries) -> Tensor:
        """The base's values at entries in the model's coordinates, whatever stands on it."""
        weight, live = self._weight(name), self._live.get(name)
        values = entries.to(weight.device).gather(weight)
        both = None if live is None else shared(entries, live.place.entries)
        if live is not None and both is not None:
            into, out = (within(e, both).to(weight.device) for e in (entries, live.place.entries))
            into.scatter_(values, out.gather(live.place.base.to(weight.device)).reshape(into.values_shape))
        return values

    def originals(self, name: str, entries: Entries) -> Tensor:
        """The base's values at entries in the base's coordinates.

        Raises:
            ValueError: where a permuted model cannot hold them.
        """
        moved, order = self._layout.moved(name, entries)
        values = self.base_at(name, moved)
        return values if order is None else _reordered(moved, values, order.argsort())

    def piece(self, name: str, entries: Entries, values: Tensor) -> Piece:
        """Get ready to put values on, given in the base's coordinates."""
        moved, order = self._layout.moved(name, entries)
        return self.piece_in_model(name, moved, values if order is None else _reordered(moved, values, order))

    def piece_in_model(self, name: str, entries: Entries, values: Tensor) -> Piece:
        """Get ready to put values on, given in the model's coordinates."""
        weight = self._weight(name)
        if self._rows and _pays(entries) and weight.is_contiguous() and self._users[weight.untyped_storage().data_ptr()] == 1:
            with torch.inference_mode(False):  # else its writes are no longer counted, and it cannot be trained
                weight.data = weight.data.t().contiguous().t()
            self._turned.add(name)
            self._note(name)
        self._seen.setdefault(name, (weight, _version(weight)))
        key = (name, *_identity(entries))
        place = self._places.get(key)
        if place is None:
            placed = entries.to(weight.device)
            place = self._places[key] = Place(placed, _as_stored(self.base_at(name, placed), weight))
        return Piece(place, _as_stored(values.to(weight), weight))

    def check(self, names: Iterable[str]) -> None:
        """Refuse to go on where somebody else changed or replaced a weight since we last looked.

        Args:
            names: parameters that are about to be used; those that something stands on are looked at too.

        Raises:
            ValueError: naming the parameter.
        """
        for name in {*names, *self._live}:
            weight = self._weight(name)
            known, version = self._seen.get(name, (weight, _version(weight)))
            if known is not weight or version != _version(weight):
                raise ValueError(
                    f"{name}: was changed by something other than this pool (training, load_state_dict, another adapter), so "
                    "nothing can be put on or taken off; unload all and load them again, or make a new pool on a fresh base"
                )

    def put(self, pieces: Mapping[str, Piece]) -> None:
        """Let the base with `pieces` on it, and nothing else, stand in the model, once `check` has passed.

        Interrupted at any point, a later call still knows every place where something other than the base may stand.
        """
        for name, old in list(self._live.items()):
            if name not in pieces or pieces[name].place is not old.place:
                self._write(name, Piece(old.place, old.place.base))
                del self._live[name]
        for name, piece in pieces.items():
            if self._live.get(name) is not piece:
                self._write(name, piece)

    def restart(self) -> None:
        """Take the weights as they are from now on; nothing may stand on them."""
        assert not self._live
        self._seen.clear()
        self._places.clear()

    def turn_back(self) -> None:
        """Give every weight the storage it had."""
        for name in self._turned:
            self._weight(name).data = self._weight(name).data.contiguous()
            self._note(name)
        self._turned.clear()

    def _weight(self, name: str) -> nn.Parameter:
        module, key = self._owners[name]
        weight = module._parameters[key]
        assert weight is not None
        return weight

    def _write(self, name: str, piece: Piece) -> None:
        weight = self._weight(name)
        self._live[name] = Piece(piece.place, piece.place.base)  # no adapter's, until all of it is written
        try:
            piece.place.entries.to(weight.device).scatter_(weight, piece.values)
        finally:
            self._note(name)
        self._live[name] = piece

    def _note(self, name: str) -> None:
        self._seen[name] = (self._weight(name), _version(self._weight(name)))


def _version(weight: Tensor) -> int:
    """How often a tensor was written in place; tensors made in inference mode do not count."""
    return 0 if weight.is_inference() else weight._version


def _identity(entries: Entries) -> tuple[object, ...]:
    """What two equal entries of one kind have in common."""
    dim = entries.dim if isinstance(entries, Slices) else None
    return entries.kind, dim, fingerprint(entries.index) if isinstance(entries, Slices | Elements) else None


def _pays(entries: Entries) -> bool:
    """Whether column-major storage makes entries quicker to write: scattered columns."""
    return isinstance(entries, Slices) and len(entries.shape) == 2 and entries.dim == 1 and entries.runs is None


def _as_stored(values: Tensor, weight: Tensor) -> Tensor:
    """The same values, lying in memory as the weight does."""
    turned = weight.dim() == values.dim() == 2 and weight.stride(0) < weight.stride(1)
    return values.t().contiguous().t() if turned else values.contiguous()


def _reordered(entries: Entries, values: Tensor, order: Tensor) -> Tensor:
    assert isinstance(entries, Slices)  # a layout moves no others
    return values.index_select(entries.dim, order.to(values.device))
