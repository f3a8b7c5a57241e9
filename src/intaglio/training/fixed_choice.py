"""A choice that is made before training and stays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from torch import nn

from ..core.selection import Selection
from ..method_kinds.method import Method
from ..model.permute import Layout, co_permute
from . import ranks
from .regime import Regime, Wish, chooser_of, refuse_differing
from .slots import Slots

__all__ = ["FixedChoice"]


@final
class FixedChoice(Regime[Method]):
    """A choice that is made before training and stays, with the layout in which it is trained.

    Raises:
        ValueError: where the method selects nothing, or processes chose differently, or an option has no effect.
    """

    name = "fixed"

    def __init__(self, model: nn.Module, method: Method, wish: Wish) -> None:
        if wish.updates is not None:
            raise ValueError(
                f"updates={wish.updates}: no effect with {method.name!r}, which chooses before training; leave it out"
            )
        self.method = method
        chosen = method.choose(model, wish.probe, wish.exclude) if wish.selection is None else wish.selection
        if not chosen:
            raise ValueError(f"{method}: selects nothing in this model")
        ranks.refuse_differing(chosen)
        self._chosen = chosen
        self._layout = co_permute(model, chosen, wish.probe) if wish.permute else Layout()
        self.start = self._layout.entries(chosen)

    @property
    def layout(self) -> Layout:
        return self._layout

    @property
    def selection(self) -> Selection:
        return self._chosen

    def connect(self, slots: Slots) -> None:
        """Nothing to do: the slots of its entries are there."""

    def check(self, method: Mapping[str, Any], state: Mapping[str, Any] | None) -> None:
        refuse_differing(chooser_of(method), self.method.to_dict())
