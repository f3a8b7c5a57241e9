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

from ..core.budget import resolve_budget, top_k
from ..core.probe import Probe
from ..core.selection import Selection
from . import fields

__all__ = [
    "EntryMethod",
    "Method",
    "Phase",
    "ScoredMethod",
    "State",
    "matching",
    "refuse_foreign",
]

Phase = Literal["start", "forward", "update", "layer"]
State = Mapping[str, Any]  # tensors and JSON values only: it is written into checkpoints


class Method(ABC):
    """Answers, at fixed moments, which entries of which parameters may change."""

    name: ClassVar[str]
    summary: ClassVar[str]  # one line for tables and --help
    phase: ClassVar[Phase] = "start"

    def __post_init__(self) -> None:
        fields.refuse(type(self).__name__, self._problems())

    def _problems(self) -> list[str]:
        """All that is wrong with the fields, before a model is known."""
        return []

    @property
    def needs_probe(self) -> bool:
        """Whether `choose` looks at data."""
        return False

    @property
    def chooser(self) -> Method:
        """What chooses entries: the method itself, or the one whose layers it trains in turn."""
        return self

    def choosing_by(self, chooser: Method) -> Method:
        """The same method with another chooser."""
        return chooser

    @abstractmethod
    def selectable(self, model: nn.Module) -> set[str]:
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
        held = dataclasses.asdict(self)  # type: ignore[call-overload]  # every method is a dataclass
        return {"name": self.name} | {k: list(v) if isinstance(v, tuple) else v for k, v in held.items()}


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

    def choose(
        self, state: State, model: nn.Module, step: int, probe: Probe | None, exclude: Selection
    ) -> tuple[Selection, State]:
        if self.needs_probe and probe is None:
            raise ValueError(f"{self}: looks at data: give a probe, e.g. probe=Batches([batch, ...])")
        weights = {name: p for name, p in self.targets(model).items() if name not in exclude or exclude[name].count < p.numel()}
        excluded = {name: entries.flat() for name, entries in exclude.items() if name in weights}
        free = {name: weight.numel() - len(excluded.get(name, ())) for name, weight in weights.items()}
        return self.spend(_without(self.scores(model, weights, probe), excluded), free), state


class ScoredMethod(EntryMethod):
    """The level most entry methods live on: a score of the weight alone, free of data."""

    @abstractmethod
    def score(self, name: str, weight: Tensor) -> Tensor:
        """Score of each entry, fp32 of `weight`'s shape; higher is chosen first."""

    def scores(self, model: nn.Module, weights: Mapping[str, nn.Parameter], probe: Probe | None) -> Iterator[tuple[str, Tensor]]:
        for name, weight in weights.items():
            yield name, self.score(name, weight)


def _without(scores: Iterator[tuple[str, Tensor]], excluded: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The scores with those of excluded entries, given by offset, behind all others."""
    for name, score in scores:
        if name in excluded:
            score = score.contiguous()
            score.view(-1)[excluded[name].to(score.device)] = float("-inf")
        yield name, score


def matching(model: nn.Module, include: tuple[str, ...], exclude: tuple[str, ...] = ()) -> dict[str, nn.Parameter]:
    """Floating-point parameters whose name matches a shell pattern of `include` and none of `exclude`, tied weights once.

    Raises:
        ValueError: where a pattern matches nothing; the message shows names that exist.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    for argument, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not any(fnmatch(name, pattern) for name in parameters):
                shown = ", ".join(list(parameters)[:3])
                raise ValueError(f"{argument}: the pattern {pattern!r} matches no parameter; names look like {shown} …")
    return {name: p for name, p in parameters.items() if _matches(name, include) and not _matches(name, exclude)}


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


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
