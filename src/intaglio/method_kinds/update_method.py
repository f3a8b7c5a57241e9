"""Methods that choose single entries at every update, by that update's gradient.

The method says what an entry's score is and how many entries are granted when; `training.unmasking` applies it to gradients
as they are formed.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.budget import resolve_budget, top_k
from ..core.probe import Probe
from ..core.selection import Selection
from . import fields
from .method import NOTHING, Method, matching

__all__ = ["Share", "UpdateMethod"]


@dataclass(frozen=True)
class Share:
    """Parameters that compete for one part of the budget.

    Attributes:
        free: parameter name → entries that may be chosen.
        budget: how many of them, in all.
    """

    free: Mapping[str, int]
    budget: int


class UpdateMethod(Method):
    """A method that chooses entries at each update: the best scores of its gradient, over all candidates together."""

    budget: int | float
    include: tuple[str, ...]
    exclude: tuple[str, ...]

    def _problems(self) -> list[str]:
        return fields.patterns(include=self.include, exclude=self.exclude) + fields.share("budget", self.budget)

    @abstractmethod
    def score(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """Score of each entry, fp32, ≥ 0, and 0 where the gradient is 0; called on chunks of any shape."""

    def least_gradient(self, score: float) -> float:
        """The least |gradient| that any weight may have to reach a score; 0 where there is no such bound."""
        return 0.0

    @abstractmethod
    def granted(self, budget: int, step: int) -> int:
        """Entries of a budget granted in all once update number `step`, from 1, is made.

        Raises:
            ValueError: where the length of the run is needed and not known.
        """

    @property
    def steps_needed(self) -> bool:
        """Whether `granted` waits for the length of the run."""
        return False

    def with_steps(self, steps: int) -> UpdateMethod:
        """The same method for a run of `steps` updates; itself where the length makes no difference.

        Raises:
            ValueError: where another length was given before.
        """
        return self

    @property
    def chooses_anew(self) -> bool:
        """Whether each update chooses anew, so that entries may leave again."""
        return False

    def selectable(self, model: nn.Module) -> set[str]:
        return set(matching(model, self.include, self.exclude)) - set(self.trained_whole(model))

    def trained_whole(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters that are trained whole, outside the budget.

        Raises:
            ValueError: where a pattern matches nothing.
        """
        return {}

    def budgets(self, free: Mapping[str, int]) -> list[Share]:
        """The budgets, and who competes for each.

        Args:
            free: candidate → entries of it that are not excluded, in the model's order.

        Raises:
            ValueError: for a budget outside the candidates.
        """
        return [Share(free, resolve_budget(self.budget, sum(free.values())))]

    @property
    def regimes(self) -> tuple[tuple[str, Method], ...]:
        return (("unmasking", self),)

    def choose(self, model: nn.Module, probe: Probe | None = None, exclude: Selection = NOTHING) -> Selection:
        """Choose what the first update trains, by the gradients that the parameters hold in `.grad`."""
        return self.choose_next(model, NOTHING, 1, exclude)

    @torch.no_grad()
    def choose_next(self, model: nn.Module, chosen: Selection, step: int, exclude: Selection = NOTHING) -> Selection:
        """Choose what update number `step`, from 1, trains, by whole gradients: the plain twin of `training.unmasking`.

        Args:
            model: whose parameters hold the update's gradients in `.grad`.
            chosen: the selection of the update before; none before the first.
            step: of the update.
            exclude: entries that must not be chosen.
        """
        candidates = self.selectable(model)
        parameters = {name: parameter for name, parameter in model.named_parameters() if name in candidates}
        free = {name: p.numel() - (exclude[name].count if name in exclude else 0) for name, p in parameters.items()}
        kept = NOTHING if self.chooses_anew else chosen
        taken, new = exclude.union(kept), NOTHING
        for share in self.budgets({name: count for name, count in free.items() if count}):
            held = sum(kept[name].count for name in share.free if name in kept)
            k = (share.budget if self.chooses_anew else self.granted(share.budget, step)) - held
            seen = {name: parameters[name] for name in share.free if parameters[name].grad is not None}
            k = min(k, sum(p.numel() - (taken[name].count if name in taken else 0) for name, p in seen.items()))
            if k > 0:
                new = new.union(top_k(self._scores(seen, taken), k))
        return kept.union(new)

    def _scores(self, parameters: Mapping[str, nn.Parameter], taken: Selection) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in parameters.items():
            assert parameter.grad is not None
            score = self.score(parameter.detach(), parameter.grad).contiguous()
            if name in taken:
                score.view(-1)[taken[name].flat().to(score.device)] = float("-inf")
            yield name, score
