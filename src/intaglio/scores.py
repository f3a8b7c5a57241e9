"""Pure scores: tensor in, fp32 tensor of the same shape out, higher is better."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

__all__ = ["magnitude", "random", "stable_seed"]


def magnitude(weight: Tensor) -> Tensor:
    """|w| in fp32, shape of `weight`."""
    return weight.detach().float().abs()


def random(shape: tuple[int, ...], *, seed: int, key: str) -> Tensor:
    """Uniform scores in [0, 1), fp32 `shape`, that depend on `seed` and `key` alone.

    Drawn on the CPU from a private generator: the same on every rank and device and in any call order, and the
    global random state is left alone.
    """
    generator = torch.Generator().manual_seed(stable_seed(seed, key))
    return torch.rand(shape, generator=generator)


def stable_seed(seed: int, key: str) -> int:
    """A 63-bit seed from `seed` and a name, the same in every process (Python's `hash` is salted)."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:8], "big") >> 1
