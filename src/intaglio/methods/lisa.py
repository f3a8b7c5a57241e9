"""LISA: a few whole layers at a time, at random, with embeddings and head always."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

from ..method_kinds.layer_method import LayerMethod
from ..method_kinds.method import Method
from .full import Full

__all__ = ["LISA"]


@final
@dataclass(frozen=True)
class LISA(LayerMethod):
    """Train `layers` whole layers at a time, drawn uniformly every `redraw` updates; embeddings, final norm and head always.

    Args:
        layers: layers that train at a time, a count (int) or a share (float; rounded down, at least 1); default 2.
        redraw: updates between draws; default 20.
        of: what is trained in a layer and outside the stack; default `Full()`, everything.
        state, idle_dropout, policy, seed: see `LayerMethod`.

    Raises:
        ValueError: for a field outside its range; at attach, for fewer layers than asked.

    Example:
        >>> [step for step in range(50) if LISA().draws_at(step)]
        [0, 20, 40]

    Paper: arXiv 2403.17919.

    Differences: the optimizer's state of idle layers is kept, as in the authors' code; `state="drop"` frees it and
    `state="offload"` moves it to the CPU. Draws come from a private generator.
    """

    name = "lisa"
    summary = "a few whole layers at a time, at random, with embeddings and head"

    layers: int | float = 2
    redraw: int = field(default=20, kw_only=True)
    of: Method | None = field(default=Full(), kw_only=True)
