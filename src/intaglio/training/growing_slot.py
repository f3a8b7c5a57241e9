"""A slot whose entries are chosen while training: it grows, or exchanges entries, one update at a time.

Entries stand in the order they came. A choice is provisional until the update is made: `restore` takes it back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from ..core.fingerprint import fingerprint
from ..core.selection import Entries, from_flat
from . import tied_weights as tied
from .slots import Slot, damped_values

__all__ = ["GrowingSlot"]


@dataclass(frozen=True)
class _Held:
    """The entries a slot trains.

    Attributes:
        index: flat offsets, int32 (int64 for a parameter too large for it), `[n]`.
        values: what is trained, `[n]`.
        base: the base's values there, in its type, `[n]`.
        born: the update that chose each, from 1, int32 `[n]`.
    """

    index: Tensor
    values: Tensor
    base: Tensor
    born: Tensor


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
        dtype = torch.promote_types(target.dtype, torch.float32)
        super().__init__(name, target, nn.Parameter(torch.empty(0, dtype=dtype, device=target.device)))
        self.excluded = None if excluded is None else excluded.to(target.device)
        self._from_start = from_start
        wide = target.numel() > torch.iinfo(torch.int32).max
        index = torch.empty(0, dtype=torch.int64 if wide else torch.int32, device=target.device)
        base, born = index.to(target.dtype), index.to(torch.int32)
        self._index, self._base, self._born = index, base, born
        self.left = (index, base)
        self.source: Tensor | None = None
        self._before: tuple[_Held, tuple[Tensor, Tensor]] | None = None

    @property
    def held(self) -> _Held:
        return _Held(self._index, self.values.detach(), self._base, self._born)

    @property
    def index(self) -> Tensor:
        """Flat offsets of the entries trained now, int64 `[n]`, in the order they came."""
        return self._index.long()

    @property
    def born(self) -> Tensor:
        """The update that chose each of them, from 1, int32 `[n]`."""
        return self._born

    @property
    def count_before(self) -> int:
        """Entries trained before the pending choice."""
        return self._index.numel() if self._before is None else self._before[0].index.numel()

    @property
    def entries(self) -> Entries | None:
        """All entries that were ever trained; None before the first."""
        index = torch.cat([self._index, self.left[0]]).long().sort().values.cpu()
        return from_flat(tuple(self.target.shape), index) if index.numel() else None

    @property
    def fingerprint(self) -> str | None:
        entries = self.entries
        if entries is None:
            return None
        order = torch.cat([self._index, self.left[0]]).argsort()
        return fingerprint(torch.cat([self._base, self.left[1]])[order].view(entries.values_shape))

    def connect(self, hook: Callable[[Tensor], None], sharers: Sequence[nn.Module] = ()) -> None:
        """Let `hook` see each gradient of the weight; `sharers`: the layers that hold it, where they are several."""
        self.target.requires_grad_(True)
        handle = self.target.register_post_accumulate_grad_hook(hook)
        tied.install(sharers)

        def remove() -> None:
            handle.remove()
            tied.remove(sharers)

        self._remove = remove

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
        fresh = self._fresh(offset, step)
        old, grad = self.held, self._gradient()
        self._hold(_Held(*(torch.cat(pair) for pair in zip(vars(old).values(), vars(fresh).values(), strict=True))))
        self.values.grad = torch.cat([grad, gradient.to(grad)])
        self.source = torch.cat([torch.arange(n), torch.full((m,), -1)]).to(offset.device)

    @torch.no_grad()
    def exchange(self, offset: Tensor, gradient: Tensor, step: int) -> None:
        """Train these entries and no others, provisionally; arguments as `grow`, but some may be held already."""
        self._remember()
        old, before = self.held, self.index
        place = _find(before, offset)
        kept = place >= 0
        fresh = self._fresh(offset, step)
        for tensor, earlier in zip(vars(fresh).values(), vars(old).values(), strict=True):
            tensor[kept] = earlier[place[kept]]
        self.left = self._leaving(before, offset)
        self._hold(fresh)
        self.values.grad = gradient.to(self.values)
        self.source = place

    def restore(self) -> None:
        """Take the pending choice back."""
        if self._before is None:
            return
        held, self.left = self._before
        gradient = None if self.values.grad is None else self._earlier(self.values.grad, held.index.numel())
        self._hold(held)
        self.values.grad = gradient
        self.commit()

    def commit(self) -> None:
        """Make the pending choice final."""
        self._before = self.source = None

    @torch.no_grad()
    def write(self) -> None:
        if self._index.numel():
            self.target.put_(self.index, self._tuned(self.values.detach(), self._base))

    def keep_start(self) -> None:
        """Nothing to do: the base's values at all entries are held anyway."""

    @torch.no_grad()
    def damp(self, factor: float) -> Callable[[], None]:
        index, base = torch.cat([self._index, self.left[0]]).long(), torch.cat([self._base, self.left[1]])
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
        missing = {"index", "values", "base", "born", "left_index", "left_base", "left_values"} - state.keys()
        if missing:
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
        self.target.put_(torch.cat([self._index, self.left[0]]).long(), torch.cat([self._base, self.left[1]]))
        self.left = (state["left_index"].to(device), state["left_base"].to(device))
        self.target.put_(self.left[0].long(), state["left_values"].to(device))
        self._hold(_Held(*(state[key].to(device) for key in ("index", "values", "base", "born"))))

    def clear(self) -> None:
        """Drop all gradients."""
        self.values.grad = None

    def _fresh(self, offset: Tensor, step: int) -> _Held:
        """Entries as they are in the weight now."""
        live, base = self.target.detach().take(offset), self._base_at(offset)
        values = live.to(self.values.dtype) - base.to(self.values.dtype) if self._from_start else live.to(self.values.dtype)
        return _Held(offset.to(self._index), values, base, torch.full_like(offset, step, dtype=torch.int32))

    def _base_at(self, offset: Tensor) -> Tensor:
        """The base's values at these offsets, whatever was trained since."""
        base = self.target.detach().take(offset)
        for index, original in ((self._index, self._base), self.left):
            place = _find(index.long(), offset)
            base[place >= 0] = original[place[place >= 0]]
        return base

    def _tuned(self, values: Tensor, base: Tensor) -> Tensor:
        """What the weight holds where these values are trained."""
        return (base.to(values.dtype) + values if self._from_start else values).to(self.base_dtype)

    def _leaving(self, before: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        """All that was trained once and is not among `offset`."""
        index, base = torch.cat([self.left[0].long(), before]), torch.cat([self.left[1], self._base])
        gone = ~torch.isin(index, offset)
        order = index[gone].argsort()
        return index[gone][order].to(self._index), base[gone][order]

    def _remember(self) -> None:
        if self._before is None:
            self._before = (self.held, self.left)

    def _hold(self, held: _Held) -> None:
        self.values.grad = None  # of the old shape
        self._index, self._base, self._born, self.values.data = held.index, held.base, held.born, held.values

    def _gradient(self) -> Tensor:
        return torch.zeros_like(self.values) if self.values.grad is None else self.values.grad

    def _earlier(self, gradient: Tensor, n: int) -> Tensor:
        """The gradient of the entries held before the pending choice."""
        assert self.source is not None
        earlier = gradient.new_zeros(n)
        earlier[self.source[self.source >= 0]] = gradient[self.source >= 0]
        return earlier

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GrowingSlot:
        """Follow the model to another device, never to another type."""
        device = fn(torch.empty(0, device=self.values.device)).device
        gradient = self.values.grad
        self._hold(_Held(*(tensor.to(device) for tensor in vars(self.held).values())))
        self.values.grad = None if gradient is None else gradient.to(device)
        self.left = (self.left[0].to(device), self.left[1].to(device))
        self.excluded = None if self.excluded is None else self.excluded.to(device)
        return self


def _find(haystack: Tensor, needles: Tensor) -> Tensor:
    """Position of each needle in a tensor of distinct numbers, −1 where it is missing."""
    if haystack.numel() == 0:
        return torch.full_like(needles, -1)
    ordered, order = haystack.sort()
    place = torch.searchsorted(ordered, needles).clamp_(max=haystack.numel() - 1)
    return torch.where(ordered[place] == needles, order[place], -1)
