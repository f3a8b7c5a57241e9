"""S2FT: whole attention heads and FFN channels, chosen once, trained with partial back-propagation."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, final

from torch import Tensor, nn

from ..core.probe import Probe
from ..core.scores import stable_seed
from ..method_kinds import fields
from ..method_kinds.unit_method import Unit, UnitMethod
from ..model import calibration
from ..model.structure import Layer

__all__ = ["S2FT"]

Strategy = Literal["random", "weight", "activation", "product", "gradient"]


@final
@dataclass(frozen=True)
class S2FT(UnitMethod):
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

    select: Strategy = "random"
    largest: bool = False

    @property
    def needs_probe(self) -> bool:
        return self.select in ("activation", "product", "gradient")

    def rank(
        self, model: nn.Module, layers: list[Layer], free: Mapping[Unit, list[int]], probe: Probe | None
    ) -> dict[Unit, list[int]]:
        if self.select == "random":  # in a way that other layers and structures have no part in
            return {
                (layer, structure): random.Random(stable_seed(self.seed, f"{structure}/{layer}")).sample(units, len(units))
                for (layer, structure), units in free.items()
            }
        return super().rank(model, layers, free, probe)

    def scores(
        self, model: nn.Module, layers: list[Layer], structures: Collection[str], probe: Probe | None
    ) -> Mapping[Unit, Tensor]:
        sign = 1 if self.largest else -1
        return {key: sign * norm for key, norm in self._norms(model, layers, structures, probe).items()}

    def _norms(
        self, model: nn.Module, layers: list[Layer], structures: Collection[str], probe: Probe | None
    ) -> calibration.Norms:
        if self.select == "weight":
            return calibration.weight_norms(model, layers, structures)
        assert probe is not None  # `rank` has asked for it
        if self.select == "gradient":
            return calibration.gradient_norms(model, layers, probe, structures)
        norms = calibration.activation_norms(model, layers, probe, structures)
        if self.select == "activation":
            return norms
        weights = calibration.weight_norms(model, layers, structures)
        return {key: norm * weights[key].cpu() for key, norm in norms.items()}

    def _problems(self) -> list[str]:
        problems = super()._problems() + fields.choice("select", self.select, Strategy)
        if self.largest and self.select == "random":
            problems.append("largest=True has no effect with select='random'; name what to rank by")
        return problems
