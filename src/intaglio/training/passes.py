"""The backward passes of one update: which gradients came, and whether they were thrown away since."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import final

import torch
from torch import Tensor

from . import ranks
from .growing_slot import GrowingSlot

__all__ = ["DenseNorm", "Passes"]


@final
class Passes:
    """The backward passes of one update.

    Args:
        slots: candidate → slot, whose gradients are looked at.

    Attributes:
        seen: candidates that got a gradient.
        sent: numbers of the candidates whose whole gradient went to the other processes, in this backward.
    """

    def __init__(self, slots: Mapping[str, GrowingSlot]) -> None:
        self._slots = slots
        self.seen: set[str] = set()
        self.sent: list[int] = []
        self._task = -1
        self._versions: dict[str, int] = {}

    def begin(self, finish: Callable[[], None]) -> bool:
        """Whether a gradient is the first of a backward, at whose end `finish` is called then.

        Backward passes are told apart by their number, for one that failed never came to its end.
        """
        task = torch._C._current_graph_task_id()
        if task == self._task:
            return False
        torch.autograd.Variable._execution_engine.queue_callback(finish)
        self._task = task
        return True

    def agree(self, damaged: bool) -> bool:
        """Whether any process found its gradients damaged; what each sent must be of the same weights in the same order.

        Raises:
            ValueError: in every process, where it was not.
        """
        sent = int.from_bytes(hashlib.sha256(repr(self.sent).encode()).digest()[:7], "big")
        self.sent.clear()
        found = ranks.rows(torch.tensor([damaged, sent]))
        if bool((found[:, 1] != sent).any()):
            raise ValueError(
                "the processes of this run formed gradients of different weights, or in another order, so that their mean is "
                "none: a mixture's expert without tokens in one of them, say; give every process the same layers to run"
            )
        return bool(found[:, 0].any())

    def note(self, slot: GrowingSlot) -> None:
        """Remember which gradient of a slot is the last one that we wrote."""
        if slot.values.grad is not None:
            self._versions[slot.name] = slot.values.grad._version

    def thrown_away(self) -> bool:
        """Whether all gradients were dropped, or set to zero, since we wrote them: the update was skipped."""
        gradients = {name: g for name in self.seen if (g := self._slots[name].values.grad) is not None}
        written = all(g._version != self._versions.get(name) for name, g in gradients.items())
        return bool(self.seen) and written and not any(bool(g.any()) for g in gradients.values())

    def forget(self) -> None:
        """Forget everything, also a backward that is under way."""
        self.seen.clear()
        self._task, self._versions = -1, {}


@final
class DenseNorm:
    """The norm of whole gradients, of which only the chosen entries are kept.

    Args:
        slots: whose gradients are the chosen entries'.
    """

    def __init__(self, slots: Mapping[str, GrowingSlot]) -> None:
        self._slots = slots
        self._square = self._selected = torch.zeros((), dtype=torch.float64)

    def restart(self) -> None:
        """Begin an update."""
        self._square = torch.zeros((), dtype=torch.float64)

    def add(self, gradient: Tensor) -> bool:
        """Add a parameter's gradient; False where its square is not finite."""
        wide = torch.promote_types(gradient.dtype, torch.float32)
        square = torch.linalg.vector_norm(gradient, dtype=wide).cpu().double().square()
        self._square = self._square + square
        return bool(square.isfinite())

    def settle(self) -> None:
        """Note that the slots now hold the gradients of this update; every process has added its part."""
        self._square, self._selected = ranks.total(self._square), self._chosen()

    def value(self) -> Tensor:
        """The norm, fp64 scalar; scaled, where the slots' gradients were since `settle` (by a `GradScaler`)."""
        scaled = self._chosen() / self._selected
        return self._square.sqrt() * torch.where(scaled.isfinite(), scaled, 1.0)

    def _chosen(self) -> Tensor:
        gradients = [slot.values.grad for slot in self._slots.values() if slot.values.grad is not None]
        return torch.nn.utils.get_total_norm(gradients).double().cpu()
