"""Trained tensors that a rotation switches off and damps, and the damping of layers for a probe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Protocol, final

import torch
from torch import Tensor, nn

from ..model import peft_layers
from ..model.layers import stacks
from .slot import damped_values

__all__ = ["Damping", "Trained", "bare_tensors", "remember_starts"]


class Trained(Protocol):
    """A trained tensor that a rotation can switch off and damp: a slot, or a parameter that PEFT made."""

    @property
    def values(self) -> nn.Parameter:
        """What the optimizer sees."""
        ...

    def activate(self, active: bool) -> None:
        """Let gradients reach it, or none."""

    def remember_start(self) -> None:
        """Remember the present values of the weight, the first time it is called."""

    def damp(self, factor: float) -> Callable[[], None]:
        """Write start + factor · (tuned − start) into the weight; what is returned writes the exact tuned values back."""
        ...


@final
class _BareTensor:
    """A trained parameter that is no slot."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.values = parameter
        self._start: Tensor | None = None

    def activate(self, active: bool) -> None:
        self.values.requires_grad_(active)
        if not active:
            self.values.grad = None

    def remember_start(self) -> None:
        if self._start is None:
            self._start = self.values.detach().clone()

    @torch.no_grad()
    def damp(self, factor: float) -> Callable[[], None]:
        assert self._start is not None
        tuned = self.values.detach().clone()
        self.values.copy_(damped_values(self._start.to(tuned.device), tuned, factor))

        def undo() -> None:
            with torch.no_grad():
                self.values.copy_(tuned)

        return undo


def bare_tensors(model: nn.Module) -> dict[str, Trained]:
    """Name → every trainable parameter of a model that has no slots: an adapter's tensors, as PEFT made them."""
    return {name: _BareTensor(parameter) for name, parameter in model.named_parameters() if parameter.requires_grad}


@final
class Damping:
    """Scales what layers add to the base, for as long as a probe's loss is taken.

    What is in an adapter is damped in the adapter's response; other weights are written, and remember where they start.

    Args:
        model: the model.
        groups: names of the trained tensors in each layer.
        trained: name → trained tensor.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Sequence[str]], trained: Mapping[str, Trained]) -> None:
        named = dict(model.named_parameters())
        self._layers: list[tuple[list[tuple[nn.Module, set[str]]], list[Trained]]] = []
        for group in groups:
            found = peft_layers.adapters_of(model, [named[name] for name in group])
            in_adapters = {held for module, _ in found.values() for held in peft_layers.held_by(module)}
            weights = [trained[name] for name in group if id(named[name]) not in in_adapters]
            for weight in weights:
                weight.remember_start()
            self._layers.append((list(found.values()), weights))

    @property
    def has_starts(self) -> bool:
        """Whether any weights lie outside adapters, so that their starts count."""
        return any(weights for _, weights in self._layers)

    def damped(self, places: Sequence[int], factor: float) -> ExitStack:
        """A context in which these layers add `factor` times what they add; after it all is as it was, to the bit."""
        stack = ExitStack()
        with stack:
            for number in places:
                modules, weights = self._layers[number]
                stack.enter_context(peft_layers.damped(modules, factor))
                for weight in weights:
                    stack.callback(weight.damp(factor))
            return stack.pop_all()


def remember_starts(model: nn.Module, trained: Mapping[str, Trained]) -> bool:
    """Remember where weights start that damping leads back to: those of layers that are in no adapter.

    For who loads a checkpoint between this and a rotation of the same tensors. Returns whether there are any.
    """
    return Damping(model, stacks(model, trained).groups, trained).has_starts
