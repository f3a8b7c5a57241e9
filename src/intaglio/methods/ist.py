"""IST: a few layers at a time, drawn by an importance that is learned from damping them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from ..method_kinds import fields
from ..method_kinds.layer_method import Law, LayerMethod, count_of, draw

__all__ = ["IST"]

Reward = Literal["normalised", "faithful"]
_RATES: dict[str, float] = {"normalised": 0.2, "faithful": 10.0}
_TIE = 1e-6  # losses that differ by less are equal: what fp32 rounds must not be blown up to a lesson
_TRIES = 100  # draws of a set that repeats an earlier one


@final
@dataclass(frozen=True)
class IST(LayerMethod):
    """Train a few layers at a time, important ones more often.

    Before every update `layers` of the L layers are drawn, with weights p_i = sigmoid(I_i). After every `interval` updates
    importance I is learned: `candidates` distinct sets S_k of `suppressed` layers are drawn, unimportant ones more often
    (weights sigmoid(−I)); what these layers add to the base, y = base + β (tuned − base), is damped by β = `suppression`,
    and the loss l_k of one batch is taken without a gradient. With advantages a_k and p as before the update

        I_i ← I_i − rate · Σ_k a_k · p_i · (1 − p_i) · [i ∈ S_k]

    so that a layer whose damping costs more than that of others rises.

    Args:
        layers: layers that train at a time, a count (int) or a share (float; rounded down, at least 1); default 0.25.
        suppressed: layers damped in one candidate, likewise; default 0.5.
        candidates: sets per probe, at least 2; as many as there are distinct ones, where that is less; default 3.
        suppression: β in [0, 1); default 0.25.
        interval: updates between probes; default 10. A probe costs `candidates` forward passes of its batch.
        rate: step size of I, ≥ 0; default None: 0.2 for "normalised", 10 for "faithful". 0 learns nothing: `RST`.
        law: how layers are drawn, "uniform" (the largest of one number per layer, uniform on (0, p_i)) or "multinomial"
            (one by one without replacement); default "uniform".
        reward: "normalised": a_k = (mean l − l_k) / std l, the same at any level of the loss; "faithful":
            a_k = exp(−l_k) − mean exp(−l). Default "normalised".
        both_ways: whether layers outside S_k move too, the other way; default None: for "normalised" they do.
        floor: share of the draws that are made without regard to importance, in [0, 1], so that under policy "any" no layer
            has less than this share of its equal chance, `layers` / L; default 0.1.
        of, state, idle_dropout, policy, redraw, seed: see `LayerMethod`.

    Raises:
        ValueError: for a field outside its range; at attach, where the model has no adapter and `of` is not given, where it
            has fewer layers than asked, or only one set of layers that could be damped (nothing to compare).

    Example:
        >>> IST(layers=8, of=None).active_count(32)
        8

    Paper: arXiv 2410.11772 (Findings of EMNLP 2024).

    Defaults: on planted problems (32 layers, 8 active, 16 damped, 3 candidates, exponential costs) at loss 3, a truly
    important layer is trained in 0.43, 0.55 and 0.54 of the updates after 30, 100 and 300 probes; by the authors' rule in
    0.25, 0.26 and 0.27, no more than by chance (0.25). Both rank the layers alike (Spearman 0.96 and 0.95 after 300).

    Differences from the authors' code, whose rule is `IST(law="multinomial", reward="faithful", floor=0.0)`: importance has
    the opposite sign of their score, so that higher is more important; draws come from a private generator; a loss that is
    not finite teaches nothing; a set is not redrawn for ever; what is damped is the response of the trained tensors,
    whatever their kind, where theirs multiplies an attribute called `scaling`.
    """

    name = "ist"
    summary = "a few layers at a time, by learned importance: any adapter's, or another method's"

    layers: int | float = 0.25
    suppressed: int | float = 0.5
    candidates: int = 3
    suppression: int | float = 0.25
    interval: int = 10
    rate: int | float | None = None
    law: Law = "uniform"
    reward: Reward = "normalised"
    both_ways: bool | None = None
    floor: int | float = 0.1

    def _problems(self) -> list[str]:
        problems = super()._problems() + fields.share("suppressed", self.suppressed, "layers")
        problems += fields.count("candidates", self.candidates, least=2) + fields.count("interval", self.interval)
        below_one = math.nextafter(1.0, 0.0)
        problems += fields.number("suppression", self.suppression, "a factor of at least 0 and below 1", low=0.0, high=below_one)
        problems += fields.number("rate", self.rate, "a finite number of at least 0", low=0.0, none="that of the reward")
        problems += fields.number("floor", self.floor, "a share between 0 and 1", low=0.0, high=1.0)
        return problems + fields.choice("law", self.law, Law) + fields.choice("reward", self.reward, Reward)

    @property
    def learns(self) -> bool:
        return self.rate != 0

    @property
    def damping(self) -> float:
        return float(self.suppression)

    def check(self, layer_count: int) -> None:
        super().check(layer_count)
        count = self.suppressed_count(layer_count)
        if self.learns and math.comb(layer_count, count) < 2:
            raise ValueError(
                f"IST.suppressed={self.suppressed}: of {layer_count} layers there is one set of {count}, so that no two can be "
                f"compared; {'damp fewer' if layer_count > 1 else 'a model of one layer has nothing to choose: use RST'}"
            )

    def suppressed_count(self, layer_count: int) -> int:
        """Number of layers that are damped in one candidate, of so many."""
        return count_of("IST.suppressed", self.suppressed, layer_count)

    def probes_at(self, step: int) -> bool:
        return self.learns and step > 0 and step % self.interval == 0

    def weights(self, importance: Tensor) -> Tensor:
        return importance.sigmoid()

    def suppressed_sets(self, importance: Tensor, generator: torch.Generator) -> list[list[int]]:
        total = importance.numel()
        count = self.suppressed_count(total)
        wanted = min(self.candidates, math.comb(total, count))
        sets: list[list[int]] = []
        for attempt in range(2 * _TRIES):
            if len(sets) == wanted:
                return sets
            # Under extreme weights one set comes again and again: then importance no longer counts.
            weights = (-importance).sigmoid() if attempt < _TRIES else torch.ones_like(importance)
            drawn = draw(weights, count, "multinomial", generator)
            if drawn not in sets:
                sets.append(drawn)
        every = (list(places) for places in itertools.combinations(range(total), count))
        return sets + list(itertools.islice((places for places in every if places not in sets), wanted - len(sets)))

    def learn(self, importance: Tensor, sets: Sequence[Sequence[int]], losses: Sequence[float]) -> Tensor:
        if not all(math.isfinite(loss) for loss in losses):
            return importance.clone()
        p = importance.sigmoid()
        step = self._rate * p * (1 - p)
        both = self.reward == "normalised" if self.both_ways is None else self.both_ways
        learned = importance.clone()
        for places, advantage in zip(sets, self._advantages(losses), strict=True):
            sign = torch.full_like(importance, -1.0 if both else 0.0)
            sign[list(places)] = 1.0
            learned -= advantage * step * sign
        return learned

    def _advantages(self, losses: Sequence[float]) -> list[float]:
        """How much better each candidate is than the mean of them."""
        if self.reward == "faithful":
            rewards = [math.exp(-loss) for loss in losses]
            return [reward - math.fsum(rewards) / len(rewards) for reward in rewards]
        least = min(losses)
        gaps = [loss - least for loss in losses]  # differences of near numbers are exact: any level of the loss is the same
        if max(gaps) < _TIE:
            return [0.0] * len(gaps)
        mean = math.fsum(gaps) / len(gaps)
        spread = math.sqrt(math.fsum((gap - mean) ** 2 for gap in gaps) / len(gaps))
        return [(mean - gap) / spread for gap in gaps]

    @property
    def _rate(self) -> float:
        return _RATES[self.reward] if self.rate is None else self.rate

    @property
    def _law(self) -> Law:
        return self.law

    @property
    def _floor(self) -> float:
        return self.floor
