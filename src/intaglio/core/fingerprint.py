"""Fingerprints of tensors, and the mark of a model that is being trained."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

__all__ = ["ATTACHED", "checksum", "fingerprint", "is_attached"]

ATTACHED = "intaglio_slots"  # the submodule that a tuner adds to its model


def fingerprint(values: Tensor) -> str:
    """Hash of a tensor's exact bytes, type and shape: 16 hex digits of SHA-256."""
    header = f"{values.dtype}{list(values.shape)}".encode()
    raw = values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(header + raw.tobytes()).hexdigest()[:16]


def checksum(values: Tensor) -> int:
    """Sum of a tensor's bits, as whole numbers modulo 2^64: that of some entries can be taken away from that of all.

    0 for a tensor that holds no values here (on the meta device).
    """
    if values.is_meta:
        return 0
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    return int(values.detach().view(whole).sum(dtype=torch.int64))


def is_attached(model: nn.Module) -> bool:
    """Whether a tuner stands on a model, and writes into its weights after every step."""
    return ATTACHED in model._modules
