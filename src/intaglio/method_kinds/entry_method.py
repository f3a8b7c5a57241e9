"""Methods that rank single entries once, before training."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from ..core.budget import resolve_budget, top_k, without
from ..core.probe import Probe
from ..core.selection import Selection
from . import fields
from .method import NOTHING, Method, matching

__all__ = ["EntryMethod", "ScoredMethod"]


class EntryMethod(Method):
    """A method that ranks single entries once, before training, and takes the best."""

    budget: int | float
    include: tuple[str, ...]
    exclude: tuple[str, ...]

    def _problems(self) -> list[str]:
        return fields.patterns(include=self.include, exclude=self.exclude) + fields.share("budget", self.budget)

    @abstractmethod
    def scores(self, model: nn.Module, weights: Mapping[str, nn.Parameter], probe: Probe | None) -> Iterator[tuple[str, Tensor]]:
        """Name and score of each of `weights` in order, in its shape; higher is chosen first. Started once the budget holds."""

    def targets(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters whose entries are ranked."""
        return matching(model, self.include, self.exclude)

    def spend(self, scores: Iterator[tuple[str, Tensor]], free: Mapping[str, int]) -> Selection:
        """Turn scores into a selection; `free` holds how many entries of each parameter may be chosen."""
        return top_k(scores, resolve_budget(self.budget, sum(free.values())))

    def selectable(self, model: nn.Module) -> set[str]:
        return set(self.targets(model))

    def choose(self, model: nn.Module, probe: Probe | None = None, exclude: Selection = NOTHING) -> Selection:
        if self.needs_probe and probe is None:
            raise ValueError(f"{self}: looks at data: give a probe, e.g. probe=Batches([batch, ...])")
        weights = {name: p for name, p in self.targets(model).items() if name not in exclude or exclude[name].count < p.numel()}
        excluded = {name: entries.flat() for name, entries in exclude.items() if name in weights}
        free = {name: weight.numel() - len(excluded.get(name, ())) for name, weight in weights.items()}
        return self.spend(without(self.scores(model, weights, probe), excluded), free)


class ScoredMethod(EntryMethod):
    """The level most entry methods live on: a score of the weight alone, free of data."""

    @abstractmethod
    def score(self, name: str, weight: Tensor) -> Tensor:
        """Score of each entry, fp32 of `weight`'s shape; higher is chosen first."""

    def scores(self, model: nn.Module, weights: Mapping[str, nn.Parameter], probe: Probe | None) -> Iterator[tuple[str, Tensor]]:
        for name, weight in weights.items():
            yield name, self.score(name, weight)
