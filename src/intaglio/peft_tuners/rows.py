"""The pieces of a mixed batch, one per adapter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["split_rows"]


def split_rows(
    path: str, names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[tuple[str, Tensor, tuple[Any, ...], dict[str, Any]]]:
    """Split a module's inputs by the adapter of each row.

    Args:
        path: the module's name, for messages.
        names: one adapter name per row of the batch.
        args: positional inputs; every tensor among them has the batch as its first dimension, or 1 to broadcast.
        kwargs: keyword inputs, likewise.

    Yields:
        Adapter name, positions of its rows, and their inputs.

    Raises:
        ValueError: for a tensor whose first dimension is not the batch, as in experts that get tokens in any order.
    """
    device = next((t.device for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), None)
    for name in dict.fromkeys(names):
        index = torch.tensor([row for row, other in enumerate(names) if other == name], device=device)
        yield (
            name,
            index,
            tuple(_rows(path, value, index, len(names)) for value in args),
            {key: _rows(path, value, index, len(names)) for key, value in kwargs.items()},
        )


def _rows(path: str, value: Any, index: Tensor, batch: int) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.dim() > 0 and value.shape[0] == batch:
        return value.index_select(0, index)
    if value.dim() > 0 and value.shape[0] == 1:
        return value.expand(len(index), *value.shape[1:])
    raise ValueError(
        f"adapter_names: {path} gets a tensor of shape {list(value.shape)} for a batch of {batch}: its rows cannot be told "
        "apart; use one adapter at a time for this model"
    )
