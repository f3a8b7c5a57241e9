"""What a method is: a frozen dataclass whose fields are its hyper-parameters, and one pure question it answers.

State is returned, never stored, so that a method can be compared, hashed, written to a run file and resumed.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from .budget import resolve_budget, top_k
from .probe import Probe
from .selection import Selection

__all__ = [
    "Method",
    "Phase",
    "ScoredMethod",
    "State",
    "budget_problems",
    "matching",
    "pattern_problems",
    "refuse",
    "refuse_foreign",
]

Phase = Literal["start", "forward", "update"]
State = Mapping[str, Any]  # tensors and JSON values only: it is written into checkpoints


class Method(ABC):
    """Answers, at fixed moments, which entries of which parameters may change."""

    name: ClassVar[str]
    summary: ClassVar[str]  # one line for tables and --help
    phase: ClassVar[Phase] = "start"

    @property
    def needs_probe(self) -> bool:
        """Whether `choose` looks at data."""
        return False

    @abstractmethod
    def candidates(self, model: nn.Module) -> set[str]:
        """Names of the parameters that may ever be selected."""

    @abstractmethod
    def choose(
        self, state: State, model: nn.Module, step: int, probe: Probe | None, exclude: Selection
    ) -> tuple[Selection, State]:
        """Choose entries.

        Args:
            state: what the previous call returned; empty at first.
            model: the model, at its current weights.
            step: updates made so far.
            probe: data to look at, or None.
            exclude: entries that must not be chosen (another adapter's).

        Returns:
            The whole selection from now on, and the next state.

        Raises:
            ValueError: where the method's fields do not fit the model.
        """

    def to_dict(self) -> dict[str, Any]:
        """`{"name": …, field: value, …}`: what `methods.build` takes back."""
        fields = dataclasses.asdict(self)  # type: ignore[call-overload]  # every method is a dataclass
        return {"name": self.name} | {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}


class ScoredMethod(Method):
    """A method that ranks single entries once and takes the best of the whole model."""

    budget: int | float
    include: tuple[str, ...]
    exclude: tuple[str, ...]

    def __post_init__(self) -> None:
        refuse(type(self).__name__, budget_problems(self.budget) + pattern_problems(include=self.include, exclude=self.exclude))

    @abstractmethod
    def score(self, name: str, weight: Tensor) -> Tensor:
        """Score of each entry, fp32 of `weight`'s shape; higher is chosen first."""

    def candidates(self, model: nn.Module) -> set[str]:
        return set(matching(model, self.include))

    def choose(
        self, state: State, model: nn.Module, step: int, probe: Probe | None, exclude: Selection
    ) -> tuple[Selection, State]:
        weights = matching(model, self.include)
        excluded = {name: entries.flat() for name, entries in exclude.items() if name in weights}
        total = sum(weight.numel() for weight in weights.values()) - sum(flat.numel() for flat in excluded.values())
        budget = resolve_budget(self.budget, total)
        return top_k(self._scores(weights, excluded), budget), state

    def _scores(self, weights: Mapping[str, Tensor], excluded: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for name, weight in weights.items():
            score = self.score(name, weight)
            if name in excluded:
                score = score.contiguous()
                score.view(-1)[excluded[name].to(score.device)] = float("-inf")
            yield name, score


def matching(model: nn.Module, include: tuple[str, ...], exclude: tuple[str, ...] = ()) -> dict[str, nn.Parameter]:
    """Floating-point parameters whose name matches any of `include` and none of `exclude` (shell patterns), tied ones once.

    Raises:
        ValueError: where a pattern matches nothing; the message shows names that exist.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    for key, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not any(fnmatch(name, pattern) for name in parameters):
                shown = ", ".join(list(parameters)[:3])
                raise ValueError(f"{key}: the pattern {pattern!r} matches no parameter; names look like {shown} …")
    included = {name: p for name, p in parameters.items() if any(fnmatch(name, pattern) for pattern in include)}
    return {name: p for name, p in included.items() if not any(fnmatch(name, pattern) for pattern in exclude)}


def refuse_foreign(exclude: Selection, model: nn.Module) -> None:
    """Refuse excluded entries that are not the model's: excluding them would do nothing, unnoticed.

    Raises:
        ValueError: naming the first parameter that the model lacks or has in another shape.
    """
    parameters = dict(model.named_parameters())
    for name, entries in exclude.items():
        found = tuple(parameters[name].shape) if name in parameters else None
        if found != entries.shape:
            has = "no such parameter" if found is None else f"shape {list(found)}"
            raise ValueError(f"exclude: {name} of shape {list(entries.shape)}: the model has {has}; give entries of this model")


def budget_problems(budget: object) -> list[str]:
    """What is wrong with a budget of entries before the model is known."""
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        return [f"budget={budget!r}: give a whole number (a count) or a fraction in (0, 1] (a share)"]
    if not budget > 0 or (isinstance(budget, float) and not budget <= 1):
        return [f"budget={budget}: a count must be at least 1, a share above 0 and at most 1.0"]
    return []


def pattern_problems(**fields: object) -> list[str]:
    """What is wrong with fields of shell patterns before the model is known."""
    return [f"{key}={value!r}: give a tuple of patterns, ({value!r},)" for key, value in fields.items() if isinstance(value, str)]


def refuse(method: str, problems: list[str]) -> None:
    """Raise all problems of a method's fields in one `ValueError`; none, no error."""
    if problems:
        raise ValueError(f"{method}: " + "; ".join(problems))
