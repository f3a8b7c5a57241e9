"""Pure scores: tensor in, fp32 tensor of the same shape out, higher is better.

Every input is cast to fp32 before any arithmetic: in bf16 a hundred scores tie where fp32 has one, and in fp16 small
gradients vanish. All but `random` are elementwise, so that a score of a chunk is the chunk of the score.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

__all__ = ["d3", "fisher", "gradient", "magnitude", "random", "snip", "stable_seed"]


def magnitude(weight: Tensor) -> Tensor:
    """|w| in fp32, shape of `weight`."""
    return weight.detach().float().abs()


def gradient(gradient: Tensor) -> Tensor:
    """|g| in fp32, shape of `gradient`."""
    return gradient.detach().float().abs()


def fisher(gradient: Tensor) -> Tensor:
    """g² in fp32: one example's share of the empirical Fisher information's diagonal, shape of `gradient`."""
    return gradient.detach().float().square()


def snip(weight: Tensor, gradient: Tensor) -> Tensor:
    """|g·w| in fp32: to first order, what the loss changes by if the weight is set to zero (arXiv 1810.02340)."""
    return (gradient.detach().float() * weight.detach().float()).abs()


def d3(weight: Tensor, gradient: Tensor, exponent: float = 1.0, eps: float = 1e-8) -> Tensor:
    """|g| / (|w| + eps)^exponent in fp32: large gradients, and for exponent > 0 small weights, first.

    Exponent 0 gives |g|; exponent −1 with eps 0 gives |g·w|. A gradient of 0 scores 0, whatever the weight: 0/0 is no
    reason to be chosen.

    >>> d3(torch.tensor([0.0, 0.5, 2.0]), torch.tensor([0.0, 1.0, -1.0]), exponent=1.0, eps=0.0).tolist()
    [0.0, 2.0, 0.5]

    Args:
        weight: any float type.
        gradient: of `weight`'s shape.
        exponent: how much small weights are preferred; below 0, large ones. Default 1.
        eps: what keeps the denominator from 0; the larger, the less the weight matters. Default 1e-8.
    """
    size, base = gradient.detach().float().abs(), weight.detach().float().abs() + eps
    score = size * base.pow(-exponent) if exponent < 0 else size / base.pow(exponent)
    return torch.where(size == 0, size, score)


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
