"""Many adapters on one live model: switch between them by writing saved values, and have the exact base back at any time."""

from __future__ import annotations

import os
import threading
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal, final

from torch import nn

from ..core.entries import Elements, Slices
from ..core.selection import Selection
from ..model.permute import Layout
from ..model.wrappers import unwrapped
from .delta import Delta, refuse_tuner
from .fuse import Part, check_weights, combine, warn_of_overlap
from .overlay import Overlay, Piece
from .shelf import AdapterInUse, Shelf

__all__ = ["AdapterPool"]


@final
class AdapterPool:
    """Adapters of one base, on one live model.

    At most one stands on the model at a time. Switching writes the base's saved values back where the one before had changed
    them, and the values of the next: every bit of the base returns, any number of times, in any type. Beside the model, only
    values and base values at the adapters' own places are kept, on the device of the weights; the base is never copied.

    Methods are safe to call from several threads. A switch while another thread is inside the model's forward mixes two
    adapters in one answer: run the model inside `with pool.using(name):`, which holds the pool for that block. Caches of keys
    and values belong to the adapter they were computed with.

    Args:
        model: the base; frozen or not, without a tuner, unquantized.
        capacity_bytes: memory for adapters, beyond which the values of those used longest ago are dropped and read again from
            their folders when next used; default None, no bound. Adapters given as a `Delta` have no folder and are never
            dropped.
        storage: "rows" keeps the weights that adapters change by scattered columns (S2FT's down and o) transposed in memory:
            same values, same shape, other strides. Such columns are then written several times faster. Products may sum in
            another order, so that outputs can differ from the base's in the last bits. Default "base": as the model has them.
        layout: of a model that `co_permute` has reordered, where adapters of that selection are dense; default None, as loaded.

    Attributes:
        model: the model that the adapters are put on.

    Raises:
        ValueError: for a bad argument, or a model with a tuner attached.

    Example:
        >>> pool = AdapterPool(model)
        >>> pool.load("maths", "adapters/maths"); pool.load("german", "adapters/german")
        >>> with pool.using("maths"):
        ...     model.generate(**inputs)
        >>> pool.fuse({"maths": 1.0, "german": 0.5}, name="both")
        >>> pool.use(None)  # the base, bit for bit
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        capacity_bytes: int | None = None,
        storage: Literal["base", "rows"] = "base",
        layout: Layout | None = None,
    ) -> None:
        if storage not in ("base", "rows"):
            raise ValueError(f"storage={storage!r}: give 'base' or 'rows'")
        refuse_tuner(model)
        self.model = model
        self._overlay = Overlay(unwrapped(model), layout or Layout(), rows=storage == "rows")
        self._shelf = _Prepared(model, self._overlay, capacity_bytes)
        self._active: str | None = None
        self._waiting: list[str | None] = []  # what comes back after the `using` blocks
        self._lock = self._shelf.turn

    @property
    def active(self) -> str | None:
        """Name of the adapter that stands on the model; None for the base; an unnamed combination is shown as its sum."""
        return self._active

    @property
    def names(self) -> list[str]:
        """The loaded adapters, by name."""
        return self._shelf.names

    @property
    def nbytes(self) -> int:
        """Bytes held for adapters: values, indices, and the base's values at their places."""
        with self._lock:
            return self._shelf.resident_bytes

    def load(self, name: str, source: Delta | str | os.PathLike[str]) -> None:
        """Check an adapter whole and get it ready for `use`; the model stays as it is.

        Args:
            name: to use it by: letters, digits, `.`, `_`, `:` and `-`, at most 128.
            source: an adapter folder, or a Delta.

        Raises:
            ValueError: for a bad or taken name, a damaged folder, an adapter of another base, one that does not fit into
                `capacity_bytes`, or a model with a tuner attached. The pool is then as it was.
        """
        self._shelf.load(name, source)

    def use(self, name: str | None) -> None:
        """Let an adapter stand on the model, or None: the base.

        Raises:
            ValueError: for an unknown name, a folder that can no longer be read or has changed, weights that something else
                has changed, or a model with a tuner attached. The model and the pool are then as they were.
        """
        with self._lock:
            self._put(name, {} if name is None else self._shelf.fetch(name))

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Hold the pool for a block with an adapter on the model; what stood before comes back after it.

        Other threads wait, so that what runs in the block sees one adapter from end to end. Errors as `use`.
        """
        with self._lock:
            before, standing = self._active, self._overlay.standing
            self.use(name)
            self._waiting.append(before)
            try:
                yield
            finally:
                self._waiting.pop()
                self._put(before, standing)

    def fuse(self, weights: Mapping[str, float], name: str | None = None) -> None:
        """Let a combination of loaded adapters stand on the model: base + Σ weight · (value − base), as `intaglio.fuse`.

        Args:
            weights: a finite number for each adapter, by name.
            name: to keep the combination by, as one more adapter without a folder; default None, which keeps it no longer
                than it stands on the model.

        Raises:
            ValueError: for no or unknown adapters, a weight that is not finite, a bad or taken name, and as `use`. The model
                and the pool are then as they were.

        Warns:
            UserWarning: with the share of the entries that more than one of them changes.
        """
        with self._lock:
            if not weights:
                raise ValueError("weights={}: name at least one loaded adapter")
            shares = check_weights(weights.values(), len(weights))
            adapters = [self._shelf.fetch(key) for key in weights]
            warn_of_overlap([Selection({key: piece.place.entries for key, piece in a.items()}) for a in adapters])
            pieces = self._combined(adapters, shares)
            self._shelf.check(pieces)
            if name is not None:
                self._shelf.keep(name, pieces)
            total = "+".join(key if weight == 1 else f"{weight:g}*{key}" for key, weight in weights.items())
            self._put(name or total, pieces)

    def unload(self, name: str) -> None:
        """Forget an adapter. After the last one, the pool takes the weights as they are then.

        Raises:
            ValueError: for an unknown name, or the adapter that stands on the model.
        """
        with self._lock:
            if name in self._shelf and (name == self._active or name in self._waiting):
                raise AdapterInUse(f"{name!r}: stands on the model; call use(None), or use another, and unload it then")
            self._shelf.unload(name)
            if not self._shelf.names and not self._overlay.standing:
                self._overlay.restart()

    def close(self) -> None:
        """Put the base back, in its own storage, and forget every adapter.

        Raises:
            ValueError: as `use`, and inside a `using` block.
        """
        with self._lock:
            if self._waiting:
                raise ValueError("the pool is held by a using block; close it after that")
            self.use(None)
            for name in self._shelf.names:
                self._shelf.unload(name)
            self._overlay.turn_back()
            self._overlay.restart()

    def _put(self, name: str | None, pieces: Mapping[str, Piece]) -> None:
        """Let pieces stand on the model, after every check."""
        self._shelf.check(pieces)
        self._active = None  # should the writing be interrupted
        self._overlay.put(pieces)
        self._active = name
        if not self._shelf.names and not self._overlay.standing:
            self._overlay.restart()

    def _combined(self, adapters: list[dict[str, Piece]], weights: list[float]) -> dict[str, Piece]:
        pieces = {}
        for name in dict.fromkeys(name for adapter in adapters for name in adapter):
            own = [(a[name], weight) for a, weight in zip(adapters, weights, strict=True) if name in a]
            parts = [Part(piece.place.entries, piece.values, weight) for piece, weight in own]
            entries, _, values = combine(name, parts, partial(self._overlay.base_at, name))
            pieces[name] = self._overlay.piece_in_model(name, entries, values)
        return pieces


@final
class _Prepared(Shelf[dict[str, Piece]]):
    """The adapters of a pool, checked against its model and ready to be put on it.

    Args:
        model: what they are for.
        overlay: of that model.
        capacity_bytes: memory for them; what stands on the model counts too.

    Attributes:
        turn: to be held by whoever reads or writes the model's weights.
    """

    def __init__(self, model: nn.Module, overlay: Overlay, capacity_bytes: int | None) -> None:
        super().__init__(capacity_bytes=capacity_bytes)
        self._model, self._overlay = model, overlay
        self.turn = threading.RLock()

    def load(self, name: str, source: Delta | str | os.PathLike[str]) -> None:
        """Read, check and keep an adapter; others have their turn while files are read."""
        with self._reserved(name):
            folder, delta = (None, source) if isinstance(source, Delta) else self._open(name, source, Delta.load)
            with self.turn:
                indices = sum(e.index.nbytes for e in delta.selection.values() if isinstance(e, Slices | Elements))
                self._check_room(name, 2 * sum(values.nbytes for values in delta.values.values()) + indices)
                self._put(name, self._prepare(delta), folder)

    def keep(self, name: str, pieces: dict[str, Piece]) -> None:
        """Keep what comes from no folder."""
        with self._reserved(name):
            self._put(name, pieces, None)

    def check(self, names: Iterable[str]) -> None:
        """Refuse to go on where somebody trains the model, or has changed its weights; see `Overlay.check`."""
        refuse_tuner(self._model)
        self._overlay.check(names)

    def _prepare(self, delta: Delta) -> dict[str, Piece]:
        """The pieces of an adapter, after every check."""
        delta.parameters(self._model)
        self.check(delta.selection)
        for name, entries in delta.selection.items():
            delta.check_base(name, self._overlay.originals(name, entries))
        delta.check_rest(self._model, besides=[*self._overlay.standing, *self._overlay.moved])
        return {name: self._overlay.piece(name, entries, delta.values[name]) for name, entries in delta.selection.items()}

    def _read(self, folder: Path) -> dict[str, Piece]:
        return self._prepare(Delta.load(folder))

    def _sizes(self, value: Mapping[str, Piece]) -> dict[Hashable, int]:
        tensors = []
        for piece in value.values():
            entries = piece.place.entries
            tensors += [piece.values, piece.place.base, *([entries.index] if isinstance(entries, Slices | Elements) else [])]
        return {id(tensor): tensor.nbytes for tensor in tensors}

    def _standing(self) -> dict[Hashable, int]:
        return self._sizes(self._overlay.standing)
