"""A linear layer of which only some rows or columns learn.

The forward pass is one dense matmul on the live weight. Where input columns are trained, backward keeps only those
columns of the input, x[..., idx], and returns only that slice's gradient (S2FT, arXiv 2412.06289, section 3.3). The
plain twin is the dense gradient gathered by `slots.Slot`; tests hold the two equal.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..core.entries import Slices

__all__ = ["install", "remove"]


class _PartialLinear(torch.autograd.Function):
    """y = x Wᵀ + b, with a gradient for x, for b, and for the chosen slice of W only.

    Shapes: x [..., I], weight [O, I] (or [I, O] where `transposed`), values of the slice in the weight's layout.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        index: Tensor,
        run: tuple[int, int] | None,
        dim: int,
        transposed: bool,
    ) -> Tensor:
        # The live weight is saved and cast again in backward: under autocast a saved copy would outweigh all that is kept.
        ctx.reads_inputs = bool(dim) != transposed
        ctx.transposed, ctx.values_dtype, ctx.run = transposed, values.dtype, run
        kept = None
        if ctx.needs_input_grad[1]:
            kept = _copy(x, index, run) if ctx.reads_inputs else x
        ctx.save_for_backward(kept, weight if ctx.needs_input_grad[0] else None, index)
        return F.linear(x, weight.t() if transposed else weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        kept, weight, index = ctx.saved_tensors
        grad_x = grad_values = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_y @ (weight.t() if ctx.transposed else weight).to(grad_y.dtype)
        if ctx.needs_input_grad[1]:
            chosen = grad_y if ctx.reads_inputs else _copy(grad_y, index, ctx.run)
            rows, columns = chosen.flatten(0, -2), kept.flatten(0, -2)
            grad_values = (columns.t() @ rows if ctx.transposed else rows.t() @ columns).to(ctx.values_dtype)
        if ctx.needs_input_grad[3]:
            grad_bias = grad_y.flatten(0, -2).sum(0)
        return grad_x, grad_values, None, grad_bias, None, None, None, None


def _copy(x: Tensor, index: Tensor, run: tuple[int, int] | None) -> Tensor:
    """x[..., index] as a matrix of its own, `[tokens, chosen]`; a run of neighbours (start, length) needs no gather."""
    x_TI = x.flatten(0, -2)  # on a CPU the gather is twice as fast in two dimensions as in three
    return x_TI.index_select(-1, index) if run is None else x_TI.narrow(-1, *run).clone(memory_format=torch.contiguous_format)


def _forward(self: Any, x: Tensor) -> Tensor:
    """Replaces the layer's `forward`; `self.partial` is the slot of its weight."""
    slot = self.partial.slot
    weight: Tensor = self.weight
    bias: Tensor | None = self.bias
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))  # so that what is kept is narrow too; linear casts the rest
    if not torch.is_grad_enabled():
        return F.linear(x, weight.t() if self.partial.transposed else weight, bias)
    if x.dim() == 1:  # nn.Linear takes a bare feature vector too
        return _forward(self, x[None])[0]
    entries, partial = slot.entries, self.partial
    return _PartialLinear.apply(x, slot.values, weight, bias, entries.index, partial.run, entries.dim, partial.transposed)


class _Partial:
    """Holds a slot without registering it: its parameter belongs to the model's `Slots`, not to the layer."""

    def __init__(self, slot: Any, transposed: bool) -> None:
        self.slot, self.transposed = slot, transposed
        first, length = int(slot.entries.index[0]), slot.entries.index.numel()
        self.run = (first, length) if int(slot.entries.index[-1]) - first + 1 == length else None


def install(module: nn.Module, slot: Any, *, transposed: bool) -> None:
    """Route `module`'s forward through the partial product.

    Args:
        module: nn.Linear, or GPT-2's Conv1D (`transposed`, weight [in, out]).
        slot: the `slots.Slot` of its weight; entries must be Slices.
        transposed: whether the weight is stored as [in, out].
    """
    assert isinstance(slot.entries, Slices)
    assert "forward" not in module.__dict__
    module.partial = _Partial(slot, transposed)  # type: ignore[assignment]  # a plain attribute, deliberately not a submodule
    module.forward = MethodType(_forward, module)


def remove(module: nn.Module) -> None:
    """Give the layer its own forward back."""
    del module.__dict__["partial"], module.__dict__["forward"]
