"""The chosen entries of one parameter: all of it, whole rows or columns, or single entries.

All index tensors are int64, sorted and unique; every class here is immutable.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, final

import torch
from torch import Tensor

__all__ = ["Elements", "Entries", "Slices", "Whole", "check_index", "from_flat"]

_RUN = 16  # positions that a run needs on average, so that copying runs is faster than going through an index


class Entries(ABC):
    """The chosen entries of one parameter of a known shape."""

    kind: ClassVar[str]
    shape: tuple[int, ...]

    @property
    @abstractmethod
    def count(self) -> int:
        """Number of chosen entries."""

    @property
    @abstractmethod
    def values_shape(self) -> tuple[int, ...]:
        """Shape of the compact values that `gather` returns."""

    @abstractmethod
    def gather(self, tensor: Tensor) -> Tensor:
        """Copy the chosen entries of `tensor` (shape `self.shape`) into a new compact tensor."""

    @abstractmethod
    def scatter_(self, tensor: Tensor, values: Tensor) -> None:
        """Write compact `values` into the chosen entries of `tensor` in place, cast to its dtype."""

    @abstractmethod
    def flat(self) -> Tensor:
        """Sorted offsets of the chosen entries in the flattened parameter, int64 `[count]`."""

    def positions(self, dim: int) -> Tensor:
        """Sorted positions along `dim` that hold any chosen entry, int64, on the CPU."""
        return torch.unravel_index(self.flat(), self.shape)[dim].unique()

    @abstractmethod
    def to(self, device: torch.device) -> Entries:
        """The same entries with their index on `device`."""

    @property
    def numel(self) -> int:
        """Number of entries of the whole parameter."""
        return math.prod(self.shape)


@final
@dataclass(frozen=True, eq=False)
class Whole(Entries):
    """Every entry of a parameter."""

    shape: tuple[int, ...]
    kind: ClassVar[str] = "whole"

    @property
    def count(self) -> int:
        return self.numel

    @property
    def values_shape(self) -> tuple[int, ...]:
        return self.shape

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor.detach().clone()

    @torch.no_grad()
    def scatter_(self, tensor: Tensor, values: Tensor) -> None:
        tensor.copy_(values)

    def flat(self) -> Tensor:
        return torch.arange(self.numel)

    def to(self, device: torch.device) -> Whole:
        return self


@final
@dataclass(frozen=True, eq=False)
class Slices(Entries):
    """Whole hyperplanes of a parameter: rows, columns, or any index along one dimension.

    Args:
        shape: shape of the parameter.
        dim: dimension the index runs along, 0 ≤ dim < len(shape).
        index: positions along `dim`, int64 `[n]`, sorted and unique, n ≥ 1.

    Raises:
        ValueError: where `dim` or `index` does not fit `shape`.
    """

    shape: tuple[int, ...]
    dim: int
    index: Tensor
    kind: ClassVar[str] = "slices"

    def __post_init__(self) -> None:
        if not 0 <= self.dim < len(self.shape):
            raise ValueError(f"dim={self.dim} does not fit a parameter of shape {list(self.shape)}")
        check_index(self.index, self.shape[self.dim])

    @property
    def count(self) -> int:
        return self.numel // self.shape[self.dim] * self.index.numel()

    @property
    def values_shape(self) -> tuple[int, ...]:
        return (*self.shape[: self.dim], self.index.numel(), *self.shape[self.dim + 1 :])

    def gather(self, tensor: Tensor) -> Tensor:
        if self.runs is None:
            return tensor.detach().index_select(self.dim, self.index)
        return torch.cat([tensor.detach().narrow(self.dim, start, length) for start, length in self.runs], self.dim)

    @torch.no_grad()
    def scatter_(self, tensor: Tensor, values: Tensor) -> None:
        if self.runs is None:
            tensor.index_copy_(self.dim, self.index, values.to(tensor))
            return
        parts = values.split([length for _, length in self.runs], self.dim)
        for (start, length), part in zip(self.runs, parts, strict=True):
            tensor.narrow(self.dim, start, length).copy_(part)

    @cached_property
    def runs(self) -> list[tuple[int, int]] | None:
        """(first, length) of each run of adjacent positions, in order; None where they are too short to copy one by one.

        Heads, and all that a co-permutation has moved together, are runs.
        """
        index = self.index.cpu()
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), (index.diff() != 1).nonzero().flatten() + 1])
        if len(starts) * _RUN > len(index):
            return None
        lengths = torch.cat([starts, torch.tensor([len(index)])]).diff()
        return list(zip(index[starts].tolist(), lengths.tolist(), strict=True))

    def flat(self) -> Tensor:
        inner = math.prod(self.shape[self.dim + 1 :])
        outer = torch.arange(math.prod(self.shape[: self.dim])) * (self.shape[self.dim] * inner)
        return (outer[:, None, None] + self.index.cpu()[None, :, None] * inner + torch.arange(inner)).flatten()

    def positions(self, dim: int) -> Tensor:
        return self.index.cpu() if dim == self.dim else super().positions(dim)

    def to(self, device: torch.device) -> Slices:
        return self if self.index.device == device else Slices(self.shape, self.dim, self.index.to(device))


@final
@dataclass(frozen=True, eq=False)
class Elements(Entries):
    """Scattered single entries of a parameter.

    Args:
        shape: shape of the parameter (may be `()`).
        index: offsets in the flattened parameter, int64 `[n]`, sorted and unique, n ≥ 1.

    Raises:
        ValueError: where `index` does not fit `shape`.
    """

    shape: tuple[int, ...]
    index: Tensor
    kind: ClassVar[str] = "elements"

    def __post_init__(self) -> None:
        check_index(self.index, self.numel)

    @property
    def count(self) -> int:
        return self.index.numel()

    @property
    def values_shape(self) -> tuple[int, ...]:
        return (self.index.numel(),)

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor.detach().take(self.index)

    @torch.no_grad()
    def scatter_(self, tensor: Tensor, values: Tensor) -> None:
        tensor.put_(self.index, values.to(tensor))

    def flat(self) -> Tensor:
        return self.index.cpu()

    def to(self, device: torch.device) -> Elements:
        return self if self.index.device == device else Elements(self.shape, self.index.to(device))


def check_index(index: Tensor, size: int) -> None:
    """Refuse an index that is not int64, one-dimensional, non-empty, sorted, unique and within `[0, size)`.

    Raises:
        ValueError: naming the first rule that is broken.
    """
    if index.dtype != torch.int64 or index.dim() != 1:
        raise ValueError(f"an index must be a 1-D int64 tensor, found {index.dtype} with shape {list(index.shape)}")
    if index.numel() == 0:
        raise ValueError("an index must name at least one entry; leave the parameter out to freeze it")
    if bool((index[1:] <= index[:-1]).any()):
        raise ValueError("an index must be sorted and free of duplicates")
    if int(index[0]) < 0 or int(index[-1]) >= size:
        raise ValueError(f"an index must lie in [0, {size}), found {int(index[0])} … {int(index[-1])}")


def from_flat(shape: tuple[int, ...], flat: Tensor) -> Entries:
    """Entries from sorted unique offsets: Whole where they are all, else Elements."""
    return Whole(shape) if flat.numel() == math.prod(shape) else Elements(shape, flat)
