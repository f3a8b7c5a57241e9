"""Step-by-step unmasking in the memory of inference: gradients are scored as backward forms them, and freed at once.

A hook on each parameter keeps the gradient of its chosen entries, shows the others to the `Candidates` of this update, and frees
the gradient. When backward ends, the winners join the slots. So memory is one tensor's gradient, one chunk and O(budget). The
result is bit for bit that of `UpdateMethod.choose_next` on whole gradients, whatever the order of hooks and the size of chunks
(ID3, arXiv 2408.14470, computes dense scores and masks).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from ..core.entries import Whole
from ..core.selection import Selection
from ..method_kinds.update_method import UpdateMethod
from ..model import peft_layers
from . import ranks, tied_weights
from .candidates import Candidates
from .growing_slot import GrowingSlot
from .passes import DenseNorm, Passes
from .regime import Recorder, Regime, Wish, chooser_of, refuse_differing
from .slot import Slot
from .slots import Slots
from .unmasking_record import UnmaskingRecord
from .updates import Steps, Updates, refuse_kind, refuse_optimizer, take_back

__all__ = ["Unmasking"]

_SHARED = {"budgets": "budget in entries", "candidates": "list of candidates, or exclude, by hash,"}  # by title in messages


@final
class Unmasking(Regime[UpdateMethod]):
    """Applies an update method to a model's gradients.

    Args:
        model: the model; once connected, its parameters have hooks, and `requires_grad` where they are candidates.
        method: what to choose, an `UpdateMethod`.
        wish: entries that must not be chosen, and how updates are made.

    Attributes:
        updates: how updates are made.
        step: updates made so far.
        slots: candidate → its chosen entries.
        candidates: the best entries of this update.

    Raises:
        ValueError: for a budget outside the candidates, or a model whose weights cannot be scored.
    """

    name = "unmasking"
    averages = True

    def __init__(self, model: nn.Module, method: UpdateMethod, wish: Wish) -> None:
        if wish.permute or wish.selection is not None:
            raise ValueError(f"permute, selection: no effect with {method.name!r}, which chooses single entries as it trains")
        peft_layers.refuse_unscorable(model)
        self.method, self.updates, self.step = method, wish.updates or Updates(), 0
        whole = self.method.trained_whole(model)
        self.start = Selection({name: Whole(tuple(p.shape)) for name, p in whole.items()}).difference(wish.exclude)
        self.candidates = Candidates(model, self.method, wish.exclude, self.updates)
        self.slots = self.candidates.slots
        self._sharers = tied_weights.find(model, (slot.target for slot in self.slots.values()))
        self._fixed: list[Slot] = []
        self._passes = Passes(self.slots)
        self._sums: dict[str, Tensor] = {}  # whole gradients, where they are kept until the update
        self._damaged = self._watched = False
        self._norm = DenseNorm(self.slots) if self.updates.clip == "dense" else None
        self._steps = Steps(self.slots, self.updates)
        self._record: UnmaskingRecord | None = None

    @property
    def chosen(self) -> int:
        """Entries that are trained now, those of `start` aside."""
        return sum(slot.index.numel() for slot in self.slots.values())

    @property
    def unmasked(self) -> Selection:
        """All entries that were ever chosen."""
        entries = {name: slot.entries for name, slot in self.slots.items()}
        return Selection({name: e for name, e in entries.items() if e is not None})

    @property
    def selection(self) -> Selection:
        return self.start.union(self.unmasked)

    def connect(self, slots: Slots) -> None:
        self._all, self._fixed = slots, [slots[name] for name in self.start]
        for rank, slot in enumerate(self.slots.values()):
            slots.register(slot)
            slot.connect(partial(self._receive, rank, slot), self._sharers.get(id(slot.target), ()))

    def expect(self, *, steps: int | None = None, passes: int | None = None) -> None:
        if passes is not None and passes > 1:
            self.updates.refuse_passes(f"gradient_accumulation_steps={passes}")
        if steps is not None:
            self.method = self.candidates.method = self.method.with_steps(steps)

    def refuse_optimizer(self, factory: Any) -> None:
        refuse_kind(factory)

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        refuse_optimizer(optimizer, self.slots.values(), self.updates)
        self._watched = True
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)

    def recorder(self) -> Recorder:
        self._record = UnmaskingRecord(self)
        return self._record

    def log(self) -> dict[str, float]:
        return {"unmasked": self.chosen}

    def state(self) -> dict[str, Any]:
        return {"candidates": self.candidates.digest, "budgets": self.candidates.budgets, "updates": vars(self.updates)}

    def check(self, method: Mapping[str, Any], state: Mapping[str, Any] | None) -> None:
        then = chooser_of(method)
        own = self.method.to_dict() | ({"steps": then.get("steps")} if self.method.steps_needed else {})
        refuse_differing(then, own, f"{self.method.name}.")
        held, now = state or {}, self.state()
        refuse_differing(held.get("updates", {}), now["updates"], "updates.")
        for key, title in _SHARED.items():
            refuse_differing({title: held.get(key)}, {title: now[key]})

    def load(self, step: int, method: Mapping[str, Any], state: Mapping[str, Any] | None) -> None:
        self.step = step
        if self._record is not None:
            self._record.resume(step)
        self._close()
        self._passes.forget()
        steps = chooser_of(method).get("steps")
        if self.method.steps_needed and steps is not None:
            self.expect(steps=steps)

    def norm(self) -> Tensor | None:
        fixed = [slot.values.grad for slot in self._fixed if slot.values.grad is not None]
        return None if self._norm is None else torch.nn.utils.get_total_norm([self._norm.value(), *fixed]).float()

    @torch.no_grad()
    def _receive(self, rank: int, slot: GrowingSlot, target: Tensor) -> None:
        """Called by autograd when a parameter's gradient is complete."""
        if self._passes.begin(self._finish):
            self._open()
        if slot.name in self._passes.seen:
            self.updates.refuse_passes(f"{slot.name}: a second backward before the update")
        self._passes.seen.add(slot.name)
        gradient, target.grad = target.grad, None
        assert gradient is not None
        flat = (gradient.to_dense() if gradient.is_sparse else gradient).reshape(-1)
        if self.updates.accumulation == "exact" and (self.candidates.any_wanted() or self.updates.clip == "dense"):
            total = self._sums.get(slot.name)
            self._sums[slot.name] = flat.clone() if total is None else total.add_(flat)  # `flat` may share its storage
            slot.receive_nothing()
        else:
            self._take(rank, slot, flat)
        self._passes.note(slot)

    def _open(self) -> None:
        """Begin an update, unless one is under way: a further pass of it, or a nested backward of checkpointing."""
        if not self._passes.thrown_away():
            return
        if not self._watched:
            raise ValueError("no optimizer follows this tuner: build it with tuner.optimizer(…), or call tuner.watch(optimizer)")
        for slot in self.slots.values():
            slot.restore()
            slot.clear()
        self._close()

    def _close(self) -> None:
        self._passes.seen.clear()
        self._sums.clear()
        self._rewind()

    def _rewind(self) -> None:
        """Forget the candidates of this update."""
        self._damaged = False
        self.candidates.restart(self.step + 1)
        for listener in filter(None, (self._norm, self._record)):
            listener.restart()

    def _take(self, rank: int, slot: GrowingSlot, flat: Tensor) -> None:
        """Keep what is needed of one gradient, flat."""
        finite, first = bool(slot.receive(flat).isfinite().all()), 0
        recorded = self._record is not None and self._record.looks
        if self._norm is not None or recorded or self.candidates.any_wanted():
            # Of the processes' mean each looks at a part of its own. Else nothing is sent but the chosen entries, at the end.
            flat, first = ranks.scattered_mean(flat)
            self._passes.sent.append(rank)
        if self._norm is not None:
            finite = self._norm.add(flat) and finite
        if self._record is not None and recorded:
            self._record.see(rank, slot, flat, first)
        self._damaged = not (finite and self.candidates.add(rank, slot, flat, first)) or self._damaged

    @torch.no_grad()
    def _finish(self) -> None:
        """Let the winners join the slots, provisionally: a further pass of the same update may change them."""
        slots = list(self.slots.values())
        if self._sums:
            self._rewind()
            for rank, slot in ((rank, slot) for rank, slot in enumerate(slots) if slot.name in self._sums):
                slot.clear()
                self._take(rank, slot, self._sums[slot.name])
        for slot in slots:
            slot.restore()
        self._all.averaging.average([*slots, *self._fixed])  # what earlier passes averaged stays as it is
        whole = all(bool(s.values.grad.isfinite().all()) for s in self._fixed if s.values.grad is not None)
        self._damaged = self._passes.agree(self._damaged or not whole)
        if self._damaged:
            self._show_damage()
        else:
            self.candidates.join()
        list(map(self._passes.note, slots))
        if self._norm is not None:
            self._norm.settle()

    def _show_damage(self) -> None:
        """Make it visible to whoever looks before the update, a `GradScaler` above all: every gradient is NaN."""
        for slot in (*self.slots.values(), *self._fixed):
            if slot.values.grad is not None:
                slot.values.grad.fill_(float("nan"))
        if not self.chosen:  # then there is none yet: lend one entry, which the update takes back
            slot = self.slots[min(self._passes.seen)]
            first = torch.zeros(1, dtype=torch.int64, device=slot.target.device)
            slot.grow(first, torch.full_like(first, float("nan"), dtype=slot.values.dtype), self.step + 1)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if kwargs.get("closure") is not None or any(callable(arg) for arg in args[1:]):
            raise ValueError("optimizer.step(closure): entries are chosen before the step; run backward first, then step()")
        if self._damaged:
            warnings.warn(
                f"update {self.step + 1}: a gradient is not finite; nothing changes and nothing is chosen", stacklevel=3
            )
            take_back(optimizer, self.slots.values())
            return
        self._steps.before(optimizer)

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self.step += 1
        if not self._damaged:
            self._steps.after(optimizer)
        self._close()
