"""Data that a method may look at before or during training: calibration, Fisher information, layer importance."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn

__all__ = ["IGNORED", "Batches", "Probe", "batch_on", "chunks", "has_own_loss", "label_count", "rows_of"]

IGNORED = -100  # the label that transformers' losses skip


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


def has_own_loss(probe: Probe) -> bool:
    """Whether a probe was given a loss, rather than taking the model's."""
    return not isinstance(probe, Batches) or probe.loss_fn is not _own_loss


def batch_on(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on `device`."""
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def chunks(model: nn.Module, batch: Mapping[str, Any], largest: int) -> Iterator[tuple[dict[str, Any], float]]:
    """Split a batch by rows, so that no piece is larger than what the model is trained on.

    Args:
        model: whose loss is a mean over labels, shifted by one where it is a causal language model of transformers.
        batch: keyword arguments of the model.
        largest: numbers that the first tensor of a piece may hold, though at least one row; 0: no limit.

    Yields:
        A piece and its share of the batch's labels: Σ share · loss(piece) is the loss of the batch.
    """
    first = next((x for x in batch.values() if isinstance(x, Tensor) and x.dim() > 0), None)
    rows = 1 if first is None else first.shape[0]
    at_once = rows if not largest or first is None else max(1, largest * rows // max(first.numel(), 1))
    if at_once >= rows:
        yield dict(batch), 1.0
        return
    pieces = [rows_of(batch, slice(start, start + at_once), rows) for start in range(0, rows, at_once)]
    counts = [label_count(model, piece) for piece in pieces]
    for piece, count in zip(pieces, counts, strict=True):
        if count or not sum(counts):
            yield piece, count / sum(counts) if sum(counts) else 1 / len(pieces)


def rows_of(batch: Mapping[str, Any], part: slice, rows: int) -> dict[str, Any]:
    """Some rows of a batch of `rows`; what is not given row by row stays whole."""
    split = {key for key, x in batch.items() if isinstance(x, Tensor) and x.dim() > 0 and x.shape[0] == rows}
    return {key: x[part] if key in split else x for key, x in batch.items()}


def label_count(model: nn.Module, batch: Mapping[str, Any]) -> int:
    """Number of labels that the loss of a batch is a mean of; of rows, where it has none."""
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return next(x.shape[0] for x in batch.values() if isinstance(x, Tensor) and x.dim() > 0)
    shifted = labels.dim() == 2 and getattr(model, "loss_type", None) == "ForCausalLM"
    return int(((labels[:, 1:] if shifted else labels) != IGNORED).sum())
