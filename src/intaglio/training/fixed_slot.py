"""A slot whose entries were chosen before training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import final

import torch
from torch import Tensor, nn

from ..core.entries import Entries, Whole
from ..core.fingerprint import checksum, fingerprint
from ..model.structure import is_transposed
from . import partial_linear
from .slot import Slot, damped_values

__all__ = ["FixedSlot"]


@final
class FixedSlot(Slot):
    """Values of entries that were chosen before training.

    Attributes:
        entries: the chosen entries, on the weight's device.
        values: of shape `entries.values_shape`. A whole parameter of at least fp32 is its own slot and costs nothing extra.
    """

    def __init__(self, name: str, target: nn.Parameter, entries: Entries) -> None:
        placed = entries.to(target.device)
        dtype = torch.promote_types(target.dtype, torch.float32)
        is_alias = isinstance(entries, Whole) and dtype == target.dtype
        base = placed.gather(target)
        super().__init__(name, target, target if is_alias else nn.Parameter(base.to(dtype)))
        self.entries, self.is_alias, self._fingerprint = placed, is_alias, fingerprint(base)
        self._rest = checksum(target) - checksum(base)
        self._start: Tensor | None = None

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def _write(self) -> None:
        if not self.is_alias:
            self.entries.scatter_(self.target, self.values.detach())

    def _frozen(self) -> int:
        return self._rest + checksum(self.entries.gather(self.target))

    @torch.no_grad()
    def _follow(self) -> None:
        live = self.entries.gather(self.target)
        self.values.copy_(torch.where(live == self.values.to(live), self.values, live.to(self.values)))

    def is_stale(self) -> bool:
        return not self.is_alias and not torch.equal(self.entries.gather(self.target), self.values.detach().to(self.target))

    def remember_start(self) -> None:
        self._start = self.entries.gather(self.target).clone()

    @torch.no_grad()
    def damp(self, factor: float) -> Callable[[], None]:
        assert self._start is not None
        tuned = self.entries.gather(self.target).clone()
        self.entries.scatter_(self.target, damped_values(self._start, tuned, factor))
        return lambda: self.entries.scatter_(self.target, tuned)

    def connect(self, module: nn.Module | None, *, partial: bool) -> None:
        """Let gradients reach `values`: through a partial product in `module`, else gathered from the dense one."""
        if self.is_alias:
            self.target.requires_grad_(True)
        elif module is not None and partial:
            partial_linear.install(module, self, transposed=is_transposed(module))
            self._remove = lambda: partial_linear.remove(module)
        else:
            self.is_gathered = True
            self.target.requires_grad_(True)
            self._remove = self.target.register_post_accumulate_grad_hook(self._gather_gradient).remove

    def state(self) -> dict[str, Tensor]:
        return {"values": self.values.detach().clone()}

    def check(self, state: Mapping[str, Tensor], fingerprint: str | None) -> None:
        if fingerprint != self.fingerprint or "values" not in state or state["values"].shape != self.values.shape:
            raise ValueError(
                f"resume: {self.name}: the checkpoint has other entries, or another base model, or permute or exclude "
                "has changed since"
            )

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        self.values.copy_(state["values"])

    def _gather_gradient(self, target: Tensor) -> None:
        """Keep the chosen entries of the dense gradient and free it at once."""
        assert target.grad is not None
        chosen = self.entries.gather(target.grad).to(self.values.dtype)
        self.values.grad = chosen if self.values.grad is None else self.values.grad.add_(chosen)
        target.grad = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FixedSlot:
        """Follow the model to another device, never to a narrower type: `model.bfloat16()` leaves slots in fp32."""
        if not self.is_alias:
            device = fn(torch.empty(0, device=self.values.device)).device
            self.values.data = self.values.data.to(device)
            self.values.grad = None if self.values.grad is None else self.values.grad.to(device)
            self.entries = self.entries.to(device)
        if self._start is not None:
            self._start = fn(self._start)
        return self
