"""The best entries of one update, as gradients come: what is kept of a gradient that is about to be freed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Protocol, final

import torch
from torch import Tensor, nn

from ..core.budget import TopK
from ..core.fingerprint import fingerprint
from ..core.selection import Selection
from ..method_kinds.update_method import Share, UpdateMethod
from .best_of_all import best_of_all
from .growing_slot import GrowingSlot
from .updates import Updates

__all__ = ["Candidates", "Scorer", "by_rank", "scan"]

CHUNK, BLOCK = 1 << 18, 1 << 10  # entries scored at a time; entries whose largest gradient is looked at first


class Scorer(Protocol):
    """A method, as far as `scan` asks it."""

    def score(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """As `UpdateMethod.score`."""
        ...

    def least_gradient(self, score: float) -> float:
        """As `UpdateMethod.least_gradient`."""
        ...


def scan(gradient: Tensor, weight: Tensor, method: Scorer, best: TopK, rank: int, barred: list[Tensor], first: int = 0) -> bool:
    """Add one tensor's entries to the best so far; False, and nothing added, where a gradient is not finite.

    Args:
        gradient: flat, `[n]`, of the whole tensor or of a part.
        weight: flat, of the whole tensor.
        method: scores them.
        best: what is kept.
        rank: the tensor's place in the total order.
        barred: flat offsets in the tensor that must not be chosen; their gradients are set to 0 meanwhile.
        first: where in the tensor the gradient begins.
    """
    end = first + gradient.numel()
    if gradient.numel() < weight.numel():
        weight = weight[first:end]
        barred = [offset[(offset >= first) & (offset < end)] - first for offset in barred]
    kept = [gradient[offset] for offset in barred]
    for offset in barred:
        gradient[offset] = 0
    finite = _scan(gradient, weight, method, best, rank, barred, first)
    for offset, values in zip(reversed(barred), reversed(kept), strict=True):  # it may share its storage with another gradient
        gradient[offset] = values
    return finite


def _scan(gradient: Tensor, weight: Tensor, method: Scorer, best: TopK, rank: int, barred: list[Tensor], first: int) -> bool:
    peaks = _peaks(gradient)
    if not bool(peaks.isfinite().all()):
        return False
    for start in range(0, gradient.numel(), CHUNK):
        g, w = gradient[start : start + CHUNK], weight[start : start + CHUNK]
        least = method.least_gradient(best.threshold)
        if least > 0:
            at = _reaching(g, peaks[start // BLOCK : (start + CHUNK) // BLOCK], least)
            best.add(rank, method.score(w[at], g[at]), at + start + first, g[at])
            continue
        score = method.score(w, g)
        if best.threshold <= 0:  # else their score of 0 bars them
            for offset in barred:
                score[offset[(offset >= start) & (offset < start + g.numel())] - start] = float("-inf")
        at = (score >= best.threshold).nonzero().flatten() if best.threshold > float("-inf") else (score >= 0).nonzero().flatten()
        best.add(rank, score[at], at + start + first, g[at])
    return True


def _peaks(gradient: Tensor) -> Tensor:
    """The largest |gradient| of each block, the last of which may be short; not finite where any of a block is not."""
    whole = gradient.numel() // BLOCK * BLOCK
    blocks, rest = gradient[:whole].view(-1, BLOCK), gradient[whole:].view(1, -1)
    # Two passes without a tensor in between; the one pass of a norm or of aminmax takes three to five times as long.
    peaks = [torch.maximum(part.amax(1), part.amin(1).neg_()) for part in (blocks, rest) if part.numel()]
    return torch.cat(peaks) if peaks else gradient


def _reaching(gradient: Tensor, peaks: Tensor, least: float) -> Tensor:
    """Offsets, ascending, where |gradient| ≥ least; unless they are many, only blocks whose peak reaches it are looked at."""
    # Once a few tensors were seen, almost no entry can still be among the best, and `least` says which gradients could make
    # it one. A block's peak was taken anyway, to find what is not finite. So we read a peak per 1,024 entries, and then only
    # the blocks that hold something: a comparison of the whole chunk would write a mask as long as the chunk and read it back.
    # Where a quarter of the blocks is reached, gathering them costs more than it saves. The last block may be short, and is
    # looked at by itself; offsets stay ascending, since `TopK` breaks ties by the first.
    rows = (peaks >= least).nonzero().flatten()
    if 4 * rows.numel() > peaks.numel():
        return (gradient.abs() >= least).nonzero().flatten()
    whole = gradient.numel() // BLOCK * BLOCK
    full = rows[rows < whole // BLOCK]
    row, column = (gradient[:whole].view(-1, BLOCK)[full].abs() >= least).nonzero(as_tuple=True)
    found = full[row] * BLOCK + column
    if full.numel() == rows.numel():
        return found
    return torch.cat([found, (gradient[whole:].abs() >= least).nonzero().flatten() + whole])


@final
class _Pool:
    """The parameters that compete for one share of the budget, and their best candidates of this update."""

    def __init__(self, share: Share) -> None:
        self.names, self.budget = frozenset(share.free), share.budget
        self.best: TopK | None = None
        self.wanted: int | None = None


@final
class Candidates:
    """Parameters that compete for entries, and the best entries of one update, in each share of the budget.

    Args:
        model: the model.
        method: scores entries, and says how many are granted.
        exclude: entries that must not be chosen.
        updates: how gradients add up, and what decay pulls toward.

    Attributes:
        slots: candidate → its slot, in the model's order.
    """

    def __init__(self, model: nn.Module, method: UpdateMethod, exclude: Selection, updates: Updates) -> None:
        self.method, self._step = method, 1
        self._oversampling = updates.oversampling if updates.accumulation == "lean" else None
        names = method.selectable(model)
        parameters = {name: p for name, p in model.named_parameters() if name in names}
        barred = {name: exclude[name].flat() for name in parameters if name in exclude}
        free = {name: p.numel() - len(barred.get(name, ())) for name, p in parameters.items()}
        self._pools = [_Pool(share) for share in method.budgets({name: count for name, count in free.items() if count})]
        self._member = {name: pool for pool in self._pools for name in pool.names}
        self.slots = {
            name: GrowingSlot(name, parameter, barred.get(name), from_start=updates.decay == "start")
            for name, parameter in parameters.items()
            if name in self._member
        }

    @property
    def digest(self) -> str:
        """Hash of the candidates, and of what is excluded in each."""
        described = [
            (name, list(slot.target.shape), None if slot.excluded is None else fingerprint(slot.excluded))
            for name, slot in self.slots.items()
        ]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]

    @property
    def budgets(self) -> list[int]:
        """Entries that will be chosen, per share."""
        return [pool.budget for pool in self._pools]

    def restart(self, step: int) -> None:
        """Forget everything, and gather for update number `step`, from 1."""
        self._step = step
        for pool in self._pools:
            pool.best = pool.wanted = None

    def any_wanted(self) -> bool:
        """Whether this update chooses entries."""
        return any(self._wanted(pool) > 0 for pool in self._pools)

    def add(self, rank: int, slot: GrowingSlot, gradient: Tensor, first: int = 0) -> bool:
        """Add a parameter's gradient, flat; False where it, or its sum with earlier ones, is not finite.

        Args:
            rank: the parameter's place among the candidates.
            slot: of the parameter.
            gradient: flat, `[n]`; of several processes' mean, the part of this one.
            first: where in the parameter it begins.
        """
        pool = self._member[slot.name]
        if self._wanted(pool) <= 0:
            return True
        if pool.best is None:
            pool.best = TopK(self._wanted(pool) * (self._oversampling or 1))
        weight, finite = slot.target.detach().reshape(-1), True
        barred = [] if self.method.chooses_anew else [slot.index]
        barred += [] if slot.excluded is None else [slot.excluded]
        if self._oversampling is not None:

            def summed(offset: Tensor, earlier: Tensor) -> tuple[Tensor, Tensor]:
                nonlocal finite
                place = offset.to(gradient.device)
                total = earlier + gradient[place - first].to(earlier)
                finite = bool(total.isfinite().all())
                return self.method.score(weight[place], total.to(gradient.device)).cpu(), total

            barred.append(pool.best.revise(rank, summed).to(gradient.device))
        return scan(gradient, weight, self.method, pool.best, rank, barred, first) and finite

    def join(self) -> None:
        """Let the winners join their slots, provisionally."""
        for pool in self._pools:
            if pool.best is None:
                continue
            wanted = self._wanted(pool)
            winners = dict(by_rank(*best_of_all(pool.best, wanted).winners(wanted)))
            none = torch.empty(0, dtype=torch.int64), torch.empty(0)
            for rank, slot in enumerate(self.slots.values()):
                offset, gradient = (tensor.to(slot.target.device) for tensor in winners.get(rank, none))
                if self.method.chooses_anew and slot.name in pool.names:
                    slot.exchange(offset, gradient, self._step)
                elif rank in winners:
                    slot.grow(offset, gradient, self._step)

    def _wanted(self, pool: _Pool) -> int:
        """Entries to choose at this update."""
        if pool.wanted is None:
            anew = self.method.chooses_anew
            held = 0 if anew else sum(self.slots[name].count_before for name in pool.names)
            pool.wanted = (pool.budget if anew else self.method.granted(pool.budget, self._step)) - held
        return pool.wanted


def by_rank(rank: Tensor, offset: Tensor, payload: Tensor) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
    """(rank, (offsets, payloads)) of each parameter that has winners; arguments as `TopK.winners` gives them."""
    order = rank.argsort(stable=True)
    ranks, counts = rank[order].unique_consecutive(return_counts=True)
    parts = zip(offset[order].split(counts.tolist()), payload[order].split(counts.tolist()), strict=True)
    yield from zip(ranks.tolist(), parts, strict=True)
