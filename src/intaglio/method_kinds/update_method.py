"""Methods that choose single entries at every update, by that update's gradient.

The method says what an entry's score is and how many entries are granted when; `streaming` applies it to gradients as
they are formed. `choose` is the same definition over whole gradients: the plain twin, which tests hold equal.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.budget import resolve_budget, top_k
from ..core.probe import Probe
from ..core.selection import Selection, from_flat
from . import fields
from .method import Method, State, matching

__all__ = ["Pool", "UpdateMethod"]


@dataclass(frozen=True)
class Pool:
    """Parameters that compete for one budget.

    Attributes:
        free: parameter name → entries that may be chosen.
        budget: how many of them, in all.
    """

    free: Mapping[str, int]
    budget: int


class UpdateMethod(Method):
    """Chooses entries at each update: the best scores of that update's gradient, over all candidates together."""

    phase = "update"

    budget: int | float
    include: tuple[str, ...]
    exclude: tuple[str, ...]

    def _problems(self) -> list[str]:
        return fields.patterns(include=self.include, exclude=self.exclude) + fields.share("budget", self.budget)

    @abstractmethod
    def score(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """Score of each entry, fp32, ≥ 0, and 0 where the gradient is 0; called on chunks of any shape."""

    def reach(self, score: float) -> float:
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
    def renews(self) -> bool:
        """Whether each update chooses anew, so that entries may leave again."""
        return False

    def selectable(self, model: nn.Module) -> set[str]:
        return set(matching(model, self.include, self.exclude)) - set(self.always(model))

    def always(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters that are trained whole, outside the budget.

        Raises:
            ValueError: where a pattern matches nothing.
        """
        return {}

    def budgets(self, free: Mapping[str, int]) -> list[Pool]:
        """The budgets, and who competes for each.

        Args:
            free: candidate → entries of it that are not excluded, in the model's order.

        Raises:
            ValueError: for a budget outside the candidates.
        """
        return [Pool(free, resolve_budget(self.budget, sum(free.values())))]

    @torch.no_grad()
    def choose(
        self, state: State, model: nn.Module, step: int, probe: Probe | None, exclude: Selection
    ) -> tuple[Selection, State]:
        """Choose by the whole gradients that the parameters hold in `.grad`: the plain twin of `streaming`.

        State: `{parameter name: offsets of its entries chosen so far}`.
        """
        parameters, candidates = dict(model.named_parameters()), self.selectable(model)
        names = [name for name in parameters if name in candidates]
        chosen = Selection({name: from_flat(tuple(parameters[name].shape), state[name]) for name in names if name in state})
        free = {name: parameters[name].numel() - (exclude[name].count if name in exclude else 0) for name in names}
        taken = exclude if self.renews else exclude.union(chosen)
        new = Selection()
        for pool in self.budgets({name: count for name, count in free.items() if count}):
            held = 0 if self.renews else sum(chosen[name].count for name in pool.free if name in chosen)
            k = (pool.budget if self.renews else self.granted(pool.budget, step + 1)) - held
            seen = {name: parameters[name] for name in pool.free if parameters[name].grad is not None}
            k = min(k, sum(p.numel() - (taken[name].count if name in taken else 0) for name, p in seen.items()))
            if k > 0:
                new = new.union(top_k(self._scores(seen, taken), k))
        selection = new if self.renews else chosen.union(new)
        return selection, {name: entries.flat() for name, entries in selection.items()}

    def _scores(self, parameters: Mapping[str, nn.Parameter], taken: Selection) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in parameters.items():
            assert parameter.grad is not None
            score = self.score(parameter.detach(), parameter.grad).contiguous()
            if name in taken:
                score.view(-1)[taken[name].flat().to(score.device)] = float("-inf")
            yield name, score
