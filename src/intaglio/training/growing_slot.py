"""A slot whose entries are chosen while training: it grows, or exchanges entries, one update at a time.

Entries stand in the order they came. A choice is provisional until the update is made: `restore` takes it back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import final

import torch
from torch import Tensor, nn

from ..core.entries import Entries, from_flat
from ..core.fingerprint import checksum, fingerprint
from . import tied_weights
from .held_entries import Held, find
from .slot import Slot, damped_values

__all__ = ["GrowingSlot"]


@final
class GrowingSlot(Slot):
    """Values of entries that are chosen while training.

    Args:
        name: of the parameter.
        target: the live base weight.
        excluded: flat offsets that must never be chosen, int64, or None.
        from_start: hold the difference from the base instead of the value, so that weight decay pulls toward the base.

    Attributes:
        held: the entries trained now.
        left: (flat offsets, sorted; base values) of entries that were trained earlier and are frozen again.
        source: where the held entries stood before the pending choice, −1 for new ones, int64 `[n]`; None if none pends.
    """

    is_gathered = True

    def __init__(self, name: str, target: nn.Parameter, excluded: Tensor | None = None, *, from_start: bool = False) -> None:
        none = Held.none(target)
        super().__init__(name, target, nn.Parameter(none.values))
        self.excluded = None if excluded is None else excluded.to(target.device)
        self._from_start, self._sum = from_start, checksum(target)
        self._index, self._base, self._born = none.index, none.base, none.born
        self.left = (none.index, none.base)
        self.source: Tensor | None = None
        self._before: tuple[Held, tuple[Tensor, Tensor]] | None = None

    @property
    def held(self) -> Held:
        return Held(self._index, self.values.detach(), self._base, self._born)

    @property
    def index(self) -> Tensor:
        """Flat offsets of the entries trained now, int64 `[n]`, in the order they came."""
        return self._index.long()

    @property
    def count_before(self) -> int:
        """Entries trained before the pending choice."""
        return self._index.numel() if self._before is None else self._before[0].index.numel()

    @property
    def entries(self) -> Entries | None:
        """All entries that were ever trained; None before the first."""
        index = self._ever()[0].sort().values.cpu()
        return from_flat(tuple(self.target.shape), index) if index.numel() else None

    @property
    def fingerprint(self) -> str | None:
        entries, (index, base) = self.entries, self._ever()
        return None if entries is None else fingerprint(base[index.argsort()].view(entries.values_shape))

    def connect(self, hook: Callable[[Tensor], None], sharers: Sequence[nn.Module] = ()) -> None:
        """Let `hook` see each gradient of the weight; `sharers`: the layers that hold it, where they are several."""
        self.target.requires_grad_(True)
        handle = self.target.register_post_accumulate_grad_hook(hook)
        tied_weights.install(sharers)
        self._remove = lambda: (handle.remove(), tied_weights.remove(sharers))

    def receive(self, gradient: Tensor) -> Tensor:
        """Add the chosen entries of a whole gradient, flat `[n]`, to theirs, which are returned. Drops a pending choice."""
        self.restore()
        chosen = gradient.take(self.index).to(self.values.dtype)
        self.values.grad = chosen if self.values.grad is None else self.values.grad + chosen
        return self.values.grad

    def receive_nothing(self) -> None:
        """Begin the chosen entries' gradient, where a whole one is kept elsewhere for now."""
        self.values.grad = self._gradient()

    @torch.no_grad()
    def grow(self, offset: Tensor, gradient: Tensor, step: int) -> None:
        """Train further entries, provisionally.

        Args:
            offset: their flat offsets, int64 `[m]`, none of them held.
            gradient: theirs, `[m]`.
            step: the update that chose them, from 1.
        """
        n, m = self._index.numel(), offset.numel()
        self._remember()
        grad = self._gradient()
        self._hold(self.held.joined(self._fresh(offset, step)))
        self.values.grad = torch.cat([grad, gradient.to(grad)])
        self.source = torch.cat([torch.arange(n), torch.full((m,), -1)]).to(offset.device)

    @torch.no_grad()
    def exchange(self, offset: Tensor, gradient: Tensor, step: int) -> None:
        """Train these entries and no others, provisionally; arguments as `grow`, but some may be held already."""
        self._remember()
        place = find(self.index, offset)
        fresh = self._fresh(offset, step)
        fresh.keep_(self.held, place)
        ever, base = self._ever()
        gone = (~torch.isin(ever, offset)).nonzero().flatten()
        gone = gone[ever[gone].argsort()]
        self.left = (ever[gone].to(self._index), base[gone])
        self._hold(fresh)
        self.values.grad = gradient.to(self.values)
        self.source = place

    def restore(self) -> None:
        """Take the pending choice back."""
        if self._before is None:
            return
        held, self.left = self._before
        gradient = None
        if self.values.grad is not None and self.source is not None:
            gradient, earlier = self.values.grad.new_zeros(held.index.numel()), self.source >= 0
            gradient[self.source[earlier]] = self.values.grad[earlier]
        self._hold(held)
        self.values.grad = gradient
        self.commit()

    def commit(self) -> None:
        """Make the pending choice final."""
        self._before = self.source = None

    @torch.no_grad()
    def _write(self) -> None:
        if self._index.numel():
            self.target.put_(self.index, self._tuned(self.values.detach(), self._base))

    def _frozen(self) -> int:
        index, base = self._ever()
        return self._sum - checksum(base) + checksum(self.target.detach().take(index))

    @torch.no_grad()
    def _follow(self) -> None:
        live = self.target.detach().take(self.index)
        followed = live.to(self.values) - self._base.to(self.values) if self._from_start else live.to(self.values)
        self.values.copy_(torch.where(live == self._tuned(self.values, self._base), self.values, followed))

    def remember_start(self) -> None:
        """Nothing to do: the base's values at all entries are held anyway."""

    @torch.no_grad()
    def damp(self, factor: float) -> Callable[[], None]:
        index, base = self._ever()
        if not index.numel():
            return lambda: None
        tuned = self.target.detach().take(index)
        self.target.put_(index, damped_values(base, tuned, factor))

        def undo() -> None:
            with torch.no_grad():
                self.target.put_(index, tuned)

        return undo

    def is_stale(self) -> bool:
        return not torch.equal(self.target.detach().take(self.index), self._tuned(self.values.detach(), self._base))

    def state(self) -> dict[str, Tensor]:
        committed, (index, base) = (self.held, self.left) if self._before is None else self._before
        held = {key: tensor.clone() for key, tensor in vars(committed).items()}
        tuned = self.target.detach().take(index.long())
        return held | {"left_index": index.clone(), "left_base": base.clone(), "left_values": tuned}

    def check(self, state: Mapping[str, Tensor], fingerprint: str | None) -> None:
        if missing := {"index", "values", "base", "born", "left_index", "left_base", "left_values"} - state.keys():
            raise ValueError(f"resume: {self.name}: the checkpoint has no {', '.join(sorted(missing))} of it")
        device = self.target.device
        index = torch.cat([state["index"], state["left_index"]]).to(device).long()
        if index.numel() and (int(index.min()) < 0 or int(index.max()) >= self.target.numel()):
            raise ValueError(f"resume: {self.name}: the checkpoint's entries lie outside a parameter of {self.target.numel():,}")
        base = torch.cat([state["base"], state["left_base"]]).to(device)
        tuned = torch.cat([self._tuned(state["values"], state["base"]), state["left_values"]]).to(device)
        own = self._base_at(index)
        if base.dtype != self.base_dtype or not (torch.equal(own, base) or torch.equal(own, tuned)):  # tuned: loaded already
            raise ValueError(f"resume: {self.name}: the checkpoint was made on another base model, or in another type")

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        self.restore()
        device = self.target.device
        self.target.put_(*self._ever())
        self.left = (state["left_index"].to(device), state["left_base"].to(device))
        self.target.put_(self.left[0].long(), state["left_values"].to(device))
        self._hold(Held.of(state, device))

    def clear(self) -> None:
        """Drop all gradients."""
        self.values.grad = None

    def _fresh(self, offset: Tensor, step: int) -> Held:
        """Entries as they are in the weight now."""
        live, base = self.target.detach().take(offset), self._base_at(offset)
        values = live.to(self.values.dtype) - base.to(self.values.dtype) if self._from_start else live.to(self.values.dtype)
        return Held(offset.to(self._index), values, base, torch.full_like(offset, step, dtype=torch.int32))

    def _base_at(self, offset: Tensor) -> Tensor:
        """The base's values at these offsets, whatever was trained since."""
        base = self.target.detach().take(offset)
        for index, original in ((self._index, self._base), self.left):
            place = find(index.long(), offset)
            base[place >= 0] = original[place[place >= 0]]
        return base

    def _tuned(self, values: Tensor, base: Tensor) -> Tensor:
        """The weight's entries where these values are trained."""
        return (base.to(values.dtype) + values if self._from_start else values).to(self.base_dtype)

    def _ever(self) -> tuple[Tensor, Tensor]:
        """Flat offsets, int64, and base values of all that was ever trained."""
        return torch.cat([self._index, self.left[0]]).long(), torch.cat([self._base, self.left[1]])

    def _remember(self) -> None:
        if self._before is None:
            self._before = (self.held, self.left)

    def _hold(self, held: Held) -> None:
        self.values.grad = None  # of the old shape
        self._index, self._base, self._born, self.values.data = held.index, held.base, held.born, held.values

    def _gradient(self) -> Tensor:
        return torch.zeros_like(self.values) if self.values.grad is None else self.values.grad

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GrowingSlot:
        """Follow the model to another device, never to another type."""
        device = fn(torch.empty(0, device=self.values.device)).device
        gradient = self.values.grad
        self._hold(Held.of(vars(self.held), device))
        self.values.grad = None if gradient is None else gradient.to(device)
        self.left = (self.left[0].to(device), self.left[1].to(device))
        self.excluded = None if self.excluded is None else self.excluded.to(device)
        return self
