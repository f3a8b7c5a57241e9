"""The tensors an adapter keeps for one parameter: fresh or vacant, held against the base, put in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..adapter.record import Record, stored_index
from ..core.entries import Entries
from ..core.fingerprint import fingerprint

__all__ = ["Tuned", "call_with", "fresh", "vacant"]


@final
@dataclass(frozen=True)
class Tuned:
    """The values that an adapter puts in place of some entries of one parameter.

    Args:
        record: what the adapter's config says of the parameter.
        values: compact; fp32, unless they were cast to the base's type.
        stored: the index as it is stored; None for a whole parameter.
    """

    record: Record
    values: Tensor
    stored: Tensor | None

    @property
    def entries(self) -> Entries:
        """Their places.

        Raises:
            ValueError: for a stored index that is damaged or was never loaded.
        """
        return self.record.entries(self.stored)

    @property
    def index(self) -> Tensor | None:
        """Their places as int64: of slices along `record.dim`, of elements in the flat parameter; None for all."""
        return None if self.stored is None else self.record.offsets(self.stored)

    def placed(self, weight: Tensor) -> Tensor:
        """`weight` with the values, rounded to its type, in place; a new tensor, differentiable in the values."""
        values, index = self.values.to(weight.dtype), self.index
        if index is None:
            return values
        if self.record.dim is not None:
            return weight.index_copy(self.record.dim, index, values)
        return weight.flatten().index_copy(0, index, values).view(weight.shape)

    def is_loaded(self) -> bool:
        """Whether no tensor is `vacant`."""
        tensors = [self.values] if self.stored is None else [self.values, self.stored]
        return not any(t.is_meta or bool((t.isnan() if t.is_floating_point() else t == -1).all()) for t in tensors)

    def check(self, name: str, adapter: str, weight: Tensor) -> None:
        """Refuse tensors that are damaged or missing, and a base that is not the one they were trained on.

        Args:
            name: of the parameter, for messages.
            adapter: name of the adapter, for messages.
            weight: the base's parameter.

        Raises:
            ValueError: naming the parameter, what was expected and what was found.
        """
        try:
            entries = self.entries
        except ValueError as error:
            raise ValueError(f"{name}: adapter {adapter!r} is damaged, or its tensors were never loaded: {error}") from error
        if not bool(self.values.isfinite().all()):
            raise ValueError(f"{name}: values of adapter {adapter!r} are not all finite, or were never loaded")
        expected = self.record
        if weight.dtype != expected.dtype:
            raise ValueError(
                f"{name}: trained on a {expected.dtype} base, the model is {weight.dtype}; load it with dtype={expected.dtype}"
            )
        found = fingerprint(entries.to(weight.device).gather(weight))
        if found != expected.fingerprint:
            raise ValueError(
                f"{name}: base fingerprint {expected.fingerprint} expected, {found} found: the model is not the base this "
                "adapter was trained on, or it has been changed since"
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
