"""What is trained of one parameter, as the engine of layers in turn sees it: a slot's values, or a bare tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from .slots import Slot, damped_values

__all__ = ["Part", "bare_parts", "part_of"]


@final
@dataclass(frozen=True)
class Part:
    """What the optimizer trains of one parameter.

    Attributes:
        parameter: what the optimizer sees.
        activate: lets gradients reach it, or none.
        keep_start: remembers the present values of the weight, the first time it is called.
        damp: writes start + factor · (tuned − start) into the weight and returns what writes the exact values back.
    """

    parameter: nn.Parameter
    activate: Callable[[bool], None]
    keep_start: Callable[[], None]
    damp: Callable[[float], Callable[[], None]]


def part_of(slot: Slot) -> Part:
    """The part that is a slot's values."""
    return Part(slot.values, slot.activate, slot.keep_start, slot.damp)


def bare_parts(model: nn.Module) -> dict[str, Part]:
    """Name → part of every trainable parameter of a model that has no slots: an adapter's tensors, as PEFT made them."""
    bare = ((name, _Bare(parameter)) for name, parameter in model.named_parameters() if parameter.requires_grad)
    return {name: Part(b.parameter, b.activate, b.keep_start, b.damp) for name, b in bare}


@final
class _Bare:
    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter
        self._start: Tensor | None = None

    def activate(self, active: bool) -> None:
        self.parameter.requires_grad_(active)
        if not active:
            self.parameter.grad = None

    def keep_start(self) -> None:
        if self._start is None:
            self._start = self.parameter.detach().clone()

    @torch.no_grad()
    def damp(self, factor: float) -> Callable[[], None]:
        assert self._start is not None
        tuned = self.parameter.detach().clone()
        self.parameter.copy_(damped_values(self._start.to(tuned.device), tuned, factor))

        def undo() -> None:
            with torch.no_grad():
                self.parameter.copy_(tuned)

        return undo
