"""The plain twin of `training.unmasking`: whole gradients and masks, an optimizer over all weights; slow, large, easy to read."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor, nn

from intaglio.core.entries import Whole
from intaglio.core.selection import Selection
from intaglio.method_kinds.update_method import UpdateMethod

__all__ = ["DenseUnmasking"]


@final
class DenseUnmasking:
    """Trains all weights of a model and takes back, after each update, what happened to the masked ones.

    Weights narrower than fp32 are trained in fp32 and rounded into the model. The optimizer's state of a masked entry is
    what it is in a fresh optimizer.

    Args:
        model: the model; untouched by `attach`.
        method: what to choose, with the number of updates of the run.
        make: builds the optimizer from a list of parameters, one per parameter of the model, in its order.
        exclude: entries that must not be chosen.

    Attributes:
        selection: what is trained now; of `mode="repeat"`, by the last update.
        optimizer: the one that `make` built.
        step: updates made so far.
    """

    def __init__(
        self,
        model: nn.Module,
        method: UpdateMethod,
        make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        exclude: Selection | None = None,
    ) -> None:
        self.model, self.method, self.step = model, method, 0
        self._chosen = Selection()
        self._exclude = exclude or Selection()
        self._whole = Selection({name: Whole(tuple(p.shape)) for name, p in method.trained_whole(model).items()})
        self.selection = self._whole
        wide = {name: p.detach().to(torch.promote_types(p.dtype, torch.float32)) for name, p in model.named_parameters()}
        self._weights = {name: nn.Parameter(p.clone()) for name, p in wide.items()}
        self.optimizer = make(list(self._weights.values()))

    def update(self) -> None:
        """Choose by the gradients that the model's parameters hold, make the update, and clear them."""
        self.choose()
        self.make()

    @torch.no_grad()
    def choose(self) -> None:
        """Choose by the gradients that the model's parameters hold, and set those of masked entries to 0."""
        self._chosen = self.method.choose_next(self.model, self._chosen, self.step + 1, self._exclude)
        self.selection = self._chosen.union(self._whole)
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                parameter.grad.masked_fill_(self._masked(name), 0)

    @torch.no_grad()
    def make(self) -> None:
        """Make the update by the gradients of the chosen entries, and clear them."""
        for name, parameter in self.model.named_parameters():
            weight = self._weights[name]
            weight.grad = None if parameter.grad is None else parameter.grad.to(weight.dtype)
            parameter.grad = None
        self.optimizer.step()
        for name, parameter in self.model.named_parameters():
            weight, masked = self._weights[name], self._masked(name)
            weight.copy_(torch.where(masked, parameter.to(weight.dtype), weight))
            parameter.copy_(torch.where(masked, parameter, weight.to(parameter.dtype)))
            for state in self.optimizer.state.get(weight, {}).values():
                if isinstance(state, Tensor) and state.shape == weight.shape and state.dim():
                    state.masked_fill_(masked, self.optimizer.defaults.get("initial_accumulator_value", 0.0))
        self.step += 1

    def _masked(self, name: str) -> Tensor:
        masked = torch.ones(self._weights[name].shape, dtype=torch.bool)
        if name in self.selection:
            masked.view(-1)[self.selection[name].flat()] = False
        return masked.to(self._weights[name].device)
