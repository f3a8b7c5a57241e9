"""Where step-by-step unmasking spent its budget: a run's record of it, and what other rules would have chosen."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import torch

from ..core.files import read_mapping
from ..core.selection import Elements, Selection
from ..methods import PaFi
from .tuner import Tuner
from .unmasking import Unmasking

__all__ = ["FILE", "Insight", "read"]

FILE, _POINTS = "unmasking.json", 100


@final
class Insight:
    """Follows a run from its first update.

    Args:
        tuner: just attached, with a method that chooses while training.
    """

    def __init__(self, tuner: Tuner) -> None:
        assert tuner.unmasking is not None
        self._unmasking = tuner.unmasking
        self._references = {"smallest weights (PaFi)": _smallest(tuner, self._unmasking)}
        self._unmasking.rank_first_gradients()

    def save(self, path: Path) -> dict[str, Any]:
        """Write and return the record: per parameter how many entries were chosen by which update, and overlaps."""
        selection = self._unmasking.selection
        static = self._unmasking.first_gradients
        references = self._references | ({} if static is None else {"largest first gradients (static |g|)": static})
        overlap = {name: {"entries": n, "share": n / max(selection.size, 1)} for name, n in _overlaps(selection, references)}
        record = _record(self._unmasking) | {"overlap": overlap}
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        return record


def read(path: Path) -> dict[str, Any] | None:
    """The record of a run; None where there is none.

    Raises:
        ValueError: where it is damaged.
    """
    if not path.is_file():
        return None
    record = read_mapping(path)
    if not {"updates", "chosen", "at", "overlap", "touched"} <= record.keys():
        raise ValueError(f"{path}: damaged, it lacks what a record of unmasking holds")
    return record


def _smallest(tuner: Tuner, unmasking: Unmasking) -> Selection:
    """What PaFi would choose among the same candidates under the same budget."""
    slots = unmasking.slots
    excluded = {n: Elements(tuple(s.target.shape), s.excluded.cpu()) for n, s in slots.items() if s.excluded is not None}
    method = PaFi(budget=sum(unmasking.budgets), include=tuple(slots))
    return method.choose({}, tuner.model, 0, None, Selection(excluded))[0]


def _overlaps(selection: Selection, references: Mapping[str, Selection]) -> list[tuple[str, int]]:
    return [(name, selection.overlap(reference)) for name, reference in references.items()]


def _record(unmasking: Unmasking) -> dict[str, Any]:
    updates = unmasking.step
    at = sorted({round(updates * i / _POINTS) for i in range(1, _POINTS + 1)} - {0}) if updates else []
    chosen, writes = {}, 0
    for name, slot in unmasking.slots.items():
        born = slot.born.long().cpu()
        if born.numel():
            chosen[name] = torch.bincount(born, minlength=updates + 1).cumsum(0)[at].tolist()
            writes += int((updates + 1 - born).sum())
    touched = unmasking.selection.size
    renews = unmasking.method.renews
    return {
        "updates": updates,
        "budget": sum(unmasking.budgets),
        "trained": unmasking.chosen,
        "touched": touched,
        "writes": sum(unmasking.budgets) * updates if renews else writes,
        "accumulation": unmasking.updates.accumulation,
        "at": at,
        "chosen": chosen,
        "shapes": {name: list(unmasking.slots[name].target.shape) for name in chosen},
    }
