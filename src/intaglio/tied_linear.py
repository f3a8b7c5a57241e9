"""A linear layer that shares its weight: autograd sums the gradients of all uses in place.

Of a weight that is an embedding and an output head, autograd holds the head's gradient until the embedding's arrives. It
adds the second to the first in place, but not into a view; and a view is what the transpose inside `F.linear` gives back.
So three tensors of the weight's size would exist where two do. Here the same gradient arrives as a tensor of its own:
no number, and no order of summation, changes.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["find", "install", "remove"]


class _Own(torch.autograd.Function):
    """The identity; the gradient that it passes on is no view.

    Autograd writes into what nobody else holds, neither the tensor nor its storage; a view holds its base.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor) -> Tensor:  # type: ignore[override]
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient if torch.is_grad_enabled() else gradient.detach()  # grad mode: backward is differentiated itself

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:  # type: ignore[override]
        return tangent.view_as(tangent)


def _forward(self: Any, x: Tensor) -> Tensor:
    """Replaces the layer's `forward`."""
    weight: Tensor = self.weight
    # Autocast casts a parameter once for all uses, a view at each; and the gradient of a cast is no view already.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling() and not torch.is_autocast_enabled(x.device.type):
        weight = _Own.apply(weight)  # type: ignore[assignment]
    return F.linear(x, weight, self.bias)


def find(model: nn.Module, parameters: Iterable[nn.Parameter]) -> dict[int, list[nn.Module]]:
    """Id of each parameter that the model holds more than once → the plain linear layers that hold it."""
    uses = {id(parameter): 0 for parameter in parameters}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in uses:
            uses[id(parameter)] += 1
    found: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        weight = module._parameters.get("weight")  # none under weight_norm and its like
        # An own `forward` means somebody (accelerate's offloading, say) already stands in between: stay out.
        if type(module) is nn.Linear and weight is not None and "forward" not in module.__dict__ and uses.get(id(weight), 0) > 1:
            found.setdefault(id(weight), []).append(module)
    return found


def install(module: nn.Module) -> None:
    """Let `module`'s weight receive gradients that can be summed in place."""
    assert "forward" not in module.__dict__
    module.forward = MethodType(_forward, module)


def remove(module: nn.Module) -> None:
    """Give the layer its own forward back."""
    del module.__dict__["forward"]
