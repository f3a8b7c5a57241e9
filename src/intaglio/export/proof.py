"""The proof that an exported folder, read by the stock library alone, computes what the tuned model computes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..adapter.delta import Delta

__all__ = ["Answer", "InexactExport", "answer", "applied", "compare", "prompts", "tuned_answer"]

_LENGTH, _NEW, _DRAWN = 8, 16, 4  # tokens per prompt, tokens generated, prompts drawn at random
_TEXTS = (
    "The three largest cities of Europe, by the number of people, are",
    "def fibonacci(n: int) -> int:\n    if n < 2:\n        return",
    "Question: What is 17 + 25, and what is half of it? Answer:",
)
_TOLERANCE, _LOGITS = 2e-4, 35.0  # allowed difference, at logits of this size


class InexactExport(ValueError):
    """The exported folder does not compute what the tuned model computes."""


@dataclass(frozen=True)
class Answer:
    """A model's greedy continuation and its logits.

    Attributes:
        tokens: prompts and what follows them, int64 `[prompts, tokens]`.
        logits: at every one of them, fp32 `[prompts, tokens, vocabulary]` (a classifier's: `[prompts, classes]`).
        generated: how many of the tokens of a row the model chose; 0 for a model that generates none.
    """

    tokens: Tensor
    logits: Tensor
    generated: int

    @property
    def tolerance(self) -> float:
        """Greatest difference of a logit that fp32 summation order may cause: 2e-4 at logits up to 35."""
        return _TOLERANCE * max(1.0, self.logits.abs().max().item() / _LOGITS)


@contextmanager
def applied(delta: Delta, model: Any) -> Iterator[Any]:
    """The model with `delta` applied inside the block, and the base again after it.

    Raises:
        ValueError: as `Delta.apply_`.
    """
    delta.apply_(model)
    try:
        yield model
    finally:
        delta.revert_(model)


def prompts(model: Any, tokenizer: Any = None) -> Tensor:
    """Fixed prompts within the model's vocabulary: a few drawn at random, a few texts where there is a tokenizer.

    Returns:
        int64 `[prompts, 8]`.
    """
    vocabulary = model.get_input_embeddings().num_embeddings
    drawn = torch.randint(0, vocabulary, (_DRAWN, _LENGTH), generator=torch.Generator().manual_seed(0))
    texts = [] if tokenizer is None else [tokenizer(text)["input_ids"][:_LENGTH] for text in _TEXTS]
    fitting = [row for row in texts if len(row) == _LENGTH and max(row) < vocabulary]
    return torch.cat([drawn, torch.tensor(fitting, dtype=torch.int64).reshape(-1, _LENGTH)])


@torch.no_grad()
def answer(model: Any, tokens: Tensor) -> Answer:
    """Continue prompts greedily, without a cache, and keep the logits.

    Args:
        model: in evaluation mode.
        tokens: prompts, int64 `[prompts, 8]`.
    """
    generated = _NEW if model.can_generate() else 0
    for _ in range(generated):
        tokens = torch.cat([tokens, _logits(model, tokens)[:, -1:].argmax(-1)], dim=1)
    return Answer(tokens, _logits(model, tokens), generated)


def tuned_answer(delta: Delta, model: Any, tokenizer: Any = None) -> tuple[Any, Answer]:
    """A copy of the base in fp32, and what it answered to the prompts while the delta was applied.

    Raises:
        ValueError: as `Delta.apply_`, which checks every fingerprint first.
    """
    base = copy.deepcopy(model).eval()
    with applied(delta, base):
        base.float()
        reference = answer(base, prompts(base, tokenizer))
    return base, reference


@torch.no_grad()
def compare(reference: Answer, model: Any) -> dict[str, Any]:
    """Compare a model with the tuned model's answer.

    One pass over the tuned model's own tokens is enough: where each of them is this model's choice after the tokens
    before it, generating gives the same tokens. A choice between two logits that lie within the tolerance of each
    other (a tie) is not counted.

    Returns:
        `max_difference` of a logit, the `tolerance`, the number of greedy `tokens` compared.

    Raises:
        InexactExport: where a logit or a token differs.
    """
    logits, n = _logits(model, reference.tokens), reference.generated
    difference, tolerance = (logits - reference.logits).abs().max().item(), reference.tolerance
    if not difference <= tolerance:  # catches NaN too
        raise InexactExport(f"the export is not exact: a logit differs by {difference:.1e}, allowed are {tolerance:.1e}")
    if n == 0:
        return {"max_difference": difference, "tolerance": tolerance, "tokens": 0}
    chosen, expected = logits[:, -n - 1 : -1].argmax(-1), reference.tokens[:, -n:]
    best = reference.logits[:, -n - 1 : -1].topk(2).values
    decided = (best[..., 0] - best[..., 1]) > 2 * tolerance
    if not torch.equal(chosen[decided], expected[decided]):
        raise InexactExport("the export is not exact: it generates other tokens than the tuned model")
    return {"max_difference": difference, "tolerance": tolerance, "tokens": int(decided.sum())}


def _logits(model: Any, tokens: Tensor) -> Tensor:
    tokens = tokens.to(model.device)
    return model(input_ids=tokens, attention_mask=torch.ones_like(tokens))[0].float().cpu()
