"""The choice of a request's next token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

__all__ = ["Sampler", "Sampling"]

_LIKELY = 1024  # candidates that are looked at first: sorting a whole vocabulary takes milliseconds


@final
@dataclass(frozen=True)
class Sampling:
    """Settings by which a request's tokens are chosen.

    Args:
        max_tokens: most tokens to generate, at least 1.
        temperature: logits are divided by it; default 1. 0 takes the most likely token.
        top_p: keep the fewest most likely tokens whose probability adds up to this; default 1, all.
        top_k: keep this many of the most likely tokens; default None, all.
        seed: the same prompt and seed give the same tokens; default None, drawn.

    Raises:
        ValueError: naming the argument, for a number out of range.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens}: give at least 1")
        if self.temperature != 0 and not 1e-5 <= self.temperature <= 100:
            raise ValueError(f"temperature={self.temperature}: give 0 (greedy), or 0.00001 to 100")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: give a number above 0, at most 1")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k}: give at least 1, or None for all")
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"seed={self.seed}: give a number of 64 bits")


@final
class Sampler:
    """The source of one request's tokens, with a random state of its own.

    Args:
        sampling: what the request asked for.
    """

    def __init__(self, sampling: Sampling) -> None:
        self._sampling, self._generator = sampling, torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def __call__(self, logits_V: Tensor) -> int:
        """The next token.

        Args:
            logits_V: of one row, fp32.

        Raises:
            FloatingPointError: where they are not numbers.
        """
        logits_V = logits_V.cpu()
        best = int(logits_V.argmax())
        if not bool(torch.isfinite(logits_V[best])):  # the greatest: NaN counts as that
            raise FloatingPointError("the model's output is not finite")
        if self._sampling.temperature == 0:
            return best
        ids, probabilities = self._candidates((logits_V - logits_V[best]) / self._sampling.temperature)
        drawn = int(torch.multinomial(probabilities, 1, generator=self._generator))
        return drawn if ids is None else int(ids[drawn])

    def _candidates(self, logits_V: Tensor) -> tuple[Tensor | None, Tensor]:
        """Tokens that may be drawn (None: all) and their probabilities, not normalised."""
        top_k, top_p = self._sampling.top_k, self._sampling.top_p
        if top_k is None and top_p == 1:
            return None, logits_V.exp()
        size = min(top_k or _LIKELY, logits_V.numel())
        weights, ids = logits_V.exp().topk(size)
        total = weights.sum() if top_k is not None else logits_V.exp().sum()
        if weights.sum() < top_p * total:  # of all tokens, more than the likely ones are needed
            weights, ids = logits_V.exp().sort(descending=True)
        before = weights.cumsum(0) - weights
        kept = max(1, int((before < top_p * total).sum()))
        return ids[:kept], weights[:kept]
