"""RST: a few layers at a time, drawn without regard to importance; the control of IST."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from ..method_kinds.layer_method import LayerMethod

__all__ = ["RST"]


@final
@dataclass(frozen=True)
class RST(LayerMethod):
    """Train `layers` of the layers at a time, drawn anew before every update, all alike.

    Args:
        layers: layers that train at a time, a count (int) or a share (float; rounded down, at least 1); default 0.25.
        of, state, idle_dropout, policy, redraw, seed: see `LayerMethod`.

    Raises:
        ValueError: for a field outside its range; at attach, where the model has no adapter and `of` is not given, or fewer
            layers than asked.

    Example:
        >>> RST(layers=8).active_count(32)
        8

    Paper: the random baseline of arXiv 2410.11772.

    Differences: the authors' file of it was never released; this is IST with importance held at 0, bit for bit
    (`IST(rate=0)`), whatever its law and floor.
    """

    name = "rst"
    summary = "a few layers at a time, at random: the control of IST"

    layers: int | float = 0.25
