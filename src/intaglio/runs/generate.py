"""Batched greedy generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..hf.models import end_tokens

__all__ = ["Output", "encode_prompts", "generate_answers"]


class Output(NamedTuple):
    """A generated answer.

    Attributes:
        text: without special tokens and outer white space.
        is_cut: whether it was still going on when it had as many tokens as it may have.
    """

    text: str
    is_cut: bool


Prompt = str | list[dict[str, Any]]


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    batch_size: int = 32,
    max_new_tokens: int = 32,
    title: str = "evaluate",
) -> list[Output]:
    """Complete each prompt greedily.

    Prompts of like length share a batch; the order of the answers is that of the prompts.

    Args:
        prompts: strings, or lists of messages, which go through the tokenizer's chat template.
        batch_size: prompts at a time.
        max_new_tokens: tokens at most, the end token included.
        title: of the progress bar.

    Returns:
        What was generated for each prompt.
    """
    ends = end_tokens(model, tokenizer)
    config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=_pad_token(tokenizer), eos_token_id=ends
    )
    answers: list[Output] = [Output("", False)] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(str(prompts[i])))
    was_training = model.training
    model.eval()
    for start in tqdm(range(0, len(order), batch_size), desc=title, leave=False):
        rows = order[start : start + batch_size]
        inputs = encode_prompts(tokenizer, [prompts[i] for i in rows]).to(model.device)
        output = model.generate(**inputs, generation_config=config)  # type: ignore[operator]
        generated = output[:, inputs["input_ids"].shape[1] :]
        ended = torch.isin(generated, torch.tensor(ends, device=generated.device)).any(1).tolist()
        texts = tokenizer.batch_decode(generated, skip_special_tokens=True)
        for i, text, whole in zip(rows, texts, ended, strict=True):
            answers[i] = Output(text.strip(), not whole)
    model.train(was_training)
    return answers


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> Any:
    """Tokenize prompts into one batch, padded on the left."""
    texts = [p if isinstance(p, str) else _template(tokenizer, p) for p in prompts]
    # A chat template writes its own special tokens.
    special = all(isinstance(p, str) for p in prompts)
    side, token = tokenizer.padding_side, tokenizer.pad_token
    tokenizer.padding_side, tokenizer.pad_token = "left", token or tokenizer.eos_token
    try:
        return tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=special, return_token_type_ids=False)
    finally:
        tokenizer.padding_side, tokenizer.pad_token = side, token


def _template(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> str:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    return text


def _pad_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    token: Any = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return token
