"""Gradients averaged over the processes of a run by the slots themselves, so that replicas never drift apart in silence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..core.fingerprint import checksum
from . import ranks
from .slot import Slot

__all__ = ["Averaging", "refuse_apart"]


@final
class Averaging:
    """The mean over the processes of the gradients of slots, in one message when a backward pass has ended.

    DistributedDataParallel averages what it sees in the autograd graph. It never learns of a gradient that is gathered outside,
    and where it stands around the model, two would write to the same tensors. So what is gathered is hidden from it and always
    averaged here; the rest is, where there is no such wrapper. Layers that rest send nothing.

    Args:
        model: whose forward passes show whether a wrapper stands around it.
        slots: all of the model.

    Attributes:
        waits: whether more passes of the same update follow, so that there is no hurry. A trainer that knows says so.
    """

    def __init__(self, model: nn.Module, slots: Sequence[Slot]) -> None:
        self._model, self._slots, self._task, self._is_wrapped = model, slots, -1, False
        self._handles: list[Any] = []
        self.waits = False
        if ranks.count() == 1:
            return
        gathered = {id(tensor) for slot in slots if slot.is_gathered for tensor in (slot.values, slot.target)}
        names = [name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in gathered]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
        self._handles.append(model.register_forward_pre_hook(self._look))

    def follow(self) -> None:
        """Average after every backward pass from now on."""
        if ranks.count() > 1:
            self._handles += [slot.leaf.register_post_accumulate_grad_hook(self._arrived) for slot in self._slots]

    def average(self, slots: Sequence[Slot]) -> None:
        """Average the gradients of these slots now, but those that a wrapper averages."""
        ranks.average_(s.values for s in slots if s.is_active and (s.is_gathered or not self._is_wrapped))

    def release(self) -> None:
        """Take the hooks off, and show everything to DistributedDataParallel again."""
        for handle in self._handles:
            handle.remove()
        if self._handles:
            del self._model._ddp_params_and_buffers_to_ignore
            for parameter in self._model.parameters():
                vars(parameter).pop("_ddp_ignored", None)
        self._handles = []

    def _look(self, *_: Any) -> None:
        self._is_wrapped = DistributedDataParallel._get_active_ddp_module() is not None

    def _arrived(self, _: Any) -> None:
        task = torch._C._current_graph_task_id()
        if task != self._task:  # the first gradient of this backward
            self._task = task
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)

    def _finish(self) -> None:
        if not self.waits:
            self.average(self._slots)


def refuse_apart(model: nn.Module, slots: Sequence[Slot]) -> None:
    """Refuse the first update of a run whose processes do not train the same weights by the same gradients.

    Raises:
        ValueError: in every process, naming a parameter.
    """
    if ranks.count() == 1:
        return
    weights = {name: checksum(p) for name, p in model.named_parameters()}
    gradients = {slot.name: None if slot.values.grad is None else checksum(slot.values.grad) for slot in slots}
    others = ranks.gathered((weights, gradients))
    for name, own in weights.items():
        if any(other.get(name) != own for other, _ in others):
            raise ValueError(
                f"{name}: the processes of this run do not hold the same weights; seed every process alike before the model is "
                "made, or load it from the same files"
            )
    for name, own in gradients.items():
        if any(other.get(name) != own for _, other in others):
            raise ValueError(
                f"{name}: its gradient differs between the processes of this run, so that they would drift apart: attach after "
                "torch.distributed.init_process_group(), and call the model itself in every process"
            )
