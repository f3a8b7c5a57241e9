"""Methods that train a few layers at a time: which layers are active is drawn anew as training goes.

The method says how layers are drawn and what a probe teaches about them, as pure functions of explicit state; `rotation`
applies it to a model. Importance is one number per layer, fp64 `[L]`, 0 at first; higher means more important.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from ..core.entries import Whole
from ..core.probe import Probe
from ..core.selection import Selection
from . import fields
from .method import NOTHING, Method

__all__ = ["Law", "LayerMethod", "Policy", "StatePolicy", "count_of", "draw"]

Law = Literal["uniform", "multinomial"]
Policy = Literal["any", "contiguous", "top"]
StatePolicy = Literal["keep", "drop", "offload"]

_OVERDUE = 8  # a block comes at the latest after so many times the draws that could show every layer once


@dataclass(frozen=True, kw_only=True)
class LayerMethod(Method):
    """Trains what another method selects, a few layers at a time; what lies outside the stack of layers always trains.

    Args:
        of: what is trained in a layer: a method such as `S2FT()`, `Full()`, `ID3(...)`; None: the model's own trainable
            tensors, those of its PEFT adapter.
        state: what becomes of the optimizer's state of idle layers: "keep" it; "drop" it, so that a layer starts afresh when
            it comes again and state is held for the active layers alone; "offload" it to the CPU. Default "keep".
        idle_dropout: whether the adapter dropout of idle layers stays on; default False, which keeps no mask for them.
        policy: "any" layers; "contiguous": one block of adjacent layers, so that backward can stop below it; "top": always
            the last ones, so that memory is least and nothing below is ever trained. Default "any".
            Only "contiguous" promises when a layer comes (see `active`); under "any" each has its chance at every draw.
        redraw: updates between draws.
        seed: of the draws, which use a generator of their own.
    """

    layers: int | float
    of: Method | None = None
    state: StatePolicy = "keep"
    idle_dropout: bool = False
    policy: Policy = "any"
    redraw: int = 1
    seed: int = 0

    def _problems(self) -> list[str]:
        problems = fields.share("layers", self.layers, "layers")
        if self.of is not None and (not isinstance(self.of, Method) or isinstance(self.of, LayerMethod)):
            problems.append(f"of={self.of!r}: give a method that chooses entries, e.g. S2FT() or Full(), or None for an adapter")
        problems += fields.choice("state", self.state, StatePolicy) + fields.choice("policy", self.policy, Policy)
        return problems + fields.count("redraw", self.redraw, "number of updates")

    @property
    def needs_probe(self) -> bool:
        return self.learns or self.chooser.needs_probe

    @property
    def damping(self) -> float:
        """Factor on what suppressed layers add to the base, β."""
        return 0.0

    @property
    def chooser(self) -> Method:
        return _Adapter(type(self).__name__) if self.of is None else self.of

    @property
    def regimes(self) -> tuple[tuple[str, Method], ...]:
        return (*self.chooser.regimes, ("rotation", self))

    def with_inner(self, chooser: Method) -> Method:
        return self if self.of is None else dataclasses.replace(self, of=chooser)

    def selectable(self, model: nn.Module) -> set[str]:
        return self.chooser.selectable(model)

    def choose(self, model: nn.Module, probe: Probe | None = None, exclude: Selection = NOTHING) -> Selection:
        """Choose the entries of all layers, active or not: as `of` does."""
        return self.chooser.choose(model, probe, exclude)

    def to_dict(self) -> dict[str, Any]:
        held = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"name": self.name} | held | {"of": None if self.of is None else self.of.to_dict()}

    def check(self, layer_count: int) -> None:
        """Hold the fields against a stack of so many layers.

        Raises:
            ValueError: for more layers than there are, or too few for the method to learn anything.
        """
        self.active_count(layer_count)

    def active_count(self, layer_count: int) -> int:
        """Number of layers that train at a time, of so many."""
        return count_of(f"{type(self).__name__}.layers", self.layers, layer_count)

    def draws_at(self, step: int) -> bool:
        """Whether layers are drawn anew after update number `step`; 0 is the start of the run."""
        return step % self.redraw == 0

    def probes_at(self, step: int) -> bool:
        """Whether a probe is made after update number `step`."""
        return False

    def weights(self, importance: Tensor) -> Tensor:
        """How likely each layer is drawn, relative to the others, > 0: `[L]` → `[L]`."""
        return torch.ones_like(importance)

    def active(self, importance: Tensor, generator: torch.Generator, ages: Sequence[int] | None = None) -> list[int]:
        """Draw the layers that train next.

        Args:
            importance: fp64 `[L]`.
            generator: a CPU generator; every draw takes the same amount from it, whatever importance is.
            ages: draws for which each layer was idle; default none. "contiguous" trains a layer at the latest when its age
                reaches 8 · ceil(L / layers), the longest idle first.

        Returns:
            Layer numbers, ascending.
        """
        total = importance.numel()
        count = self.active_count(total)
        weights = self.weights(importance)
        if bool(torch.rand((), generator=generator, dtype=torch.float64) < self._floor):
            weights = torch.ones_like(weights)
        if self.policy == "top":
            return list(range(total - count, total))
        if self.policy == "any":
            return draw(weights, count, self._law, generator)
        (start,) = draw(weights.unfold(0, count, 1).mean(1), 1, self._law, generator)
        oldest = max(range(total), key=lambda layer: ages[layer]) if ages else 0
        if ages and ages[oldest] >= _OVERDUE * math.ceil(total / count):
            start = min(max(oldest - count // 2, 0), total - count)
        return list(range(start, start + count))

    def suppressed_sets(self, importance: Tensor, generator: torch.Generator) -> list[list[int]]:
        """Draw the sets of layers to damp in one probe, each ascending, no two alike."""
        return []

    def learn(self, importance: Tensor, sets: Sequence[Sequence[int]], losses: Sequence[float]) -> Tensor:
        """Importance after a probe.

        Args:
            importance: fp64 `[L]`; it is left as it is.
            sets: what was damped.
            losses: the loss under each. Where one is not finite, nothing is learned.
        """
        return importance

    @property
    def _law(self) -> Law:
        return "uniform"

    @property
    def _floor(self) -> float:
        return 0.0


def draw(weights: Tensor, count: int, law: Law, generator: torch.Generator) -> list[int]:
    """Draw `count` distinct places.

    "uniform": one number uniform on (0, weight) per place, the largest are taken. "multinomial": one by one, in proportion
    to weight, without replacement; by one exponential race, log(u) / weight, which has the same law. Both take the same
    numbers from `generator`, and under equal weights give the same places.

    Args:
        weights: fp64 `[n]`, ≥ 0.
        count: 1 ≤ count ≤ n.
        law: see above.
        generator: a CPU generator.

    Returns:
        Places, ascending.
    """
    noise = torch.rand(weights.shape, generator=generator, dtype=torch.float64)
    keys = noise * weights if law == "uniform" else noise.log() / weights
    return sorted(keys.sort(descending=True, stable=True).indices[:count].tolist())


def count_of(name: str, value: int | float, total: int) -> int:
    """A count of layers: a whole number as it is, a share of `total` rounded down, at least 1.

    Raises:
        ValueError: for more than there are.
    """
    count = value if isinstance(value, int) else max(1, int(value * total))
    if count > total:
        raise ValueError(f"{name}={value}: the model has {total} layers that hold anything to train; ask for at most {total}")
    return count


@final
@dataclass(frozen=True)
class _Adapter(Method):
    """The tensors that a PEFT model's adapter trains, all of them; `owner` is named in errors."""

    owner: str

    name = "adapter"
    summary = "the tensors of a PEFT adapter"

    def selectable(self, model: nn.Module) -> set[str]:
        return set(self._trainable(model))

    def choose(self, model: nn.Module, probe: Probe | None = None, exclude: Selection = NOTHING) -> Selection:
        return Selection({name: Whole(tuple(p.shape)) for name, p in self._trainable(model).items()}).difference(exclude)

    def to_dict(self) -> dict[str, Any]:
        """Nothing: the method around it holds `of=None`."""
        return {}

    def _trainable(self, model: nn.Module) -> dict[str, nn.Parameter]:
        parameters = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
        found = {name: p for name, p in parameters.items() if p.requires_grad}
        if not found or len(found) == len(parameters):
            raise ValueError(
                f"{self.owner}(of=None) trains an adapter's layers, and {type(model).__name__} has none ("
                f"{'everything' if found else 'nothing'} in it is trainable): make one with peft.get_peft_model, or say what to "
                f"train in a layer, e.g. {self.owner}(of=S2FT())"
            )
        return found
