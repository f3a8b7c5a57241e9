"""A slot: compact trainable values for the chosen entries of one parameter.

It holds them in fp32 (or the weight's own wider type). The optimizer sees slots only: weight decay cannot reach a frozen
entry, optimizer state is O(chosen), and updates too small for a bf16 weight add up in the slot. After each update the slot is
written into the live weight, rounded to its type.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.fingerprint import checksum

__all__ = ["Slot", "damped_values"]


class Slot(nn.Module, ABC):
    """The trainable values of one parameter.

    Attributes:
        name: of the parameter.
        base_dtype: type of the base weight at attach.
        target: the live base weight.
        values: the compact trainable values, at least fp32.
        is_alias: whether `values` is the weight itself.
        is_gathered: whether the gradient is gathered from the dense one, outside the autograd graph.
    """

    is_alias = is_gathered = False

    def __init__(self, name: str, target: nn.Parameter, values: nn.Parameter) -> None:
        super().__init__()
        self.name, self.base_dtype, self.values = name, target.dtype, values
        self._target = (target,)  # in a tuple, so that it is not registered a second time
        self._remove: Callable[[], object] = lambda: None
        self._versions = self._current()

    @property
    def target(self) -> nn.Parameter:
        return self._target[0]

    @property
    @abstractmethod
    def fingerprint(self) -> str | None:
        """Fingerprint of the base values at the chosen entries, taken before training; None where none is chosen yet."""

    def write(self) -> None:
        """Write the values into the base weight."""
        self._write()
        self._versions = self._current()

    @property
    def was_loaded(self) -> bool:
        """Whether somebody else wrote into the base weight since we did: `load_state_dict`, say."""
        return not self.is_alias and self.target._version != self._versions[1]

    def reconcile(self) -> bool:
        """Let values and weight agree again: whichever moved since the last `write` is taken over by the other.

        Returns:
            Whether it was the values that moved, without reaching the weight.

        Raises:
            ValueError: where both moved, or what was loaded differs from the base where nothing is trained.
        """
        values_moved = self.values._version != self._versions[0]
        stale = self.is_stale()
        if self.was_loaded and (checksum(self.target) - self._frozen()) % 2**64 != 0:
            raise ValueError(
                f"{self.name}: weights were loaded into the model that differ from its base in entries that are not trained, "
                "which no adapter would hold: load them first and attach then, or resume a SparseMixin from its own checkpoint"
            )
        if stale and values_moved and self.was_loaded:
            raise ValueError(
                f"{self.name}: weights were loaded into the model, and an optimizer that the tuner does not follow has moved its "
                "values, so that either would be lost: build it with tuner.optimizer(…), or call tuner.watch(optimizer)"
            )
        if stale and not values_moved:
            self._follow()
        self.write()
        return stale and values_moved

    def _current(self) -> tuple[int, int]:
        return self.values._version, self.target._version

    @abstractmethod
    def _write(self) -> None:
        """Write the values into the base weight."""

    @abstractmethod
    def _frozen(self) -> int:
        """The checksum that the weight has, if it is the base wherever nothing was trained."""

    @abstractmethod
    def _follow(self) -> None:
        """Take over what the base weight holds; where that is a value rounded, the exact value stays.

        Raises:
            ValueError: where it does not say what was trained.
        """

    @abstractmethod
    def is_stale(self) -> bool:
        """Whether the base weight differs from the values, rounded to its type."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs, by kind: copies."""

    @abstractmethod
    def check(self, state: Mapping[str, Tensor], fingerprint: str | None) -> None:
        """Refuse a state that is not this slot's.

        Raises:
            ValueError: where it belongs to other entries or another base.
        """

    @abstractmethod
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state that `check` has passed."""

    @property
    def leaf(self) -> nn.Parameter:
        """The tensor that autograd forms a gradient for: `values`, or the weight whose gradient is gathered."""
        return self.target if self.is_alias or self.is_gathered else self.values

    @property
    def is_active(self) -> bool:
        """Whether gradients reach `values`."""
        return self.leaf.requires_grad

    def activate(self, active: bool) -> None:
        """Let gradients reach `values`, or none: then nothing is kept for backward and no gradient is left."""
        self.leaf.requires_grad_(active)
        if not active:
            self.values.grad = None

    @abstractmethod
    def remember_start(self) -> None:
        """Remember the present values of the weight, which `damp` damps toward."""

    @abstractmethod
    def damp(self, factor: float) -> Callable[[], None]:
        """Write start + factor · (tuned − start) into the weight; what is returned writes the exact tuned values back."""

    def disconnect(self) -> None:
        """Let no more gradients reach `values`; the weight keeps its present values."""
        self._remove()
        self.target.requires_grad_(False)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Write nothing: the base weight already holds the values, so `model.state_dict()` stays an ordinary one."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Read nothing, for the same reason."""


def damped_values(start: Tensor, tuned: Tensor, factor: float) -> Tensor:
    """start + factor · (tuned − start), taken in at least fp32, in the type of `tuned`."""
    wide = torch.promote_types(tuned.dtype, torch.float32)
    return (start.to(wide) + factor * (tuned.to(wide) - start.to(wide))).to(tuned.dtype)
