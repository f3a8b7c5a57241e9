"""A regime, which decides, as training goes on, what trains next: the protocol that a tuner speaks with each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..core.probe import Probe
from ..core.selection import Selection
from ..method_kinds.method import NOTHING, Method
from ..model.permute import Layout
from .slots import Slots
from .updates import Updates

__all__ = ["Loss", "Recorder", "Regime", "Wish", "chooser_of", "refuse_differing"]

M = TypeVar("M", bound=Method)
Loss = Callable[[nn.Module, Mapping[str, Any]], Tensor]  # (model, batch) → scalar


@dataclass(frozen=True)
class Wish:
    """The arguments of `attach` beside model and method; see there.

    Attributes:
        exclude: also what the model's user froze.
        updates: None where nothing was said.
        selection: None where the method is to be asked.
    """

    probe: Probe | None = None
    exclude: Selection = field(default_factory=Selection)
    permute: bool = False
    selection: Selection | None = None
    updates: Updates | None = None


class Recorder(Protocol):
    """A writer of what a regime did, for the folder of a run."""

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the record of the run so far into a folder, by the regime's own file name, and return it."""
        ...


class Regime(ABC, Generic[M]):
    """An object that decides, as training goes on, what trains next.

    Made on the model as its user left it, of which it may change the layout; then `connect`ed, once the model is frozen and has
    slots.
    What a regime has nothing to say to, it leaves at the defaults here.

    Attributes:
        name: by which methods ask for it, and the key of its state in a checkpoint.
        method: what it applies, with the length of the run once that is known.
        start: entries that train from the start, as they lie in the model.
        layout: where positions of the base lie in the model.
        leaves_unused: whether some trained tensors get no gradient in an update.
        averages: whether it has the gradients averaged over the processes by itself, with `Slots.averaging`.
    """

    name: ClassVar[str]
    leaves_unused: ClassVar[bool] = False
    averages: ClassVar[bool] = False
    method: M
    start: Selection = NOTHING

    @abstractmethod
    def __init__(self, model: nn.Module, method: M, wish: Wish) -> None: ...

    @property
    def layout(self) -> Layout:
        return Layout()

    @property
    def selection(self) -> Selection:
        """All entries that it ever chose, in the base's coordinates."""
        return NOTHING

    @abstractmethod
    def connect(self, slots: Slots) -> None:
        """Take the model's slots, add more of them, see what is to be seen of the training from now on.

        Raises:
            ValueError: where the model does not fit; `release` undoes what was done then.
        """

    def expect(self, *, steps: int | None = None, passes: int | None = None) -> None:
        """Say how many updates the run makes, or of how many backward passes each.

        Raises:
            ValueError: where that does not fit.
        """

    def refuse_optimizer(self, factory: Any) -> None:
        """Refuse a class of optimizers that cannot follow; what is no class says nothing.

        Raises:
            ValueError: naming the class.
        """

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Follow an optimizer, with hooks before and after its steps.

        Raises:
            ValueError: for one that cannot be followed.
        """

    def measure_by(self, loss: Loss) -> None:
        """Take a trainer's loss of the probe's batches, which it trains on, unless the probe was given one."""

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Go on after update number `step`, from 1, when its values are in the weights."""

    def norm(self) -> Tensor | None:
        """Norm of the gradient that clipping is to compare; None for that of the trained values."""
        return None

    def log(self) -> dict[str, float]:
        """Figures for a trainer's log."""
        return {}

    def recorder(self) -> Recorder | None:
        """The writer of its record, which follows the run from here on; None where there is nothing to tell."""
        return None

    def state(self) -> dict[str, Any] | None:
        """What a resumed run needs or must agree with, as JSON values."""
        return None

    @abstractmethod
    def check(self, method: Mapping[str, Any], state: Mapping[str, Any] | None) -> None:
        """Refuse to go on from a run that was another; entries and base are not looked at.

        Args:
            method: of the run that was saved, as `Method.to_dict` gives it.
            state: its `state()`.

        Raises:
            ValueError: naming what differs.
        """

    def load(self, step: int, method: Mapping[str, Any], state: Mapping[str, Any] | None) -> None:
        """Go on after update number `step` from what `check` has passed."""

    def release(self) -> None:
        """Take everything off the model that no slot holds."""


def chooser_of(method: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a method that chooses entries, as a checkpoint holds it; none where it trains an adapter's tensors."""
    return (method["of"] or {}) if "of" in method else method


def refuse_differing(then: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> None:
    """Refuse to resume a run whose settings were others; `prefix` goes before their names in the message.

    Raises:
        ValueError: naming the first that differs.
    """
    for key in (*now, *(key for key in then if key not in now)):
        if then.get(key) != now.get(key):
            raise ValueError(
                f"resume: the checkpoint's {prefix}{key} is {then.get(key)!r}, this run's {now.get(key)!r}; change it back, or "
                "start anew"
            )
