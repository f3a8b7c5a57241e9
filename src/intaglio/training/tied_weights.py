"""A weight that is an embedding and an output head: its two gradients are summed in the head's.

Autograd keeps the head's gradient until the embedding's arrives, a tensor of the same size that is zero but for the rows
of this batch, and writes the sum into a third. Here the embedding adds its rows to the gradient that is kept: one tensor
instead of three, the same numbers in the same order. Where none is kept, or backward is itself differentiated, the
embedding gives the gradient it always gave; and autograd sums, in place.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

__all__ = ["find", "install", "remove"]


class _Tie:
    """The gradient that autograd keeps for a weight until all its uses have given theirs.

    Only what autograd alone keeps alive is found, and only by the backward that formed it: it ends with the last use.
    """

    # Autograd sums the gradients of a tensor's uses in a buffer of the graph task, which we cannot reach. But the head's
    # backward runs first and hands autograd a tensor that we made: while that stands in the buffer, a weak reference finds it,
    # and the embedding may add its rows there in place. If autograd has replaced it (a third use, a hook, anomaly mode), the
    # reference is dead, nothing is found, and the embedding gives an ordinary gradient. The number of the graph task keeps
    # two backward passes that are under way at once, nested or in threads, from writing into each other's buffers.

    def __init__(self) -> None:
        self._task, self._kept = -1, lambda: None

    def keep(self, gradient: Tensor) -> None:
        if self.kept() is None:
            self._task, self._kept = torch._C._current_graph_task_id(), TensorWeakRef(gradient)

    def kept(self) -> Tensor | None:
        return self._kept() if self._task == torch._C._current_graph_task_id() else None

    def __deepcopy__(self, memo: Any) -> _Tie:
        return _Tie()


class _Head(torch.autograd.Function):
    """The identity on a head's weight; shows the tie its gradient.

    `F.linear` gives back a transpose of what it computed. That is a view, into which autograd would never sum: so it is
    passed on as a tensor of its own.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, tie: _Tie) -> Tensor:  # type: ignore[override]
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.tie = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        if not _is_plain():
            return gradient, None
        own = gradient.detach()
        ctx.tie.keep(own)
        return own, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:  # type: ignore[override]
        return tangent.view_as(tangent)


class _Lookup(torch.autograd.Function):
    """y = weight[ids], with a gradient for the rows in `ids` only where the tie has one to add it to."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, ids: Tensor, padding: int, tie: _Tie) -> Tensor:  # type: ignore[override]
        return torch.embedding(weight, ids, padding)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        weight, ids, ctx.padding, ctx.tie = inputs
        ctx.rows = weight.shape[0]
        ctx.save_for_backward(ids)
        ctx.save_for_forward(ids)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (ids,) = ctx.saved_tensors
        kept = ctx.tie.kept() if _is_plain() else None
        if kept is None:
            return torch.ops.aten.embedding_dense_backward(gradient, ids, ctx.rows, ctx.padding, False), None, None, None
        rows, place = ids.unique(return_inverse=True)
        sums = torch.ops.aten.embedding_dense_backward(gradient, place, rows.numel(), -1, False)  # ordered as over all rows
        learns = rows != ctx.padding
        kept.index_add_(0, rows[learns], sums[learns])
        return None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:  # type: ignore[override]
        return torch.embedding(tangent, ctx.saved_tensors[0], ctx.padding)


def _is_plain() -> bool:
    """Whether nobody differentiates or traces the backward that runs."""
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _linear(self: Any, x: Tensor) -> Tensor:
    """Replaces the `forward` of an nn.Linear."""
    weight: Tensor = self.weight
    # Autocast casts a parameter once for all uses, a view at each; and the gradient of a cast is no view already.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling() and not torch.is_autocast_enabled(x.device.type):
        weight = _Head.apply(weight, self.tie)  # type: ignore[assignment]
    return F.linear(x, weight, self.bias)


def _embedding(self: Any, ids: Tensor) -> Any:
    """Replaces the `forward` of an nn.Embedding."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return F.embedding(ids, self.weight, self.padding_idx)
    return _Lookup.apply(self.weight, ids, -1 if self.padding_idx is None else self.padding_idx, self.tie)


def find(model: nn.Module, parameters: Iterable[nn.Parameter]) -> dict[int, list[nn.Module]]:
    """Id of each parameter that the model holds more than once → the plain layers that hold it."""
    uses = {id(parameter): 0 for parameter in parameters}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in uses:
            uses[id(parameter)] += 1
    found: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        weight = module._parameters.get("weight")  # none under weight_norm and its like
        # An own `forward` means somebody (accelerate's offloading, say) already stands in between: stay out.
        if weight is not None and uses.get(id(weight), 0) > 1 and _is_usual(module) and "forward" not in module.__dict__:
            found.setdefault(id(weight), []).append(module)
    return found


def _is_usual(module: nn.Module) -> bool:
    if type(module) is nn.Embedding:
        return module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
    return type(module) is nn.Linear


def install(modules: Sequence[nn.Module]) -> None:
    """Let the gradients of the weight that these layers share be summed in one tensor."""
    tie = _Tie()
    for module in modules:
        assert "forward" not in module.__dict__
        module.tie = tie  # type: ignore[assignment]  # a plain attribute
        module.forward = MethodType(_embedding if type(module) is nn.Embedding else _linear, module)


def remove(modules: Sequence[nn.Module]) -> None:
    """Give the layers their own forward back."""
    for module in modules:
        del module.__dict__["tie"], module.__dict__["forward"]
