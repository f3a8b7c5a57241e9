"""Data that a method may look at before or during training: calibration, Fisher information, layer importance."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, final

from torch import Tensor, nn

__all__ = ["Batches", "Probe"]


class Probe(Protocol):
    """A finite calibration set and a loss on it."""

    def batches(self) -> Iterator[Mapping[str, Any]]:
        """Every batch of the set once, the same ones each time, on any device: the keyword arguments of the model."""
        ...

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Scalar loss of `model` on a batch that lies on the model's device."""
        ...


def _own_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    loss = getattr(model(**batch), "loss", None)
    if not isinstance(loss, Tensor):
        raise ValueError("probe: the model returns no loss for these batches; add `labels` to them, or give loss_fn")
    return loss


@final
@dataclass(frozen=True, eq=False)
class Batches:
    """A probe made of ready batches.

    Args:
        data: batches as the model takes them, e.g. `{"input_ids": [B, T], "attention_mask": [B, T], "labels": [B, T]}`.
        loss_fn: `(model, batch) → scalar`; default the model's own loss, which needs `labels`.

    Raises:
        ValueError: for no batches.

    Example:
        >>> probe = Batches([{"input_ids": ids, "attention_mask": mask, "labels": ids}])
        >>> tuner = attach(model, S2FT(select="activation"), probe=probe)
    """

    data: Collection[Mapping[str, Any]]
    loss_fn: Callable[[nn.Module, Mapping[str, Any]], Tensor] = _own_loss

    def __post_init__(self) -> None:
        if len(self.data) == 0:
            raise ValueError("Batches: data is empty; give at least one batch")

    def batches(self) -> Iterator[Mapping[str, Any]]:
        return iter(self.data)

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        return self.loss_fn(model, batch)
