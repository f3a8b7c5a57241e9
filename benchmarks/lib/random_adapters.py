"""Random adapters, which cost what trained ones would: places drawn by a generator, and a change of the values there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from intaglio import Delta, Selection
from intaglio.core.entries import Entries, Slices
from intaglio.core.fingerprint import fingerprint

HEAD = 64  # width of a head of SmolLM2-135M


def changed(
    parameters: Mapping[str, Tensor], places: Iterable[tuple[str, Entries]], change: Callable[[str, Tensor], Tensor], **about: Any
) -> Delta:
    """A Delta of other values at some places.

    Args:
        parameters: those of the base, by name.
        places: parameter → entries; where they and the changes are drawn by one generator, they are drawn in turn.
        change: (name of the parameter, its values at the places) → the new ones.
        about: `method` and `base`, for the record.
    """
    entries, values, prints = {}, {}, {}
    for name, chosen in places:
        base = chosen.gather(parameters[name])
        entries[name], values[name], prints[name] = chosen, change(name, base), fingerprint(base)
    return Delta(Selection(entries), values, prints, **about)


def head(shape: tuple[int, ...], dim: int, generator: torch.Generator) -> Slices:
    """The rows or columns of one head."""
    number = int(torch.randint(shape[dim] // HEAD, (), generator=generator))
    return Slices(shape, dim, torch.arange(HEAD * number, HEAD * number + HEAD))


def some(shape: tuple[int, ...], dim: int, count: int, generator: torch.Generator) -> Slices:
    """So many rows or columns."""
    return Slices(shape, dim, torch.randperm(shape[dim], generator=generator)[:count].sort().values)
