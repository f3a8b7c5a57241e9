"""A record of step-by-step unmasking: where a run spent its budget, and what other rules would have chosen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from ..core import scores
from ..core.budget import TopK, top_k, without
from ..core.entries import from_flat
from ..core.files import are_numbers, read_mapping
from ..core.selection import Selection
from . import ranks
from .best_of_all import best_of_all
from .candidates import by_rank, scan
from .growing_slot import GrowingSlot

if TYPE_CHECKING:
    from .unmasking import Unmasking

__all__ = ["FILE", "UnmaskingRecord", "read"]

FILE, _POINTS = "unmasking.json", 100


@final
class UnmaskingRecord:
    """A record of a run from its first update on.

    It also follows two rules that choose once, with the same budget: by the smallest weights (PaFi), and by the largest
    gradients of the first update, which costs one more pass over each of those.

    Args:
        unmasking: just connected.
    """

    def __init__(self, unmasking: Unmasking) -> None:
        self._unmasking, self._budget = unmasking, sum(unmasking.candidates.budgets)
        excluded = {name: slot.excluded for name, slot in unmasking.slots.items() if slot.excluded is not None}
        negative_sizes = ((name, -scores.magnitude(slot.target)) for name, slot in unmasking.slots.items())
        self._smallest = top_k(without(negative_sizes, excluded), self._budget)
        self._first: TopK | None = None  # of the largest gradients of the first update, as far as this process sees them
        self._finite = True
        self.restart()

    def restart(self) -> None:
        """Forget the gradients of an update that was not made."""
        if self._unmasking.step == 0 and self._unmasking.updates.accumulation != "lean":
            self._first, self._finite = TopK(self._budget), True

    def resume(self, step: int) -> None:
        """Go on after update number `step`, when the first update's gradients are gone."""
        self._first = None if step else self._first

    @property
    def looks(self) -> bool:
        """Whether it still looks at gradients."""
        return self._unmasking.step == 0 and self._first is not None

    def see(self, rank: int, slot: GrowingSlot, flat: Tensor, first: int = 0) -> None:
        """Look at a gradient, flat, of the candidate at `rank`, or at the part of it that begins at `first`."""
        assert self._first is not None
        barred = [] if slot.excluded is None else [slot.excluded]
        self._finite = scan(flat, slot.target.detach().reshape(-1), _Size(), self._first, rank, barred, first) and self._finite

    def save(self, folder: Path) -> dict[str, Any]:
        """Write `unmasking.json`: per parameter how many entries were chosen by which update, and overlaps. Returns it.

        All processes call it, the first writes.
        """
        chosen = self._unmasking.unmasked
        others = {"smallest weights (PaFi)": self._smallest}
        finite = bool(ranks.rows(torch.tensor([self._finite])).all())
        if self._first is not None and self._unmasking.step and finite:
            largest = self._largest(best_of_all(self._first, self._budget))
            others["largest first gradients (static |g|)"] = largest
        overlaps = {name: chosen.overlap(other) for name, other in others.items()}
        overlap = {name: {"entries": n, "share": n / max(chosen.size, 1)} for name, n in overlaps.items()}
        record = self._spent() | {"overlap": overlap}
        if ranks.is_first():
            (folder / FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        return record

    def _spent(self) -> dict[str, Any]:
        """Where the budget went: per parameter how many entries were chosen by which update."""
        unmasking, updates = self._unmasking, self._unmasking.step
        at = sorted({round(updates * i / _POINTS) for i in range(1, _POINTS + 1)} - {0}) if updates else []
        chosen, writes = {}, 0
        for name, slot in unmasking.slots.items():
            born = slot.held.born.long().cpu()
            if born.numel():
                chosen[name] = torch.bincount(born, minlength=updates + 1).cumsum(0)[at].tolist()
                writes += int((updates + 1 - born).sum())
        return {
            "updates": updates,
            "budget": self._budget,
            "trained": unmasking.chosen,
            "touched": unmasking.unmasked.size,
            "writes": self._budget * updates if unmasking.method.chooses_anew else writes,
            "accumulation": unmasking.updates.accumulation,
            "at": at,
            "chosen": chosen,
            "shapes": {name: list(unmasking.slots[name].target.shape) for name in chosen},
        }

    def _largest(self, first: TopK) -> Selection:
        slots, winners = list(self._unmasking.slots.values()), by_rank(*first.winners())
        return Selection({slots[r].name: from_flat(tuple(slots[r].target.shape), o.sort().values) for r, (o, _) in winners})


@final
class _Size:
    """Scores by |gradient| alone."""

    def score(self, weight: Tensor, gradient: Tensor) -> Tensor:
        return scores.gradient(gradient)

    def least_gradient(self, score: float) -> float:
        return max(score, 0.0)


def read(path: Path) -> dict[str, Any] | None:
    """The record of a run; None where there is none.

    Raises:
        ValueError: where it is damaged.
    """
    if not path.is_file():
        return None
    record = read_mapping(path)
    if problem := _problem(record):
        raise ValueError(f"{path}: damaged, {problem}")
    return record


def _problem(record: dict[str, Any]) -> str | None:
    """The first fault of a record; None for a sound one."""
    counts = [record.get(key) for key in ("updates", "budget", "trained", "touched", "writes")]
    at, chosen, shapes, overlap = (record.get(key) for key in ("at", "chosen", "shapes", "overlap"))
    if not are_numbers(counts) or min(counts) < 0:
        return "its counts are no numbers, or missing"
    if not (isinstance(chosen, dict) and isinstance(shapes, dict) and chosen.keys() == shapes.keys()):
        return "chosen and shapes do not map the same parameters"
    if not are_numbers(at) or sorted(set(at)) != at or (chosen and not (at and at[0] > 0 < record["budget"] * record["updates"])):
        return "at is no list of its updates"
    if not all(are_numbers(column, len(at)) for column in chosen.values()) or not all(map(are_numbers, shapes.values())):
        return "chosen is not counted at each of its updates"
    shared = list(overlap.values()) if isinstance(overlap, dict) else [None]
    sound = all(isinstance(one, dict) and are_numbers([one.get("entries"), one.get("share")]) for one in shared)
    return None if sound else "overlap holds no shares"
