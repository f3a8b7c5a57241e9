"""Entries chosen by how much the model's answers on data depend on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import final

from torch import Tensor, nn

from ..core import scores
from ..core.probe import Probe
from ..method_kinds import fields
from ..method_kinds.entry_method import EntryMethod
from ..model.calibration import gradient_means

__all__ = ["FishMask"]


@final
@dataclass(frozen=True)
class FishMask(EntryMethod):
    """Train the `budget` entries of largest Fisher information, fixed before training.

    The diagonal of the empirical Fisher information, from the gradient g of the loss of each of n examples of a probe:

        F̂ = 1/n · Σ g²

    The price, before training: a forward and a backward pass per example, and 4 bytes per candidate beside the model (as
    much again for an fp32 model, twice as much for bf16). Where that is too much, include less.

    Args:
        budget: entries (int) or share of the candidates (float in (0, 1]); default 0.005, the paper's.
        samples: examples to look at, the first of the probe; default None, all of them. In a run file the probe holds
            `data.calibration` examples. The authors' scripts take 1,024 on GLUE, 256 on CIFAR-10.
        include: shell patterns of parameter names; default all.
        exclude: shell patterns of parameter names that are left alone; default none.

    Raises:
        ValueError: for a field out of range; at attach, without a probe, for a budget outside the candidates, a pattern
            that matches nothing, fewer than `samples` examples with labels, or gradients that are not finite.

    Example:
        >>> FishMask(budget=0.001, exclude=("*embed*",)).needs_probe
        True

    Paper: FISH Mask, arXiv 2111.09839, section 3.

    Differences: a classifier is a candidate like all else, where the authors train it whole, inside the budget; sums in
    fp32 whatever the model's type; exact under ties (tensor order, then offset); rows without labels do not count; the loss
    of a language model is the mean over an example's labels, so that a long example weighs as much as a short one.
    """

    name = "fishmask"
    summary = "scattered entries of largest Fisher information"

    budget: int | float = 0.005
    samples: int | None = None
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    @property
    def needs_probe(self) -> bool:
        return True

    def scores(self, model: nn.Module, weights: Mapping[str, nn.Parameter], probe: Probe | None) -> Iterator[tuple[str, Tensor]]:
        assert probe is not None
        yield from gradient_means(model, weights, probe, scores.fisher, samples=self.samples).items()

    def _problems(self) -> list[str]:
        return super()._problems() + fields.count("samples", self.samples, "number of examples", none="all")
