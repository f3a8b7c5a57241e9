"""The change that tuned slices make to a linear layer's output, as one thin product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["add_slices", "difference"]


def difference(values: Tensor, weight: Tensor, index: Tensor, dim: int) -> Tensor:
    """The tuned slices, rounded to the base's type, less the base's: the weight's layout, at least fp32."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return values.to(weight.dtype).to(wide) - weight.detach().index_select(dim, index).to(wide)


def add_slices(x: Tensor, y: Tensor, values: Tensor, weight: Tensor, index: Tensor, dim: int, *, transposed: bool) -> Tensor:
    """Output of a linear layer whose slices are replaced.

    Args:
        x: input `[..., I]`.
        y: output of the layer with its own weight, `[..., O]`.
        values: tuned slices, in the weight's layout.
        weight: the layer's own weight `[O, I]`, or `[I, O]` where transposed; it gets no gradient.
        index: sorted positions of the slices along `dim`, int64.
        dim: dimension of the weight that the slices run along.
        transposed: whether the weight is stored as [in, out].

    Returns:
        `[..., O]`, of y's type.
    """
    thin = _ThinProduct.apply(x, values, weight, index, dim, transposed, y.dtype)
    assert isinstance(thin, Tensor)
    return y + thin if bool(dim) != transposed else y.index_add(-1, index, thin)


class _ThinProduct(torch.autograd.Function):
    """x[..., idx] Dᵀ where input columns are tuned, x Dᵀ where output rows are; D is `difference`.

    Backward keeps x[..., idx] for columns (x for rows) and no weight; D is taken again from values and base.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, weight: Tensor, index: Tensor, dim: int, transposed: bool, dtype: torch.dtype
    ) -> Tensor:
        ctx.dim, ctx.transposed, ctx.reads_inputs, ctx.x_dtype = dim, transposed, bool(dim) != transposed, x.dtype
        kept = (x.index_select(-1, index) if ctx.reads_inputs else x).to(dtype)
        ctx.width = x.shape[-1]
        ctx.save_for_backward(kept if ctx.needs_input_grad[1] else None, values, weight, index)
        changed = difference(values, weight, index, dim).to(dtype)
        return kept @ (changed if transposed else changed.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        kept, values, weight, index = ctx.saved_tensors
        grad_x = grad_values = None
        if ctx.needs_input_grad[0]:
            changed = difference(values, weight, index, ctx.dim).to(grad.dtype)
            grad_x = (grad @ (changed.t() if ctx.transposed else changed)).to(ctx.x_dtype)
            if ctx.reads_inputs:
                grad_x = grad_x.new_zeros(*grad.shape[:-1], ctx.width).index_copy_(-1, index, grad_x)
        if ctx.needs_input_grad[1]:
            rows, columns = grad.reshape(-1, grad.shape[-1]), kept.reshape(-1, kept.shape[-1])
            grad_values = (columns.t() @ rows if ctx.transposed else rows.t() @ columns).to(values.dtype)
        return grad_x, grad_values, None, None, None, None, None
