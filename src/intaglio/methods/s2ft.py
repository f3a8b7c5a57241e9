"""S2FT: whole attention heads and FFN channels, chosen once, trained with partial back-propagation."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from ..budget import resolve_budget
from ..method import Method, Probe, State, refuse
from ..scores import stable_seed
from ..selection import Entries, Selection, Slices
from ..structure import ROLES, Layer, describe

__all__ = ["S2FT"]

# Units are shared by the roles of a structure: one set of channels per FFN, of query heads and of key-value heads.
_STRUCTURE = {
    "q": "heads",
    "o": "heads",
    "k": "kv_heads",
    "v": "kv_heads",
    "up": "channels",
    "gate": "channels",
    "down": "channels",
}


@final
@dataclass(frozen=True)
class S2FT(Method):
    """Train randomly chosen FFN channels and attention heads, the same number in every layer.

    In each layer the columns of `down` that read the chosen channels, and the columns of `o` that read the chosen
    heads, are trained; everything else is frozen. A projection y = x Wᵀ then keeps only x[..., idx] for backward:

        ∂L/∂W[:, idx] = (∂L/∂y)ᵀ x[..., idx]

    Args:
        channels: share of the FFN channels (float in (0, 1]) or channels in all (int); None for no FFN; default 0.02.
        heads: share of the attention heads or heads in all, likewise; None for no attention; default 0.05.
        targets: the projections trained, of "q", "k", "v", "o", "up", "gate", "down"; default ("o", "down").
        seed: the same seed gives the same units on every machine, rank and call order; default 0.

    The total is spread over the layers by largest remainder, so that two layers never differ by more than one unit;
    which layers get the odd unit is drawn from `seed`.

    Raises:
        ValueError: for a share outside (0, 1] or one that rounds to nothing, an unknown target, a target without its
            share; at attach, where the model has no such projection.

    Example:
        >>> S2FT(channels=0.03, heads=None, targets=("down",)).to_dict()["targets"]
        ['down']

    Paper: arXiv 2412.06289, sections 3.2 and 3.3 (S2FT-R). Defaults follow its LLaMA-7B allocation.

    Differences: index form, without permuting the base (same function and gradients, and grouped-query attention
    needs no special case); the quota is equal per layer, where the authors draw once over all layers; the columns of
    o and down are trained, where their efficiency code trains rows.
    """

    name = "s2ft"
    summary = "attention heads and FFN channels, dense inside each layer"

    channels: int | float | None = 0.02
    heads: int | float | None = 0.05
    targets: tuple[str, ...] = ("o", "down")
    seed: int = 0

    def __post_init__(self) -> None:
        problems = [f"targets: unknown {t!r}; known are {', '.join(ROLES)}" for t in self.targets if t not in ROLES]
        if len(set(self.targets)) < len(self.targets) or not self.targets:
            problems.append(f"targets={self.targets!r}: give at least one projection, each once")
        problems += self._share_problems("channels", self.channels, {"up", "gate", "down"})
        problems += self._share_problems("heads", self.heads, {"q", "k", "v", "o"})
        refuse("S2FT", problems)

    def candidates(self, model: nn.Module) -> set[str]:
        return {layer.projections[t].parameter for layer in describe(model) for t in self._targets(layer)}

    def select(
        self, state: State, model: nn.Module, step: int, probe: Probe | None, exclude: Selection
    ) -> tuple[Selection, State]:
        layers = describe(model)
        chosen: dict[str, Entries] = {}
        for structure, budget in (("channels", self.channels), ("heads", self.heads), ("kv_heads", self.heads)):
            roles = [t for t in self.targets if _STRUCTURE[t] == structure]
            free = [self._free_units(layer, roles, exclude) for layer in layers] if roles else []
            for layer, units in zip(layers, self._draw(layers, free, budget, structure), strict=False):
                _add(chosen, layer, roles, units)
        return Selection({name: chosen[name] for name, _ in model.named_parameters() if name in chosen}), state

    def _share_problems(self, field: str, share: int | float | None, roles: set[str]) -> list[str]:
        wanted = roles & set(self.targets)
        if share is None:
            return [f"{field}=None but targets name {', '.join(sorted(wanted))}"] if wanted else []
        if isinstance(share, bool) or not isinstance(share, (int, float)):
            return [f"{field}={share!r}: give a share in (0, 1], a whole number, or None"]
        if share <= 0 or (isinstance(share, float) and not share <= 1):
            return [f"{field}={share}: a share must be above 0 and at most 1.0 (None for none)"]
        if not wanted and share != type(self).__dataclass_fields__[field].default:
            return [f"{field}={share} has no effect: no target among {', '.join(sorted(roles))}"]
        return []

    def _targets(self, layer: Layer) -> tuple[str, ...]:
        missing = [t for t in self.targets if t not in layer.projections]
        if missing:
            raise ValueError(
                f"targets: {layer.name} has no {', '.join(missing)} projection; it has {', '.join(layer.projections)}"
            )
        return self.targets

    def _free_units(self, layer: Layer, roles: list[str], exclude: Selection) -> list[int]:
        """Units of a layer of which no target position is excluded."""
        self._targets(layer)
        taken: set[int] = set()
        for projection in (layer.projections[role] for role in roles):
            if projection.parameter in exclude:
                taken |= set(projection.owners(_positions(exclude[projection.parameter], projection.dim)).tolist())
        return [unit for unit in range(layer.projections[roles[0]].units) if unit not in taken]

    def _draw(self, layers: list[Layer], free: list[list[int]], budget: int | float | None, structure: str) -> list[Tensor]:
        if not free:
            return []
        assert budget is not None  # __post_init__ refuses a target without its share
        field = "channels" if structure == "channels" else "heads"
        total = resolve_budget(budget, sum(map(len, free)), name=f"S2FT.{field}")
        quotas = _quotas([len(units) for units in free], total, random.Random(stable_seed(self.seed, structure)))
        draws = []
        for layer, units, quota in zip(layers, free, quotas, strict=True):
            generator = random.Random(stable_seed(self.seed, f"{structure}/{layer.name}"))
            draws.append(torch.tensor(sorted(generator.sample(units, quota)), dtype=torch.int64))
        return draws


def _quotas(capacity: list[int], total: int, generator: random.Random) -> list[int]:
    """Split `total` in proportion to `capacity` by largest remainder; equal remainders are drawn."""
    shares = [total * c / sum(capacity) for c in capacity]
    quotas = [math.floor(share) for share in shares]
    order = sorted(range(len(shares)), key=lambda i: (quotas[i] - shares[i], generator.random()))
    for i in order[: total - sum(quotas)]:
        quotas[i] += 1
    return quotas


def _positions(entries: Entries, dim: int) -> Tensor:
    """Positions along `dim` that hold any of `entries`."""
    if isinstance(entries, Slices) and entries.dim == dim:
        return entries.index.cpu()
    return torch.unravel_index(entries.flat(), entries.shape)[dim].unique()


def _add(chosen: dict[str, Entries], layer: Layer, roles: list[str], units: Tensor) -> None:
    """Add the slices of `units` for each role; roles of one fused weight are joined."""
    if units.numel() == 0:
        return
    fresh: Mapping[str, Entries]
    for projection in (layer.projections[role] for role in roles):
        fresh = {projection.parameter: Slices(projection.shape, projection.dim, projection.index(units))}
        merged = Selection({k: v for k, v in chosen.items() if k in fresh}).union(fresh)
        chosen.update(merged)
