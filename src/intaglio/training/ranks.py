"""Agreement between the processes of a distributed run; alone, every function gives back what it was given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.entries import Whole
from ..core.fingerprint import fingerprint
from ..core.selection import Selection

__all__ = ["greatest", "mean_gradient", "mean_losses", "processes", "refuse_differing", "same_sets"]


def processes() -> int:
    """Number of processes of this run; 1 where it is not distributed."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if there else 1


def refuse_differing(selection: Selection) -> None:
    """Refuse to go on where processes chose different entries.

    Raises:
        ValueError: on every rank.
    """
    if processes() == 1:
        return
    own = [(name, e.kind, None if isinstance(e, Whole) else fingerprint(e.flat())) for name, e in selection.items()]
    ranks: list[Any] = [None] * processes()
    torch.distributed.all_gather_object(ranks, own)
    if any(other != own for other in ranks):
        raise ValueError("the processes of this run chose different entries; give every one the same probe, seed and exclude")


def mean_gradient(gradient: Tensor) -> Tensor:
    """The mean of the processes' gradients: hooks see each process's own."""
    if processes() == 1:
        return gradient
    total = gradient.clone()  # it may share its storage with another parameter's
    torch.distributed.all_reduce(total)
    return total.div_(processes())


def mean_losses(losses: list[float], device: torch.device) -> list[float]:
    """The mean of the processes' losses, each by itself, in fp64."""
    if processes() == 1:
        return losses
    total = torch.tensor(losses, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(total)
    return (total / processes()).tolist()


def greatest(number: int, device: torch.device) -> int:
    """The greatest of the processes' numbers."""
    if processes() == 1:
        return number
    shared = torch.tensor(number, device=device)
    torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
    return int(shared)


def same_sets(sets: list[list[int]], total: int, device: torch.device) -> list[list[int]]:
    """The first process's sets of numbers below `total`, on every process, each ascending."""
    if processes() == 1 or not sets:
        return sets
    rows = torch.zeros(len(sets), total, dtype=torch.uint8)
    for row, places in zip(rows, sets, strict=True):
        row[places] = 1
    rows = rows.to(device)
    torch.distributed.broadcast(rows, 0)
    return [row.nonzero().flatten().tolist() for row in rows.cpu()]
