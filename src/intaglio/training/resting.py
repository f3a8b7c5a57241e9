"""Idle layers kept cheap in a model's forward passes: no dropout in them, no graph below the active ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, final

import torch
from torch import Tensor, nn

from ..model import peft_layers as adapters

__all__ = ["Resting"]


@final
class Resting:
    """Keeps idle layers cheap while a model trains.

    The dropout of idle layers' adapters is off, so that no mask is kept for it. And where hidden states that enter the
    first layer require grad although nothing before it is trained (transformers and PEFT make embeddings do so, for
    reentrant checkpointing), they are detached: backward then ends at the lowest active layer.

    Args:
        model: the model; the first layer of each stack gets a hook until `release`.
        paths: of the layers.
        idle_dropout: leave the dropout of idle layers on.

    Attributes:
        largest: numbers in the first tensor of the largest input that was trained on: rows · tokens.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str], *, idle_dropout: bool) -> None:
        self.largest, self._model = 0, model
        found = {} if idle_dropout else adapters.dropouts(model)
        self._dropouts = [
            [m for layer, modules in found.items() if layer.startswith(f"{path}.") for m in modules] for path in paths
        ]
        self._idle: list[nn.Module] = []
        self._silenced: set[nn.Module] = set()
        self._checkpointed = [m for m in model.modules() if getattr(m, "gradient_checkpointing", None) is not None]
        self._device = next(model.parameters()).device.type
        self._autocast: tuple[bool, torch.dtype] = (False, torch.float32)
        firsts = {path.rpartition(".")[0]: None for path in paths}
        entries = [next(iter(model.get_submodule(stack)._modules.values())) for stack in firsts]
        self._handles = [
            m.register_forward_pre_hook(self._cut, with_kwargs=True) for m in dict.fromkeys(entries) if m is not None
        ]

    def rest(self, idle: Sequence[int]) -> None:
        """Turn the dropout of these layers off, and that of the others on again."""
        self._idle = [module for number in idle for module in self._dropouts[number]]
        for module in self._silenced.difference(self._idle):
            module.training = self._model.training
        self._silenced.intersection_update(self._idle)
        self._silence()

    def look(self, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Before a training forward: take note of its size and autocast, and undo what `model.train()` turned on."""
        size = next((x.numel() for x in (*inputs, *kwargs.values()) if isinstance(x, Tensor) and x.dim() > 0), 0)
        self.largest = max(self.largest, size)
        self._autocast = torch.is_autocast_enabled(self._device), torch.get_autocast_dtype(self._device)
        self._silence()

    def autocast(self) -> AbstractContextManager[Any]:
        """The autocast that the model was last trained under."""
        enabled, dtype = self._autocast
        return torch.autocast(self._device, dtype=dtype if enabled else None, enabled=enabled)

    def release(self) -> None:
        """Take the hooks off and turn the dropout on again."""
        self.rest([])
        for handle in self._handles:
            handle.remove()

    def _silence(self) -> None:
        for module in self._idle:
            if module.training:
                module.training = False
                self._silenced.add(module)

    def _cut(self, layer: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Detach what enters the first layer where no trained parameter is before it."""
        # transformers and PEFT let the embeddings' output require grad, for reentrant checkpointing would otherwise see no
        # input to differentiate. Nobody needs that gradient, yet backward would run through every frozen layer to form it,
        # and their activations would be kept for it. Cutting it lets backward end at the lowest active layer. Three must stay:
        # inputs that lead back to a trained parameter (embeddings that train too), the second run of a layer that reentrant
        # checkpointing makes inside backward, and compiled graphs, where a detach would be traced for good.
        tensors = [x for x in (*inputs, *kwargs.values()) if isinstance(x, Tensor) and x.requires_grad]
        # In a backward pass, reentrant checkpointing runs the layer again, on inputs that have lost their history.
        again = torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1
        if not tensors or not torch.is_grad_enabled() or again or self._reentrant():
            return None
        loose = {id(x) for x in tensors if not _leads_to_parameter(x)}
        if not loose:
            return None
        cut = tuple(x.detach() if id(x) in loose else x for x in inputs)
        return cut, {key: x.detach() if id(x) in loose else x for key, x in kwargs.items()}

    def _reentrant(self) -> bool:
        """Whether layers are checkpointed in the way that needs inputs which require grad."""
        checkpointed = (m for m in self._checkpointed if m.gradient_checkpointing and m.training)
        options = (getattr(getattr(m, "_gradient_checkpointing_func", None), "keywords", {}) for m in checkpointed)
        return any(found.get("use_reentrant", True) is not False for found in options)


def _leads_to_parameter(x: Tensor) -> bool:
    """Whether the graph of `x` reaches a parameter."""
    if x.grad_fn is None:
        return isinstance(x, nn.Parameter)
    waiting, seen = [x.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if isinstance(getattr(node, "variable", None), nn.Parameter) or "CheckpointFunction" in type(node).__name__:
            return True  # a reentrant checkpoint does not show what is in it
        waiting += [following for following, _ in node.next_functions if following is not None]
    return False
