"""The tensors an adapter keeps for one parameter: fresh or vacant, held against the base, put in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..adapter.record import Record, stored_index
from ..core.entries import Entries
from ..core.fingerprint import fingerprint

__all__ = ["call_with", "check_base", "fresh", "replaced", "vacant"]


def check_base(name: str, record: Record, entries: Entries, weight: Tensor) -> None:
    """Refuse a base that is not the one an adapter was trained on.

    Raises:
        ValueError: naming the parameter, what was expected and what was found.
    """
    if weight.dtype != record.dtype:
        raise ValueError(
            f"{name}: trained on a {record.dtype} base, the model is {weight.dtype}; load it with dtype={record.dtype}"
        )
    found = fingerprint(entries.to(weight.device).gather(weight))
    if found != record.fingerprint:
        raise ValueError(
            f"{name}: base fingerprint {record.fingerprint} expected, {found} found: the model is not the base this adapter "
            "was trained on, or it has been changed since"
        )


def call_with(module: nn.Module, weights: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a module with other tensors in place of some of its parameters."""
    own = vars(module)
    shadowing = {name: own[name] for name in weights if name in own}  # FSDP puts views before the parameters
    if not shadowing:
        return functional_call(module, weights, args, kwargs)
    try:
        own.update(weights)
        return module(*args, **kwargs)
    finally:
        own.update(shadowing)


def fresh(entries: Entries, weight: Tensor, *, noise: bool) -> tuple[Tensor | None, Tensor]:
    """Stored index and start values of a new adapter: the base's own."""
    base = entries.to(weight.device).gather(weight)
    values = base.to(torch.promote_types(weight.dtype, torch.float32))
    if noise:
        values = values + torch.randn_like(values) * values.abs().mean()
    index = stored_index(entries)
    return None if index is None else index.to(weight.device), values


def vacant(record: Record, weight: Tensor) -> tuple[Tensor | None, Tensor]:
    """Index and values that mean "not loaded": they fail every check."""
    dtype = torch.promote_types(record.dtype, torch.float32)
    values = torch.full(record.values_shape, float("nan"), dtype=dtype, device=weight.device)
    if record.indices is None:
        return None, values
    return torch.full(record.index_shape, -1, dtype=record.index_dtype, device=weight.device), values


def replaced(weight: Tensor, values: Tensor, index: Tensor | None, dim: int | None) -> Tensor:
    """`weight` with `values`, rounded to its type, at `index`; a new tensor."""
    values = values.to(weight.dtype)
    if index is None:
        return values
    if dim is not None:
        return weight.index_copy(dim, index, values)
    return weight.flatten().index_copy(0, index, values).view(weight.shape)
