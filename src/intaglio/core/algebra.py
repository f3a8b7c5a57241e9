"""Set operations on the entries of one parameter."""

from __future__ import annotations

import torch

from .entries import Elements, Entries, Slices, Whole, from_flat

__all__ = ["difference", "same", "shared", "union", "within"]


def same(a: Entries, b: Entries) -> bool:
    """Whether two entries are the same ones, whatever their kind (Slices of all rows equal Whole)."""
    return a.shape == b.shape and a.count == b.count and (a.count == a.numel or torch.equal(a.flat(), b.flat()))


def union(a: Entries, b: Entries) -> Entries:
    """Entries of one parameter in `a` or `b`; slices along one dimension stay slices."""
    _check_shapes(a, b)
    if isinstance(a, Slices) and isinstance(b, Slices) and a.dim == b.dim:
        return Slices(a.shape, a.dim, torch.cat([a.index.cpu(), b.index.cpu()]).unique())
    return from_flat(a.shape, torch.cat([a.flat(), b.flat()]).unique())


def shared(a: Entries, b: Entries) -> Entries | None:
    """Entries of one parameter in `a` and in `b`; None where there are none."""
    return difference(a, difference(a, b))


def within(outer: Entries, inner: Entries) -> Entries:
    """The places of `inner`, a part of `outer`, in the compact values of `outer`, in the same order.

    >>> outer, inner = Slices((4, 6), 1, torch.tensor([0, 3, 5])), Slices((4, 6), 1, torch.tensor([5]))
    >>> within(outer, inner).index
    tensor([2])
    """
    if isinstance(outer, Whole):
        return inner
    if isinstance(outer, Slices) and isinstance(inner, Slices) and outer.dim == inner.dim:
        return Slices(outer.values_shape, outer.dim, torch.searchsorted(outer.index.cpu(), inner.index.cpu()))
    return Elements(outer.values_shape, torch.searchsorted(outer.flat(), inner.flat()))


def difference(a: Entries, b: Entries | None) -> Entries | None:
    """Entries of one parameter in `a` and not in `b`; None where there are none."""
    if b is None:
        return a
    _check_shapes(a, b)
    if isinstance(a, Slices) and isinstance(b, Slices) and a.dim == b.dim:
        index = a.index.cpu()[~torch.isin(a.index.cpu(), b.index.cpu())]
        return Slices(a.shape, a.dim, index) if index.numel() else None
    flat = a.flat()[~torch.isin(a.flat(), b.flat())]
    return from_flat(a.shape, flat) if flat.numel() else None


def _check_shapes(a: Entries, b: Entries) -> None:
    if a.shape != b.shape:
        raise ValueError(f"selections of different models: shapes {list(a.shape)} and {list(b.shape)} for one name")
