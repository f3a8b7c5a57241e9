"""The processes of one run: all that this library knows of them. Alone, every function gives back what it was given.

torchrun, accelerate and others start the processes and join them. What stands here is called by all of them, or by none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from ..core.entries import Whole
from ..core.fingerprint import fingerprint
from ..core.selection import Selection

__all__ = [
    "average_",
    "count",
    "first_decides",
    "gathered",
    "greatest",
    "is_first",
    "joined",
    "mean_losses",
    "rank",
    "refuse_differing",
    "rows",
    "same_sets",
    "scattered_mean",
    "together",
    "total",
    "wait",
]

T = TypeVar("T")


def count() -> int:
    """Number of processes of this run; 1 where it is not distributed."""
    there = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if there else 1


def rank() -> int:
    """Number of this process among them, from 0."""
    return distributed.get_rank() if count() > 1 else 0


def is_first() -> bool:
    """Whether this is the process that writes files and speaks to the user."""
    return rank() == 0


def wait() -> None:
    """Wait until all processes are here."""
    if count() > 1:
        distributed.barrier()


def gathered(value: T) -> list[T]:
    """Every process's value, a small object, in the order of the processes."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    distributed.all_gather_object(values, value)
    return values


def first_decides(make: Callable[[], T]) -> T:
    """What the first process makes, a small object; an error of its is raised in all.

    Raises:
        ValueError: in every process, where the first raises one.
    """
    if count() == 1:
        return make()
    made: T | None = None
    refusal = None
    if is_first():
        try:
            made = make()
        except ValueError as error:
            refusal = error
    outcome: list[Any] = [made, None if refusal is None else str(refusal)]
    distributed.broadcast_object_list(outcome, 0)
    if outcome[1] is not None:
        raise ValueError(outcome[1]) from refusal
    return outcome[0]


def together(make: Callable[[], T]) -> T:
    """What every process makes by itself; where any refuses, all do, with the words of the first that does.

    Raises:
        ValueError: in every process.
    """
    made: T | None = None
    refusal = None
    try:
        made = make()
    except ValueError as error:
        if count() == 1:
            raise
        refusal = error
    refusals = [said for said in gathered(None if refusal is None else str(refusal)) if said is not None]
    if refusals:
        raise ValueError(refusals[0]) from refusal
    return made  # type: ignore[return-value]  # it was made


def refuse_differing(selection: Selection) -> None:
    """Refuse to go on where processes chose different entries.

    Raises:
        ValueError: on every rank.
    """
    own = [(name, e.kind, None if isinstance(e, Whole) else fingerprint(e.flat())) for name, e in selection.items()]
    if count() > 1 and any(other != own for other in gathered(own)):
        raise ValueError("the processes of this run chose different entries; give every one the same probe, seed and exclude")


def average_(parameters: Iterable[nn.Parameter]) -> None:
    """Make the gradients of some parameters their mean over the processes, in one message for each type.

    A gradient that only some processes have (a mixture's expert that saw no token) counts as 0 in the others; one that none
    has stays away.
    """
    if count() == 1:
        return
    alike: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for parameter in parameters:
        alike.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for (dtype, device), group in alike.items():
        there = torch.tensor([p.grad is not None for p in group], dtype=dtype, device=device)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in group]
        flat = torch.cat([*(g.reshape(-1) for g in gradients), there])
        distributed.all_reduce(flat)
        means = flat.div_(count()).split([*(g.numel() for g in gradients), len(group)])
        for i, (parameter, mean) in enumerate(zip(group, means, strict=False)):
            if parameter.grad is not None:
                parameter.grad.copy_(mean.view_as(parameter))
            elif bool(means[-1][i]):
                parameter.grad = mean.view_as(parameter).clone()


def scattered_mean(gradient: Tensor) -> tuple[Tensor, int]:
    """The part of the processes' mean gradient that is this process's, and where it begins.

    Args:
        gradient: flat, `[n]`; left as it is.

    Returns:
        The whole and 0 where there is one process; else one of as many neighbouring parts, of which the last may be short.
    """
    if count() == 1:
        return gradient, 0
    size = -(-gradient.numel() // count())
    padded = torch.nn.functional.pad(gradient, (0, size * count() - gradient.numel()))
    part = gradient.new_empty(size)
    distributed.reduce_scatter_tensor(part, padded)
    first = min(rank() * size, gradient.numel())
    return part[: gradient.numel() - first].div_(count()), first


def joined(own: Tensor) -> Tensor:
    """The processes' tensors of one dimension, whose lengths may differ, one after the other."""
    if count() == 1:
        return own
    counts = rows(torch.tensor([own.numel()], device=own.device)).flatten().tolist()
    padded = torch.nn.functional.pad(own, (0, max(counts) - own.numel()))
    return torch.cat([row[:n] for row, n in zip(rows(padded), counts, strict=True)])


def rows(own: Tensor) -> Tensor:
    """The processes' tensors of one length, `[n]` → `[processes, n]`."""
    if count() == 1:
        return own[None]
    mine = _on_wire(own.contiguous())
    parts = mine.new_empty(count() * mine.numel())
    distributed.all_gather_into_tensor(parts, mine)
    return parts.view(count(), -1).to(own.device)


def total(own: Tensor) -> Tensor:
    """The sum of the processes' tensors, on the device of this one's."""
    if count() == 1:
        return own
    summed = _on_wire(own.clone())
    distributed.all_reduce(summed)
    return summed.to(own.device)


def mean_losses(losses: list[float], device: torch.device) -> list[float]:
    """The mean of the processes' losses, each by itself, in fp64."""
    return (total(torch.tensor(losses, dtype=torch.float64, device=device)) / count()).tolist()


def greatest(number: int) -> int:
    """The greatest of the processes' numbers."""
    return max(gathered(number))


def same_sets(sets: Sequence[list[int]]) -> list[list[int]]:
    """The first process's sets of numbers, on every process."""
    return first_decides(lambda: [list(numbers) for numbers in sets])


def _on_wire(tensor: Tensor) -> Tensor:
    """A tensor where the processes' connection takes it from: NCCL knows GPUs only."""
    return tensor.cuda() if distributed.get_backend() == "nccl" and not tensor.is_cuda else tensor
