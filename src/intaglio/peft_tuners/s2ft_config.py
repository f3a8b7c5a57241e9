"""S2FT's own config for PEFT: its shares as fields, and linear layers outside any described transformer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from torch import nn

from ..core.entries import Entries
from ..core.selection import Selection
from ..methods.s2ft import S2FT
from .base_config import help_text
from .delta_config import DeltaConfig
from .unit_targets import columns, split, units

__all__ = ["S2FTConfig"]


@dataclass
class S2FTConfig(DeltaConfig):
    """S2FT for PEFT: train whole attention heads and FFN channels. The shares are those of `intaglio.S2FT`.

    Args:
        q, k, v, o, up, gate, down: share of a projection's units (float), units over all layers (int), or None.
        select: what units are ranked by: "random", "weight", "activation", "product", "gradient"; the last three need a
            `probe`.
        largest: take the largest norms instead of the smallest.
        seed: of the random draw.
        target_modules: restricts the projections; explicit linear layers that are no part of a described transformer
            train the share `down` of their input columns, at least one.

    The other fields are `DeltaConfig`'s, without `method`; a saved config is read back as a `DeltaConfig`.

    Raises:
        ValueError: as `intaglio.S2FT` and `DeltaConfig`; at injection, where a target is a projection without a share.

    Example:
        >>> model = get_peft_model(base, S2FTConfig(o=0.05, down=0.02, task_type="CAUSAL_LM"))

    Paper: arXiv 2412.06289.
    """

    q: int | float | None = field(default=None, metadata=help_text("share of query heads, rows of the query projection"))
    k: int | float | None = field(default=None, metadata=help_text("share of key-value heads, rows of the key projection"))
    v: int | float | None = field(default=None, metadata=help_text("share of key-value heads, rows of the value projection"))
    o: int | float | None = field(default=0.05, metadata=help_text("share of query heads, columns of the output projection"))
    up: int | float | None = field(default=None, metadata=help_text("share of FFN channels, rows of the up projection"))
    gate: int | float | None = field(default=None, metadata=help_text("share of FFN channels, rows of the gate projection"))
    down: int | float | None = field(default=0.02, metadata=help_text("share of FFN channels, columns of the down projection"))
    select: str = field(default="random", metadata=help_text("what units are ranked by"))
    largest: bool = field(default=False, metadata=help_text("take the largest norms"))
    seed: int = field(default=0, metadata=help_text("of the random draw"))

    def __post_init__(self) -> None:
        if self.method is not None:
            raise ValueError(f"S2FTConfig: method={self.method!r}: give the shares, or use DeltaConfig(method=…)")
        self.method = self._s2ft().to_dict()
        super().__post_init__()

    def places(self, model: nn.Module) -> Selection:
        if self.target_modules is None:
            return super().places(model)
        exclude, chosen = self.left_alone(model), dict[str, Entries]()
        roles, others = split(model, self)
        if roles:
            chosen |= units(model, roles, self._s2ft(), self.probe, exclude)
        for path in others:
            chosen |= columns(path, model.get_submodule(path), self._share_of_columns(path), self.seed, exclude)
        return Selection(chosen)

    def _share_of_columns(self, path: str) -> float:
        """The share `down`, as it applies to a linear layer that is no projection."""
        what = f"target_modules: {path} is no projection of a transformer"
        if not isinstance(self.down, float):
            raise ValueError(f"{what}; give its share of columns as a float down=…")
        if self.select != "random":
            raise ValueError(f"{what}; only select='random' works there")
        return self.down

    def _s2ft(self) -> S2FT:
        return S2FT(**{f.name: getattr(self, f.name) for f in dataclasses.fields(S2FT)})
