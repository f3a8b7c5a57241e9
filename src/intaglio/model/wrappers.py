"""Wrappers around a model: a compiled one, and those of data parallelism, whose names are not the base's."""

from __future__ import annotations

from torch import nn

__all__ = ["refuse_parallel", "unwrapped"]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile`, `nn.DataParallel` and `DistributedDataParallel`; itself where there is no wrapper.

    A compiled model has the very same weights and layers, and sees what is done to them.
    """
    while True:
        inner = model._modules.get("_orig_mod") if _is_compiled(model) else model.module if _is_parallel(model) else None
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def refuse_parallel(model: nn.Module) -> None:
    """Refuse a model that data parallelism wraps already: it would not see parameters that come now.

    Raises:
        ValueError: naming the wrapper.
    """
    while _is_compiled(model) and isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
        model = inner
    if _is_parallel(model):
        raise ValueError(
            f"model: wrapped in {type(model).__name__}, which does not see parameters that come later: attach to the model "
            "first, and wrap tuner.model then"
        )


def _is_compiled(model: nn.Module) -> bool:
    return type(model).__name__ == "OptimizedModule"


def _is_parallel(model: nn.Module) -> bool:
    return isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
