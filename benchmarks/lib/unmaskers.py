"""The ways to train that `unmask.py` compares, each at work on a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lib.contestants import Step, shira, trainable
from lib.models import size

LR = 1e-4
EXPONENT, EPS = 1.0, 1.0  # of the score |g| / (|w| + eps)^exponent
SOON = 2  # steps in which all is unmasked where the steps after it are measured


class NoUpdate(torch.optim.Optimizer):
    """An optimizer that leaves the weights alone: forward and backward remain."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:
        """Nothing."""


class Running:
    """A contestant at work: its step, and how many entries it trains by now."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, entries: Callable[[], int]) -> None:
        self.step, self.entries = Step(model, []), entries
        self.step.optimizer = optimizer


def backward_only(model: nn.Module, budget: int, total: int) -> Running:
    """All gradients, and no use made of them."""
    return Running(model, NoUpdate(model.parameters()), lambda: 0)


def gradients_freed(model: nn.Module, budget: int, total: int) -> Running:
    """Each gradient freed as soon as it exists: what unmasking would cost if choosing were free."""

    def free(parameter: torch.Tensor) -> None:
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(free)
    return backward_only(model, budget, total)


def adamw(model: nn.Module, budget: int, total: int, **kwargs: Any) -> Running:
    """Every weight."""
    return Running(model, torch.optim.AdamW(model.parameters(), lr=LR, **kwargs), lambda: size(model))


def adamw_fused(model: nn.Module, budget: int, total: int) -> Running:
    """Every weight, in one kernel: torch's fastest."""
    return adamw(model, budget, total, fused=True)


def selective(model: nn.Module, budget: int, total: int) -> Running:
    """The authors' optimizer.

    Its `eps` and `exp` are the score's, and Adam's eps cannot be set; `verify` would write a copy of the weights to disk.
    It trains total × (budget // total + 1) entries where the division leaves a rest, and goes on after `total` steps.
    """
    from selective_optimizers.wrap import get_selective_optimizer

    of = get_selective_optimizer(torch.optim.AdamW, "id3")
    optimizer = of(model.parameters(), lr=LR, budget=budget, max_steps=total, exp=EXPONENT, eps=EPS, verify=False)
    return Running(model, optimizer, optimizer.get_budget_used)


def shira_(model: nn.Module, budget: int, total: int) -> Running:
    """PEFT's SHiRA, random entries of all linear layers; its rank counts in the entries of LoRA's rank 1."""
    step = shira(model, max(1, round(budget / trainable(model, 1))))
    assert step.optimizer is not None
    return Running(step.model, step.optimizer, lambda: step.trainable)


def id3(model: nn.Module, budget: int, total: int) -> Running:
    """Ours."""
    from intaglio import ID3, attach

    tuner = attach(model, ID3(budget=budget, steps=total, exponent=EXPONENT, eps=EPS))
    return Running(model, tuner.optimizer(torch.optim.AdamW, lr=LR), lambda: tuner.selection.size)


def id3_after(model: nn.Module, budget: int, total: int) -> Running:
    """Ours, its budget soon spent."""
    return id3(model, budget, SOON)


CONTESTANTS: dict[str, tuple[str, Callable[[nn.Module, int, int], Running]]] = {
    "backward": ("forward and backward only", backward_only),
    "freed": ("the same, gradients freed", gradients_freed),
    "id3": ("Intaglio ID3, unmasking", id3),
    "id3_after": ("Intaglio ID3, all unmasked", id3_after),
    "selective": ("selective-optimizers 0.4", selective),
    "shira": ("PEFT SHiRA", shira_),
    "adamw": ("full AdamW", adamw),
    "adamw_fused": ("full AdamW, fused", adamw_fused),
}
