"""Updates of entries that come while an optimizer runs: its state follows them, its options reach only them."""

from __future__ import annotations

import math
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from ..method_kinds import fields
from .growing_slot import GrowingSlot

__all__ = ["Steps", "Updates", "correct_ages", "follow", "refuse_kind", "refuse_optimizer", "take_back"]

_COUPLED = ("LBFGS", "Muon", "Shampoo", "SOAP", "KFAC")
_SIGN_HISTORY = ("Rprop",)  # its step sizes start at lr, not at zero
_DIVIDES_BY_COUNT = ("Adafactor",)  # it takes the mean of a tensor's squares


@final
@dataclass(frozen=True)
class Updates:
    """The way updates are made while entries are still being chosen.

    Args:
        accumulation: how the gradients of several backward passes per update add up. "none": there is one pass per update,
            a second is an error; "exact": whole gradients stay until the update (one number per weight, in the weight's
            type), the choice is that of their sum; "lean": only candidates are summed, `oversampling` times as many as will
            be chosen, so that an entry that is no candidate in an early pass lacks that pass's share: approximate. Default
            "none".
        oversampling: candidates kept per entry to be chosen under "lean"; default 10.
        bias_correction: "global": Adam's correction by the update's number, as the authors' code does it (an entry chosen
            late starts with a step of up to 3.2 times the learning rate and moves 6 times as far); "per_entry": by the
            updates since it was chosen, so that it starts as in a fresh Adam. Default "global".
        clip: the norm that `Tuner.clip_grad_norm_` compares: "selected", of the chosen entries' gradient; "dense", of the
            whole gradient, as a trainer of all weights would. Default "selected".
        decay: what weight decay pulls chosen entries toward: "zero", or "start", their value in the base; default "zero".

    Raises:
        ValueError: for an unknown value, or options that exclude each other.

    Example:
        >>> Updates(bias_correction="per_entry").accumulation
        'none'
    """

    # The meanings in short are those of a run file's attach block.
    accumulation: Literal["none", "exact", "lean"] = field(
        default="none", metadata={"help": "how gradients of several passes add up while entries are chosen"}
    )
    oversampling: int = field(default=10, metadata={"help": "candidates kept per entry to be chosen under accumulation: lean"})
    bias_correction: Literal["global", "per_entry"] = field(
        default="global", metadata={"help": "Adam's correction by the update's number, or by the entry's age"}
    )
    clip: Literal["selected", "dense"] = field(
        default="selected",
        metadata={"help": "the norm that max_grad_norm bounds: of the chosen entries' gradient, or of the whole"},
    )
    decay: Literal["zero", "start"] = field(
        default="zero", metadata={"help": "what weight decay pulls toward: zero, or the base's value"}
    )

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(Updates)
        choices = {key: value for key, value in vars(self).items() if typing.get_origin(hints[key]) is Literal}
        problems = [problem for key, value in choices.items() for problem in fields.choice(key, value, hints[key])]
        problems += fields.count("oversampling", self.oversampling)
        if self.oversampling != 10 and self.accumulation != "lean":
            problems.append(f"oversampling={self.oversampling!r}: has no effect with accumulation={self.accumulation!r}")
        if (self.accumulation, self.clip) == ("lean", "dense"):
            problems.append("clip='dense': the norm of a sum needs whole gradients, which 'lean' does not keep; take 'exact'")
        fields.refuse("Updates", problems)

    def refuse_passes(self, where: str) -> None:
        """Refuse a further backward pass of one update, unless it was said how gradients add up.

        Raises:
            ValueError: beginning with `where`.
        """
        if self.accumulation == "none":
            raise ValueError(
                f"{where}: say how gradients add up, with attach(…, updates=Updates(accumulation='exact')), which keeps whole "
                "gradients until the update, or 'lean', which keeps only those of candidates (approximate)"
            )


@final
class Steps:
    """The steps of an optimizer over entries that come while it runs.

    Args:
        slots: name → what it steps.
        updates: how updates are made.
    """

    def __init__(self, slots: Mapping[str, GrowingSlot], updates: Updates) -> None:
        self._slots, self._by_age = slots, updates.bias_correction == "per_entry"
        self._start: dict[str, Tensor] = {}

    def before(self, optimizer: torch.optim.Optimizer) -> None:
        """Make pending choices final, and let the optimizer's state follow them."""
        for slot in self._slots.values():
            follow(optimizer, slot)
            slot.commit()
        if self._by_age:
            self._start = {name: slot.values.detach().clone() for name, slot in self._slots.items()}

    def after(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the step anew where each entry is corrected by its own age."""
        if self._by_age:
            correct_ages(optimizer, self._slots.values(), self._start)
            self._start = {}


def take_back(optimizer: torch.optim.Optimizer, slots: Iterable[GrowingSlot]) -> None:
    """Let an optimizer's step change nothing: pending choices go, and every gradient with them."""
    for slot in slots:
        slot.restore()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def refuse_optimizer(optimizer: torch.optim.Optimizer, slots: Iterable[GrowingSlot], updates: Updates) -> None:
    """Refuse an optimizer that cannot follow entries that come while it runs.

    Raises:
        ValueError: for one that couples entries of a matrix or needs a history, that lacks a slot, or that is no plain Adam
            where each entry is corrected by its own age.
    """
    kinds, name = _kinds(type(optimizer)), type(optimizer).__name__
    refuse_kind(type(optimizer))
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [slot.name for slot in slots if id(slot.values) not in held]
    if missing:
        raise ValueError(
            f"optimizer {name}: lacks {missing[0]}; its entries could be chosen, never moved: pass tuner.parameters()"
        )
    if updates.bias_correction == "per_entry":
        plain = kinds & {"Adam", "AdamW"} and not any(g.get("amsgrad") or g.get("maximize") for g in optimizer.param_groups)
        if not plain or "betas" not in optimizer.defaults:
            raise ValueError(f"bias_correction='per_entry': needs Adam or AdamW without amsgrad and maximize, not {name}")


def refuse_kind(factory: Any) -> None:
    """Refuse a class of optimizers that cannot follow; what is no class says nothing.

    Raises:
        ValueError: for one that couples entries of a matrix, or needs a history.
    """
    if isinstance(factory, type) and _kinds(factory) & {*_COUPLED, *_SIGN_HISTORY}:
        raise ValueError(
            f"optimizer {factory.__name__}: an entry's update depends on others or on its past, which entries chosen while "
            "training do not have; use an optimizer that treats each entry alike, e.g. AdamW, SGD or Adafactor"
        )


def _kinds(cls: type) -> set[str]:
    return {parent.__name__ for parent in cls.__mro__}


@torch.no_grad()
def follow(optimizer: torch.optim.Optimizer, slot: GrowingSlot) -> None:
    """Bring the optimizer's state of a slot in line with its pending choice: new entries start from nothing.

    Raises:
        ValueError: for state that is not one number per entry (block-quantized, factored).
    """
    if not slot.index.numel() and _kinds(type(optimizer)) & {*_DIVIDES_BY_COUNT}:
        slot.values.grad = None  # others count the update
    if slot.source is None:
        return
    kept, state = slot.source >= 0, optimizer.state.get(slot.values, {})
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.dim() == 0:
            continue
        if value.dim() != 1 or value.numel() != slot.count_before or not value.is_floating_point():
            raise ValueError(
                f"optimizer {type(optimizer).__name__}: its state {key!r} of {slot.name} is {value.dtype} {list(value.shape)}, "
                "not one number per entry; take an optimizer with plain state, or a method that chooses all at the first update"
            )
        fresh = value.new_full((slot.source.numel(),), optimizer.defaults.get("initial_accumulator_value", 0.0))
        fresh[kept] = value[slot.source[kept]]
        state[key] = fresh


@torch.no_grad()
def correct_ages(optimizer: torch.optim.Optimizer, slots: Iterable[GrowingSlot], before: Mapping[str, Tensor]) -> None:
    """Take an Adam step anew from its moments, each entry with the bias correction of its own age.

    An entry's age, the steps it has taken, is one more state of the optimizer, beside the moments that it corrects.

    Args:
        optimizer: Adam or AdamW, just after its step.
        slots: what it stepped.
        before: name → values before the step.
    """
    decoupled = "AdamW" in _kinds(type(optimizer))  # its groups say so from torch 2.7 on
    groups: dict[int, dict[str, Any]] = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for slot in slots:
        state = optimizer.state.get(slot.values)
        if not state or slot.values.grad is None:
            continue
        state["age"] = state.get("age", torch.zeros_like(slot.values)) + 1
        group = groups[id(slot.values)]
        _adam(slot.values, before[slot.name], state, {"decoupled_weight_decay": decoupled} | group)


def _adam(values: nn.Parameter, before: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> None:
    (beta1, beta2), lr, age = group["betas"], float(group["lr"]), state["age"]
    mean = state["exp_avg"] / (1 - torch.exp(age * math.log(beta1)) if beta1 else 1.0)
    spread = (state["exp_avg_sq"] / (1 - torch.exp(age * math.log(beta2)))).sqrt()
    start = before * (1 - lr * group["weight_decay"]) if group["decoupled_weight_decay"] else before
    values.copy_(start - lr * mean / (spread + group["eps"]))
