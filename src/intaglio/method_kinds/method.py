"""A method: a frozen dataclass whose fields are its hyper-parameters, and one pure question it answers."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from fnmatch import fnmatch
from typing import Any, ClassVar

from torch import nn

from ..core.probe import Probe
from ..core.selection import Selection
from . import fields

__all__ = ["NOTHING", "Method", "matching", "refuse_foreign"]

NOTHING = Selection()  # immutable, as every selection


class Method(ABC):
    """A rule that answers which entries of which parameters may change.

    It holds no state: it can be compared, hashed, written to a run file and built again from there.

    Attributes:
        name: in run files and tables.
        summary: one line for tables and --help.
    """

    name: ClassVar[str]
    summary: ClassVar[str]

    def __post_init__(self) -> None:
        fields.refuse(type(self).__name__, self._problems())

    def _problems(self) -> list[str]:
        """All that is wrong with the fields, before a model is known."""
        return []

    @property
    def needs_probe(self) -> bool:
        """Whether it looks at data, before training or while a run trains."""
        return False

    @property
    def learns(self) -> bool:
        """Whether it learns from a probe while a run trains."""
        return False

    @property
    def chooser(self) -> Method:
        """The method that chooses entries: itself, or the one whose layers it trains in turn."""
        return self

    @property
    def regimes(self) -> tuple[tuple[str, Method], ...]:
        """How its choice is trained: name of a regime of `training`, and the method that it applies; one after the other."""
        return (("fixed", self),)

    @property
    def chooses_before(self) -> bool:
        """Whether all that trains is chosen once, before training."""
        return all(name == "fixed" for name, _ in self.regimes)

    def with_inner(self, chooser: Method) -> Method:
        """The same method around another chooser; the chooser itself where there is nothing around."""
        return chooser

    @abstractmethod
    def selectable(self, model: nn.Module) -> set[str]:
        """Names of the parameters that may ever be selected."""

    @abstractmethod
    def choose(self, model: nn.Module, probe: Probe | None = None, exclude: Selection = NOTHING) -> Selection:
        """Choose entries.

        Args:
            model: at its current weights.
            probe: data to look at.
            exclude: entries that must not be chosen (another adapter's).

        Raises:
            ValueError: where the method's fields do not fit the model.
        """

    def to_dict(self) -> dict[str, Any]:
        """`{"name": …, field: value, …}`: what `methods.build` takes back."""
        held = dataclasses.asdict(self)  # type: ignore[call-overload]  # every method is a dataclass
        return {"name": self.name} | {k: list(v) if isinstance(v, tuple) else v for k, v in held.items()}


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
