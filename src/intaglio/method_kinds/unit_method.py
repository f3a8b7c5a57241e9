"""Methods that choose whole attention heads and FFN channels, the same number in every layer, once, before training."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.budget import largest_remainder, resolve_budget
from ..core.entries import Slices
from ..core.probe import Probe
from ..core.scores import stable_seed
from ..core.selection import Selection
from ..model.calibration import STRUCTURES
from ..model.families import ROLES
from ..model.structure import Layer, describe, refuse_shared
from . import fields
from .method import NOTHING, Method

__all__ = ["Unit", "UnitMethod"]

Unit = tuple[str, str]  # (layer name, structure), the key under which a layer's units of one kind are held
_COUNTED = {"channels": "FFN channels", "heads": "query heads", "kv_heads": "key-value heads"}


@dataclass(frozen=True)
class UnitMethod(Method):
    """A method that says how heads and channels rank; quotas, free units and slices are found here.

    Each projection has its own share: a float of the units that are not excluded, an int for units in all layers together,
    None for frozen. The total of a projection is spread over the layers by largest remainder, so that two layers never differ
    by more than one unit; which layers get the odd unit is drawn from `seed`. Projections of one structure (up, gate and down;
    q and o; k and v) take their units from one ranking, so that the smaller set lies inside the larger.

    Args:
        q, k, v, o: shares of the rows of query, key and value projections, and of the columns of the output projection.
        up, gate, down: shares of the rows of up and gate projections, and of the columns of the down projection.
        seed: the same seed gives the same units on every machine, rank and call order; default 0.
    """

    q: int | float | None = None
    k: int | float | None = None
    v: int | float | None = None
    o: int | float | None = 0.05
    up: int | float | None = None
    gate: int | float | None = None
    down: int | float | None = 0.02
    seed: int = 0

    @abstractmethod
    def scores(
        self, model: nn.Module, layers: list[Layer], structures: Collection[str], probe: Probe | None
    ) -> Mapping[Unit, Tensor]:
        """Score of each unit, `[units]`, by layer and structure (of `model.calibration.STRUCTURES`); higher is chosen first.

        Args:
            model: at its current weights.
            layers: its layers.
            structures: those that are wanted.
            probe: data, where `needs_probe`.
        """

    def rank(
        self, model: nn.Module, layers: list[Layer], free: Mapping[Unit, list[int]], probe: Probe | None
    ) -> dict[Unit, list[int]]:
        """The free units of each layer and structure, best first; of equal ones the first."""
        if self.needs_probe and probe is None:
            raise ValueError(f"{self}: looks at data: give a probe, e.g. probe=Batches([batch, ...])")
        scores = self.scores(model, layers, self.structures, probe)
        return {key: sorted(units, key=lambda unit: (-float(scores[key][unit]), unit)) for key, units in free.items()}

    @property
    def roles(self) -> list[str]:
        """The projections that are trained."""
        return [role for role in ROLES if getattr(self, role) is not None]

    @property
    def structures(self) -> list[str]:
        """The kinds of units that are trained."""
        return [name for name, (_, roles) in STRUCTURES.items() if set(roles) & set(self.roles)]

    def selectable(self, model: nn.Module) -> set[str]:
        layers = describe(model)
        self._refuse_missing(layers)
        return {layer.projections[role].parameter for layer in layers for role in self.roles}

    def choose(self, model: nn.Module, probe: Probe | None = None, exclude: Selection = NOTHING) -> Selection:
        layers = describe(model)
        refuse_shared(model, layers)
        self._refuse_missing(layers)
        free = {(layer.name, kind): self._free(layer, kind, exclude) for layer in layers for kind in self.structures}
        quotas = {role: self._quotas(role, layers, free) for role in self.roles}
        ranks = self.rank(model, layers, free, probe)
        chosen = Selection()
        for role in self.roles:
            for layer, quota in zip(layers, quotas[role], strict=True):
                projection, units = layer.projections[role], ranks[layer.name, _structure(role)][:quota]
                if units:
                    index = projection.index(torch.tensor(units))
                    chosen = chosen.union({projection.parameter: Slices(projection.shape, projection.dim, index)})
        return Selection({name: chosen[name] for name, _ in model.named_parameters() if name in chosen})

    def _problems(self) -> list[str]:
        problems = [p for role in ROLES for p in fields.share(role, getattr(self, role), "units", none="frozen")]
        if not self.roles:
            problems.append(f"no projection is trained; give a share to at least one of {', '.join(ROLES)}")
        return problems

    def _refuse_missing(self, layers: list[Layer]) -> None:
        kind = type(self).__name__
        for layer in layers:
            missing = [role for role in self.roles if role not in layer.projections]
            if missing:
                why = f": {layer.unread}" if layer.unread and not {"q", "k", "v", "o"}.isdisjoint(missing) else ""
                raise ValueError(
                    f"{kind}: {layer.name} has no {', '.join(missing)} projection{why}; it has {', '.join(layer.projections)}: "
                    f"give shares to what every layer has, and None to the rest (e.g. {missing[0]}=None)"
                )

    def _free(self, layer: Layer, structure: str, exclude: Selection) -> list[int]:
        """Units of a layer of which no trained position is excluded."""
        projections = [layer.projections[role] for role in self.roles if _structure(role) == structure]
        taken: set[int] = set()
        for projection in projections:
            if projection.parameter in exclude:
                taken |= set(projection.owners(exclude[projection.parameter].positions(projection.dim)).tolist())
        return [unit for unit in range(projections[0].units) if unit not in taken]

    def _quotas(self, role: str, layers: list[Layer], free: Mapping[Unit, list[int]]) -> list[int]:
        """Units of a projection in each layer."""
        structure, kind = _structure(role), type(self).__name__
        capacity = [len(free[layer.name, structure]) for layer in layers]
        total = resolve_budget(getattr(self, role), sum(capacity), name=f"{kind}.{role}", unit=_COUNTED[structure])
        return largest_remainder(total, capacity, random.Random(stable_seed(self.seed, structure)))


def _structure(role: str) -> str:
    return next(name for name, (_, roles) in STRUCTURES.items() if role in roles)
