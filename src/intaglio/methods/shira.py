"""The same share of every matrix, scattered: sparse adapters of high rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, final

from torch import Tensor, nn

from ..core import scores
from ..core.budget import largest_remainder, resolve_budget, top_k
from ..core.probe import Probe
from ..core.selection import Selection
from ..method_kinds import fields
from ..method_kinds.entry_method import EntryMethod
from ..method_kinds.method import matching
from ..model.calibration import gradient_means
from ..model.structure import layer_matrices

__all__ = ["SHiRA"]

Mask = Literal["random", "magnitude", "gradient", "snip"]


@final
@dataclass(frozen=True)
class SHiRA(EntryMethod):
    """Train the same share of the entries of every target matrix, fixed before training.

    Targets are the matrices of the layers: attention and FFN projections, experts (all of a layer in one weight count as
    one matrix), routers. The paper adapts linear projections (query, key, value, up and down), never norms or biases,
    and neither embeddings nor the output head; as every matrix has its own share, more targets do not compete with them.

    Args:
        budget: entries of all targets together (int) or share of them (float in (0, 1]); default 0.01; the paper takes
            1 to 2 %. The total is spread over the targets in proportion to their entries, by largest remainder.
        mask: what the entries of a matrix are ranked by, largest first; default "magnitude". "random": nothing, drawn
            from `seed`; "magnitude": |w|; "gradient": the mean of |g| over the examples of a probe; "snip": |w| times
            that. The last two need a `probe`, a backward pass per example, and 4 bytes per entry of the targets.
        include: shell patterns of the matrices to target, wherever they are; default (), those of the layers. What
            they match beside matrices stays frozen.
        exclude: shell patterns of parameter names that are left alone; default none.
        seed: of mask="random"; the same seed gives the same entries on every machine, rank and call order; default 0.

    Raises:
        ValueError: for a field out of range, a seed without effect; at attach, without a probe where one is needed, for a
            budget outside the targets, a pattern that matches nothing, no matrix at all, gradients that are not finite.

    Example:
        >>> SHiRA(budget=0.02, mask="snip", include=("*.q_proj.weight", "*.v_proj.weight")).needs_probe
        True

    Paper: arXiv 2406.13175, sections 3.1 and B; its masks WM, Rand, Grad and SNIP.

    Differences: no Struct mask; an exact total, where a random mask was drawn entry by entry; the gradient is averaged in
    magnitude, example by example (the paper does not say how); output projections and gates are targets too; exact under
    ties (by offset). Trained through compact values: no dense gradient mask, no dense copy of a weight.
    """

    name = "shira"
    summary = "scattered entries, the same share of every matrix"

    budget: int | float = 0.01
    mask: Mask = "magnitude"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    seed: int = 0

    @property
    def needs_probe(self) -> bool:
        return self.mask in ("gradient", "snip")

    def targets(self, model: nn.Module) -> dict[str, nn.Parameter]:
        matrices = {name: w for name, w in matching(model, self.include or ("*",), self.exclude).items() if w.dim() >= 2}
        if not self.include:
            inside = layer_matrices(model)
            matrices = {name: weight for name, weight in matrices.items() if name in inside}
        if not matrices:
            raise ValueError(f"SHiRA: no matrix to target in {type(model).__name__}; name matrices with include, exclude fewer")
        return matrices

    def scores(self, model: nn.Module, weights: Mapping[str, nn.Parameter], probe: Probe | None) -> Iterator[tuple[str, Tensor]]:
        if probe is None or not self.needs_probe:
            yield from ((name, self._score(name, weight)) for name, weight in weights.items())
            return
        for name, size in gradient_means(model, weights, probe, scores.gradient).items():
            yield name, scores.snip(weights[name], size) if self.mask == "snip" else size

    def spend(self, scores: Iterator[tuple[str, Tensor]], free: Mapping[str, int]) -> Selection:
        counts = largest_remainder(resolve_budget(self.budget, sum(free.values())), list(free.values()))
        quotas = dict(zip(free, counts, strict=True))
        chosen = Selection()
        for name, score in scores:
            chosen = chosen.union(top_k([(name, score)], quotas[name])) if quotas[name] else chosen
        return chosen

    def _score(self, name: str, weight: Tensor) -> Tensor:
        if self.mask == "random":
            return scores.random(tuple(weight.shape), seed=self.seed, key=name)
        return scores.magnitude(weight)

    def _problems(self) -> list[str]:
        problems = super()._problems() + fields.choice("mask", self.mask, Mask)
        if not problems and self.seed != 0 and self.mask != "random":
            problems.append(f"seed={self.seed} has no effect with mask={self.mask!r}; drop it")
        return problems
