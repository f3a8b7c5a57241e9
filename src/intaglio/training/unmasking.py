"""Step-by-step unmasking in the memory of inference: gradients are scored as backward forms them, and freed at once.

A hook on each parameter keeps the gradient of its chosen entries, scores the others in chunks, keeps the best so far of
all tensors (`TopK`: score, place, gradient), and frees the gradient. When backward ends, the winners join the slots. So
memory is one tensor's gradient, one chunk and O(budget). The result is bit for bit that of `UpdateMethod.choose` on whole
gradients, whatever the order of hooks and the size of chunks (ID3, arXiv 2408.14470, computes dense scores and masks).
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from ..core.budget import TopK
from ..core.fingerprint import fingerprint
from ..core.selection import Selection, Whole, from_flat
from ..method_kinds.update_method import UpdateMethod
from ..model import peft_layers as adapters
from . import tied_weights as tied
from .candidates import scan
from .growing_slot import GrowingSlot
from .slots import Slot, Slots
from .updates import Updates, correct_ages, follow, refuse_optimizer

__all__ = ["Unmasking"]


@final
class Unmasking:
    """Applies an update method to a model's gradients.

    Args:
        model: the model; its parameters get hooks, and `requires_grad` where they are candidates.
        method: what to choose.
        exclude: entries that must not be chosen.
        updates: how updates are made.

    Attributes:
        method: with the length of the run, once that is known.
        updates: as given.
        step: updates made so far.
        whole: what is trained whole from the start, outside the budget.
        slots: candidate → its chosen entries.
        budgets: entries that will be chosen, per pool.

    Raises:
        ValueError: for a budget outside the candidates, or a model whose weights cannot be scored.
    """

    def __init__(self, model: nn.Module, method: UpdateMethod, exclude: Selection, updates: Updates) -> None:
        adapters.refuse_unscorable(model)
        self.method, self.updates, self.step = method, updates, 0
        self.whole = Selection({name: Whole(tuple(p.shape)) for name, p in method.always(model).items()}).difference(exclude)
        candidates = method.selectable(model)
        parameters = {name: p for name, p in model.named_parameters() if name in candidates}
        free = {name: p.numel() - (exclude[name].count if name in exclude else 0) for name, p in parameters.items()}
        self._pools = [_Pool(list(pool.free), pool.budget) for pool in method.budgets({n: c for n, c in free.items() if c})]
        self.budgets = [pool.budget for pool in self._pools]
        self._member = {name: pool for pool in self._pools for name in pool.names}
        self.slots: dict[str, GrowingSlot] = {}
        for name in (name for name in parameters if name in self._member):
            barred = exclude[name].flat() if name in exclude else None
            self.slots[name] = GrowingSlot(name, parameters[name], barred, from_start=updates.decay == "start")
        self._sharers = tied.find(model, (slot.target for slot in self.slots.values()))
        self._fixed: list[Slot] = []
        self._seen: set[str] = set()
        self._sums: dict[str, Tensor] = {}  # whole gradients, where they are kept until the update
        self._task, self._damaged, self._watched = -1, False, False
        self._square = self._selected = torch.zeros((), dtype=torch.float64)
        self._versions: dict[str, int] = {}
        self._before: dict[str, Tensor] = {}
        self._first: TopK | None = None

    @property
    def chosen(self) -> int:
        """Entries that are trained now."""
        return sum(slot.index.numel() for slot in self.slots.values())

    @property
    def selection(self) -> Selection:
        """All entries that were ever trained, but those of `whole`."""
        entries = {name: slot.entries for name, slot in self.slots.items()}
        return Selection({name: e for name, e in entries.items() if e is not None})

    def connect(self, slots: Slots) -> None:
        """Add the candidates' slots to a model's, and see their gradients from now on."""
        self._fixed = [slots[name] for name in self.whole]
        for rank, slot in enumerate(self.slots.values()):
            slots.register(slot)
            slot.connect(partial(self._receive, rank, slot), self._sharers.get(id(slot.target), ()))

    def set_steps(self, steps: int) -> None:
        """Say how many updates the run makes.

        Raises:
            ValueError: where the method says otherwise.
        """
        self.method = self.method.with_steps(steps)

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Join the winners before each of the optimizer's steps, and count it after.

        Raises:
            ValueError: for an optimizer that cannot be used.
        """
        refuse_optimizer(optimizer, self.slots.values(), self.updates)
        self._watched = True
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)

    def conditions(self) -> dict[str, Any]:
        """What a resumed run must have in common with this one, as JSON values."""
        candidates = [
            (n, list(s.target.shape), None if s.excluded is None else fingerprint(s.excluded)) for n, s in self.slots.items()
        ]
        digest = hashlib.sha256(json.dumps(candidates).encode()).hexdigest()[:16]
        return {"candidates": digest, "budgets": self.budgets, "updates": vars(self.updates)}

    def check(self, method: Mapping[str, Any], conditions: Mapping[str, Any] | None) -> None:
        """Refuse to go on from a run made under other conditions.

        Raises:
            ValueError: naming the first that differs.
        """
        own = self.method.to_dict() | ({"steps": method.get("steps")} if self.method.steps_needed else {})
        now, then = self.conditions(), dict(conditions or {})
        pairs = [(f"{own['name']}.{key}", method.get(key), value) for key, value in own.items()]
        pairs += [(f"updates.{key}", then.get("updates", {}).get(key), value) for key, value in now["updates"].items()]
        pairs += [("budget in entries", then.get("budgets"), now["budgets"])]
        pairs += [("list of candidates, or exclude, by hash,", then.get("candidates"), now["candidates"])]
        for key, theirs, ours in pairs:
            if theirs != ours:
                raise ValueError(
                    f"resume: the checkpoint's {key} is {theirs!r}, this run's {ours!r}; change it back, or start anew"
                )

    def resume(self, step: int, method: Mapping[str, Any]) -> None:
        """Go on after update number `step` of a run of `method["steps"]` updates; what is pending is dropped."""
        self.step = step
        self._first = None if step else self._first  # it ranks the first update's gradients, which are gone
        self._close()
        self._versions, self._before, self._task = {}, {}, -1
        if self.method.steps_needed and method.get("steps") is not None:
            self.set_steps(method["steps"])

    def norm(self) -> Tensor:
        """Norm of the whole gradient of this update, over all candidates; fp64 scalar.

        Where the gradients were scaled since backward (by a `GradScaler`), so is it.
        """
        scaled = self._norm() / self._selected
        return self._square.sqrt() * torch.where(scaled.isfinite(), scaled, 1.0)

    def _norm(self) -> Tensor:
        gradients = [slot.values.grad for slot in self.slots.values() if slot.values.grad is not None]
        return torch.nn.utils.get_total_norm(gradients).double().cpu()

    @torch.no_grad()
    def _receive(self, rank: int, slot: GrowingSlot, target: Tensor) -> None:
        """Called by autograd when a parameter's gradient is complete."""
        task = torch._C._current_graph_task_id()  # of a backward that failed, the callback never came
        if task != self._task:
            self._open()
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
            self._task = task
        if self.updates.accumulation == "none" and slot.name in self._seen:
            raise ValueError(
                f"{slot.name}: a second backward before the update. Say how gradients add up: attach(…, "
                "updates=Updates(accumulation='exact')) keeps whole gradients until the update, 'lean' only candidates"
            )
        self._seen.add(slot.name)
        gradient, target.grad = target.grad, None
        assert gradient is not None
        flat = _averaged((gradient.to_dense() if gradient.is_sparse else gradient).reshape(-1))
        if self.updates.accumulation == "exact" and (self._grows() or self.updates.clip == "dense"):
            total = self._sums.get(slot.name)
            self._sums[slot.name] = flat.clone() if total is None else total.add_(flat)  # `flat` may share its storage
            slot.receive_nothing()
        else:
            self._take(rank, slot, flat)
        self._note(slot)

    def _open(self) -> None:
        """Begin an update, unless one is under way: a further pass of it, or a nested backward of checkpointing."""
        if self._seen and self._cleared():  # its gradients were thrown away: the update was skipped
            if not self._watched:
                raise ValueError(
                    "no optimizer follows this tuner: build it with tuner.optimizer(…), or call tuner.watch(optimizer)"
                )
            for slot in self.slots.values():
                slot.restore()
                slot.clear()
            self._close()

    def _note(self, slot: GrowingSlot) -> None:
        """Remember which gradient of a slot is the last one that we wrote."""
        if slot.values.grad is not None:
            self._versions[slot.name] = slot.values.grad._version

    def _cleared(self) -> bool:
        """Whether all gradients were dropped, or set to zero, since we wrote them."""
        gradients = {name: g for name in self._seen if (g := self.slots[name].values.grad) is not None}
        written = all(g._version != self._versions.get(name) for name, g in gradients.items())
        return written and not any(bool(g.any()) for g in gradients.values())

    def _close(self) -> None:
        self._seen.clear()
        self._sums.clear()
        self._rewind()

    def _rewind(self) -> None:
        """Forget the candidates of this update."""
        self._damaged, self._square = False, torch.zeros((), dtype=torch.float64)
        if self._first is not None:
            self.rank_first_gradients()  # anew, while this is the first update
        for pool in self._pools:
            pool.best = pool.wanted = None

    def rank_first_gradients(self) -> None:
        """Also keep what the first update's largest |gradient| would choose, a budget's worth: for comparison."""
        if self.step == 0 and self.updates.accumulation != "lean":
            self._first = TopK(sum(self.budgets))

    @property
    def first_gradients(self) -> Selection | None:
        """What a static choice by |gradient| at the first update would have trained; None where that was not kept."""
        if self._first is None or self.step == 0:
            return None
        slots, winners = list(self.slots.values()), _by_rank(*self._first.winners())
        return Selection({slots[r].name: from_flat(tuple(slots[r].target.shape), o.sort().values) for r, (o, _) in winners})

    def _take(self, rank: int, slot: GrowingSlot, flat: Tensor) -> None:
        """Keep what is needed of one gradient, flat."""
        finite = bool(slot.receive(flat).isfinite().all())
        if self.updates.clip == "dense":
            square = torch.linalg.vector_norm(flat, dtype=torch.float32).cpu().double().square()
            finite = finite and bool(square.isfinite())
            self._square = self._square + square
        best = self._best(self._member[slot.name])
        if self.step == 0 and self._first is not None:
            barred = [] if slot.excluded is None else [slot.excluded]
            if not scan(flat, slot.target.detach().reshape(-1), _Size(), self._first, rank, barred):
                self._first = None
        if finite and best is not None:
            finite = self._score(rank, slot, flat, best)
        self._damaged = self._damaged or not finite

    def _score(self, rank: int, slot: GrowingSlot, flat: Tensor, best: TopK) -> bool:
        weight = slot.target.detach().reshape(-1)
        barred = [] if self.method.renews else [slot.index]
        barred += [] if slot.excluded is None else [slot.excluded]
        if self.updates.accumulation == "lean":
            barred.append(best.revise(rank, partial(self._summed, flat, weight)).to(flat.device))
        return scan(flat, weight, self.method, best, rank, barred)

    def _summed(self, flat: Tensor, weight: Tensor, offset: Tensor, payload: Tensor) -> tuple[Tensor, Tensor]:
        """Add a further pass's gradient to a tensor's candidates."""
        place = offset.to(flat.device)
        total = payload + flat[place].to(payload)
        self._damaged = self._damaged or not bool(total.isfinite().all())
        return self.method.score(weight[place], total.to(flat.device)).cpu(), total

    def _best(self, pool: _Pool) -> TopK | None:
        """The pool's candidates of this update; None where nothing is to be chosen."""
        wanted = self._wanted(pool)
        if pool.best is None and wanted > 0:
            pool.best = TopK(wanted * (self.updates.oversampling if self.updates.accumulation == "lean" else 1))
        return pool.best

    def _wanted(self, pool: _Pool) -> int:
        """Entries to choose at this update."""
        if pool.wanted is None:
            held = 0 if self.method.renews else sum(self.slots[name].count_before for name in pool.names)
            granted = pool.budget if self.method.renews else self.method.granted(pool.budget, self.step + 1)
            pool.wanted = granted - held
        return pool.wanted

    def _grows(self) -> bool:
        return any(self._wanted(pool) > 0 for pool in self._pools)

    @torch.no_grad()
    def _finish(self) -> None:
        """Let the winners join the slots, provisionally: a further pass of the same update may change them."""
        slots = list(self.slots.values())
        if self._sums:
            self._rewind()
            for rank, slot in ((rank, slot) for rank, slot in enumerate(slots) if slot.name in self._sums):
                slot.clear()
                self._take(rank, slot, self._sums[slot.name])
        for gradient in (slot.values.grad for slot in self._fixed):
            if gradient is not None:
                gradient.copy_(_averaged(gradient))  # what earlier passes averaged stays as it is
                self._damaged = self._damaged or not bool(gradient.isfinite().all())
        for slot in slots:
            slot.restore()
        if self._damaged:
            self._show_damage()
        else:
            self._grow(slots)
        for slot in slots:
            self._note(slot)
        if self.updates.clip == "dense":
            self._selected = self._norm()

    def _show_damage(self) -> None:
        """Make it visible to whoever looks before the update, a `GradScaler` above all: every gradient is NaN."""
        for slot in (*self.slots.values(), *self._fixed):
            if slot.values.grad is not None:
                slot.values.grad.fill_(float("nan"))
        if not self.chosen:  # then there is none yet: lend one entry, which the update takes back
            slot = self.slots[min(self._seen)]
            slot.grow(*_on(slot, (torch.zeros(1, dtype=torch.int64), torch.full((1,), float("nan")))), self.step + 1)

    def _grow(self, slots: list[GrowingSlot]) -> None:
        for pool in self._pools:
            if pool.best is None:
                continue
            winners = dict(_by_rank(*pool.best.winners(self._wanted(pool))))
            none = torch.empty(0, dtype=torch.int64), torch.empty(0)
            for rank, slot in enumerate(slots):
                if self.method.renews and slot.name in pool.names:
                    slot.exchange(*_on(slot, winners.get(rank, none)), self.step + 1)
                elif rank in winners:
                    slot.grow(*_on(slot, winners[rank]), self.step + 1)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if kwargs.get("closure") is not None or any(callable(arg) for arg in args[1:]):
            raise ValueError("optimizer.step(closure): entries are chosen before the step; run backward first, then step()")
        if self._damaged:
            warnings.warn(
                f"update {self.step + 1}: a gradient is not finite; nothing changes and nothing is chosen", stacklevel=3
            )
            for slot in self.slots.values():
                slot.restore()
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
            return
        for slot in self.slots.values():
            follow(optimizer, slot)
            slot.commit()
        if self.updates.bias_correction == "per_entry":
            self._before = {name: slot.values.detach().clone() for name, slot in self.slots.items()}

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self.step += 1
        if self.updates.bias_correction == "per_entry" and not self._damaged:
            correct_ages(optimizer, self.slots.values(), self._before)
            self._before = {}
        self._close()


@final
class _Size:
    """Scores by |gradient| alone."""

    def score(self, weight: Tensor, gradient: Tensor) -> Tensor:
        return gradient.float().abs()

    def reach(self, score: float) -> float:
        return max(score, 0.0)


@final
class _Pool:
    """Parameters that compete for one budget, and their best candidates of this update."""

    def __init__(self, names: list[str], budget: int) -> None:
        self.names, self.budget = names, budget
        self.best: TopK | None = None
        self.wanted: int | None = None


def _by_rank(rank: Tensor, offset: Tensor, payload: Tensor) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
    """(rank, (offsets, payloads)) of each tensor that has winners."""
    order = rank.argsort(stable=True)
    ranks, counts = rank[order].unique_consecutive(return_counts=True)
    parts = zip(offset[order].split(counts.tolist()), payload[order].split(counts.tolist()), strict=True)
    yield from zip(ranks.tolist(), parts, strict=True)


def _on(slot: GrowingSlot, winners: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return winners[0].to(slot.target.device), winners[1].to(slot.target.device)


def _averaged(gradient: Tensor) -> Tensor:
    """The mean over the processes of a distributed run: hooks see each process's own gradient."""
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        gradient = gradient.clone()  # it may share its storage with another parameter's
        torch.distributed.all_reduce(gradient)
        gradient /= torch.distributed.get_world_size()
    return gradient
