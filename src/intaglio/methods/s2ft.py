"""S2FT: whole attention heads and FFN channels, chosen once, trained with partial back-propagation."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor, nn

from ..core.budget import resolve_budget
from ..core.probe import Probe
from ..core.scores import stable_seed
from ..core.selection import Entries, Selection, Slices
from ..method_kinds import fields
from ..method_kinds.method import Method, State
from ..model import calibration
from ..model.calibration import STRUCTURES
from ..model.families import ROLES
from ..model.structure import Layer, describe, refuse_shared

__all__ = ["S2FT"]

Strategy = Literal["random", "weight", "activation", "product", "gradient"]
_UNITS = {"channels": "FFN channels", "heads": "query heads", "kv_heads": "key-value heads"}
_ON_DATA = ("activation", "product", "gradient")


@final
@dataclass(frozen=True)
class S2FT(Method):
    """Train whole FFN channels and attention heads, the same number in every layer.

    In each layer the columns of `down` that read the chosen channels, and the columns of `o` that read the chosen
    heads, are trained; everything else is frozen. A projection y = x Wᵀ then keeps only x[..., idx] for backward:

        ∂L/∂W[:, idx] = (∂L/∂y)ᵀ x[..., idx]

    Each projection has its own share: a float of the units that are not excluded, an int for units in all layers together,
    None for frozen.

    Args:
        q: share of the query heads whose rows of the query projection are trained; default None.
        k: share of the key-value heads, rows of the key projection; default None.
        v: share of the key-value heads, rows of the value projection; default None.
        o: share of the query heads, columns of the output projection; default 0.05.
        up: share of the FFN channels, rows of the up projection; default None.
        gate: share of the FFN channels, rows of the gate projection; default None.
        down: share of the FFN channels, columns of the down projection; default 0.02.
        select: what the units of a layer are ranked by; default "random". "weight": L2 norm of the columns of o or down
            that read the unit; "activation": L2 norm of the inputs of o or down over a calibration set; "product": one
            times the other; "gradient": root of the squared gradients of those columns, summed over examples. The last
            three need a `probe`.
        largest: take the units of largest instead of smallest norm; default False. The paper's best is the smallest
            activation.
        seed: the same seed gives the same units on every machine, rank and call order; default 0.

    The total of a projection is spread over the layers by largest remainder, so that two layers never differ by more
    than one unit; which layers get the odd unit is drawn from `seed`. Projections of one structure (up, gate and down;
    q and o; k and v) take their units from one ranking, so that the smaller set lies inside the larger.

    Raises:
        ValueError: for a share outside (0, 1], an unknown strategy, no projection at all; at attach, where the model has
            no such projection, a share rounds to nothing, or data is needed and there is none.

    Example:
        >>> S2FT(o=None, down=0.03, select="activation").needs_probe
        True

    Paper: arXiv 2412.06289, sections 3.2, 3.3 and 5.4. Defaults follow its LLaMA-7B allocation.

    Differences: index form unless `attach(permute=True)` (same function and gradients, and grouped-query attention needs
    no special case); the quota is equal per layer, where the authors draw once over all layers; the columns of o and
    down are trained, where their efficiency code trains rows; the strategies, for which they released no code.
    """

    name = "s2ft"
    summary = "attention heads and FFN channels, dense inside each layer"

    q: int | float | None = None
    k: int | float | None = None
    v: int | float | None = None
    o: int | float | None = 0.05
    up: int | float | None = None
    gate: int | float | None = None
    down: int | float | None = 0.02
    select: Strategy = "random"
    largest: bool = False
    seed: int = 0

    def _problems(self) -> list[str]:
        problems = [p for role in ROLES for p in fields.share(role, getattr(self, role), "units", none="frozen")]
        if not self._roles:
            problems.append(f"no projection is trained; give a share to at least one of {', '.join(ROLES)}")
        problems += fields.choice("select", self.select, Strategy)
        if self.largest and self.select == "random":
            problems.append("largest=True has no effect with select='random'; name what to rank by")
        return problems

    @property
    def needs_probe(self) -> bool:
        return self.select in _ON_DATA

    def selectable(self, model: nn.Module) -> set[str]:
        return {layer.projections[role].parameter for layer in describe(model) for role in self._roles_in(layer)}

    def choose(
        self, state: State, model: nn.Module, step: int, probe: Probe | None, exclude: Selection
    ) -> tuple[Selection, State]:
        layers = describe(model)
        refuse_shared(model, layers)
        free = {
            (layer.name, structure): self._free_units(layer, structure, exclude)
            for layer in layers
            for structure in self._structures
        }
        quotas = {role: self._quotas(role, layers, free) for role in self._roles}
        ranks = self._rank(model, layers, free, probe)
        chosen = Selection()
        for role in self._roles:
            for layer, quota in zip(layers, quotas[role], strict=True):
                chosen = chosen.union(_slices(layer, role, ranks[layer.name, _structure(role)][:quota]))
        return Selection({name: chosen[name] for name, _ in model.named_parameters() if name in chosen}), state

    @property
    def _roles(self) -> list[str]:
        return [role for role in ROLES if getattr(self, role) is not None]

    @property
    def _structures(self) -> list[str]:
        return [name for name, (_, roles) in STRUCTURES.items() if set(roles) & set(self._roles)]

    def _roles_in(self, layer: Layer) -> list[str]:
        missing = [role for role in self._roles if role not in layer.projections]
        if missing:
            raise ValueError(f"S2FT: {layer.name} has no {', '.join(missing)} projection; it has {', '.join(layer.projections)}")
        return self._roles

    def _free_units(self, layer: Layer, structure: str, exclude: Selection) -> list[int]:
        """Units of a layer of which no trained position is excluded."""
        projections = [layer.projections[role] for role in self._roles_in(layer) if _structure(role) == structure]
        taken: set[int] = set()
        for projection in projections:
            if projection.parameter in exclude:
                taken |= set(projection.owners(_positions(exclude[projection.parameter], projection.dim)).tolist())
        return [unit for unit in range(projections[0].units) if unit not in taken]

    def _quotas(self, role: str, layers: list[Layer], free: dict[tuple[str, str], list[int]]) -> list[int]:
        """Units of a projection in each layer."""
        structure = _structure(role)
        capacity = [len(free[layer.name, structure]) for layer in layers]
        total = resolve_budget(getattr(self, role), sum(capacity), name=f"S2FT.{role}", unit=_UNITS[structure])
        return _spread(total, capacity, random.Random(stable_seed(self.seed, structure)))

    def _rank(
        self, model: nn.Module, layers: list[Layer], free: dict[tuple[str, str], list[int]], probe: Probe | None
    ) -> dict[tuple[str, str], list[int]]:
        """The free units of each layer and structure, best first."""
        if self.select == "random":
            return {key: _shuffled(units, stable_seed(self.seed, f"{key[1]}/{key[0]}")) for key, units in free.items()}
        norms = self._norms(model, layers, probe)
        sign = -1 if self.largest else 1
        return {key: sorted(units, key=lambda u: (sign * float(norms[key][u]), u)) for key, units in free.items()}

    def _norms(self, model: nn.Module, layers: list[Layer], probe: Probe | None) -> calibration.Norms:
        if self.select == "weight":
            return calibration.weight_norms(model, layers, self._structures)
        if probe is None:
            raise ValueError(f"S2FT(select={self.select!r}) looks at data: give a probe, e.g. probe=Batches([batch, ...])")
        if self.select == "gradient":
            return calibration.gradient_norms(model, layers, probe, self._structures)
        norms = calibration.activation_norms(model, layers, probe, self._structures)
        if self.select == "product":
            weights = calibration.weight_norms(model, layers, self._structures)
            return {key: norm * weights[key].cpu() for key, norm in norms.items()}
        return norms


def _structure(role: str) -> str:
    return next(name for name, (_, roles) in STRUCTURES.items() if role in roles)


def _spread(total: int, capacity: list[int], generator: random.Random) -> list[int]:
    """Split `total` in proportion to `capacity` by largest remainder; equal remainders are drawn."""
    shares = [total * c / sum(capacity) for c in capacity]
    quotas = [math.floor(share) for share in shares]
    order = sorted(range(len(shares)), key=lambda i: (quotas[i] - shares[i], generator.random()))
    for i in order[: total - sum(quotas)]:
        quotas[i] += 1
    return quotas


def _shuffled(units: list[int], seed: int) -> list[int]:
    return random.Random(seed).sample(units, len(units))


def _positions(entries: Entries, dim: int) -> Tensor:
    """Positions along `dim` that hold any of `entries`."""
    if isinstance(entries, Slices) and entries.dim == dim:
        return entries.index.cpu()
    return torch.unravel_index(entries.flat(), entries.shape)[dim].unique()


def _slices(layer: Layer, role: str, units: list[int]) -> dict[str, Entries]:
    """The slices of some units of a layer, none for none."""
    projection = layer.projections[role]
    index = projection.index(torch.tensor(units, dtype=torch.int64))
    return {projection.parameter: Slices(projection.shape, projection.dim, index)} if units else {}
