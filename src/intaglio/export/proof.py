"""The proof that an exported folder, read by the stock library alone, computes what the tuned model computes."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..adapter.delta import Delta

__all__ = ["Answer", "InexactExport", "Inputs", "answer", "applied", "compare", "prompts", "tuned_answer"]

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
class Inputs:
    """What a model is asked.

    Attributes:
        name: the argument that answers go on from (`input_ids`; `decoder_input_ids` where there is an encoder), or that is
            looked at (`pixel_values`).
        given: its value, of which the first dimension counts prompts; tokens are int64 `[prompts, tokens]`.
        fixed: other arguments.
    """

    name: str
    given: Tensor
    fixed: Mapping[str, Tensor] = field(default_factory=dict)

    def logits(self, model: Any) -> Tensor:
        """A model's first output, in fp32 on the CPU."""
        mask = {"attention_mask": torch.ones_like(self.given)} if self.name == "input_ids" else {}
        arguments = {self.name: self.given, **mask, **self.fixed}
        return model(**{name: tensor.to(model.device) for name, tensor in arguments.items()})[0].float().cpu()


@dataclass(frozen=True)
class Answer:
    """A model's greedy continuation and its logits.

    Attributes:
        inputs: prompts and what follows them.
        logits: at every token of them, fp32 `[prompts, tokens, vocabulary]` (a classifier's: `[prompts, classes]`).
        generated: how many of the tokens of a row the model chose, and one pass can tell; 0 for a model that generates none.
        asked: tokens of a prompt; None for a model that generates none.
    """

    inputs: Inputs
    logits: Tensor
    generated: int
    asked: int | None = None

    @property
    def prompt(self) -> Inputs:
        """The inputs without what was generated."""
        given = self.inputs.given
        return replace(self.inputs, given=given if self.asked is None else given[:, : self.asked])

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


def prompts(model: Any, tokenizer: Any = None) -> Inputs:
    """Fixed inputs that a model takes: 8 tokens drawn at random, a few texts where there is a tokenizer; or pictures of noise.

    Raises:
        ValueError: for a model that takes something else, such as sound.
    """
    generator = torch.Generator().manual_seed(0)
    main = getattr(model, "main_input_name", "input_ids")
    if main == "pixel_values":
        config = getattr(model.config, "vision_config", model.config)
        size = getattr(config, "image_size", 224)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        pictures = torch.randn(_DRAWN, getattr(config, "num_channels", 3), height, width, generator=generator)
        return Inputs(main, pictures.to(model.dtype))
    if main != "input_ids":
        raise ValueError(f"{type(model).__name__} takes {main}: an export can be checked with tokens or pictures only")
    vocabulary = model.get_input_embeddings().num_embeddings
    drawn = torch.randint(0, vocabulary, (_DRAWN, _LENGTH), generator=generator)
    texts = [] if tokenizer is None else [tokenizer(text)["input_ids"][:_LENGTH] for text in _TEXTS]
    fitting = [row for row in texts if len(row) == _LENGTH and max(row) < vocabulary]
    tokens = torch.cat([drawn, torch.tensor(fitting, dtype=torch.int64).reshape(-1, _LENGTH)])
    if not model.config.is_encoder_decoder:
        return Inputs("input_ids", tokens)
    return Inputs("decoder_input_ids", tokens.flip(1), {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})


@torch.no_grad()
def answer(model: Any, inputs: Inputs) -> Answer:
    """Continue prompts greedily, without a cache, and keep the logits.

    A model whose earlier tokens see later ones (the prefix of PaliGemma) gives other logits in one pass than token by token;
    of such a one the tokens do not count.

    Args:
        model: in evaluation mode.
        inputs: of `prompts`.
    """
    generates = model.can_generate() and inputs.name != "pixel_values"
    steps, start = [], inputs.given.shape[1]
    for _ in range(_NEW if generates else 0):
        steps.append(inputs.logits(model)[:, -1:])
        inputs = replace(inputs, given=torch.cat([inputs.given, steps[-1].argmax(-1)], dim=1))
    found = Answer(inputs, inputs.logits(model), len(steps), start if steps else None)
    # In types narrower than fp32 one pass rounds otherwise than several, which says nothing about the mask.
    if (
        steps
        and model.dtype == torch.float32
        and (torch.cat(steps, 1) - found.logits[:, start - 1 : -1]).abs().max().item() > found.tolerance
    ):
        return replace(found, generated=0)
    return found


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
    logits, n = reference.inputs.logits(model), reference.generated
    difference, tolerance = (logits - reference.logits).abs().max().item(), reference.tolerance
    if not difference <= tolerance:  # catches NaN too
        raise InexactExport(f"the export is not exact: a logit differs by {difference:.1e}, allowed are {tolerance:.1e}")
    if n == 0:
        return {"max_difference": difference, "tolerance": tolerance, "tokens": 0}
    chosen, expected = logits[:, -n - 1 : -1].argmax(-1), reference.inputs.given[:, -n:]
    best = reference.logits[:, -n - 1 : -1].topk(2).values
    decided = (best[..., 0] - best[..., 1]) > 2 * tolerance
    if not torch.equal(chosen[decided], expected[decided]):
        raise InexactExport("the export is not exact: it generates other tokens than the tuned model")
    return {"max_difference": difference, "tolerance": tolerance, "tokens": int(decided.sum())}
