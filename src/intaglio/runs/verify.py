"""Prove that a saved adapter, on a fresh base, is the model that was trained."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch

from ..adapter.delta import Delta
from ..adapter.folder import PEFT_TYPE, read_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["apply_adapter", "compare_check", "save_check"]

_TOKENS, _PROMPTS = 32, 4


def apply_adapter(model: PreTrainedModel, folder: str | os.PathLike[str]) -> Any:
    """Apply an adapter folder, ours or PEFT's, and return the model to use.

    Raises:
        ValueError: where the folder is no adapter, is damaged, or belongs to another base.
    """
    if read_config(Path(folder)).get("peft_type") == PEFT_TYPE:
        Delta.load(folder).apply_(model)
        return model
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(folder))


@torch.no_grad()
def save_check(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]], path: Path) -> None:
    """Keep the last tokens of a few rows, where rows of one task differ, and the logits that follow them."""
    texts = [json.dumps(row, ensure_ascii=False) for row in rows[:_PROMPTS]]
    ids = [tokenizer(text)["input_ids"][-_TOKENS:] for text in texts]
    shortest = min(map(len, ids))
    input_ids = torch.tensor([row[-shortest:] for row in ids])
    safetensors.torch.save_file({"input_ids": input_ids, "logits": _last_logits(model, input_ids)}, path)


def compare_check(model: PreTrainedModel, path: Path) -> dict[str, Any]:
    """Compare a reloaded model with `save_check`'s file: `equal` (bit for bit) and the greatest difference."""
    saved = safetensors.torch.load_file(path)
    logits = _last_logits(model, saved["input_ids"])
    difference = (logits - saved["logits"]).abs().max().item()
    return {"equal": torch.equal(logits, saved["logits"]), "max_difference": difference, "prompts": len(logits)}


@torch.no_grad()
def _last_logits(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    was_training = model.training
    model.eval()
    logits = model(input_ids=input_ids.to(model.device)).logits[:, -1].cpu().contiguous()
    model.train(was_training)
    return logits
