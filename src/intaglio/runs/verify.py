"""The command `verify`: a proof that a saved adapter, on a fresh base, is the model that was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch

from ..core.files import write_whole
from .folder import ADAPTER, CHECK
from .load import load, stored_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["CHECKED", "save_check", "verify"]

CHECKED, _TOKENS = 4, 32  # rows of a run, and tokens of each


def verify(run: Path, *, trust: bool = False) -> dict[str, Any]:
    """Reload a finished run's adapter onto a fresh base and compare logits with the trained model's.

    Args:
        run: its folder.
        trust: as `load.stored_config`.

    Returns:
        run, adapter, `equal` (bit for bit), `max_difference` of a logit, and the number of prompts.

    Raises:
        ValueError: where `run` is no finished run, or its adapter is damaged or does not fit the base.
    """
    config, adapter = stored_config(run, trust=trust), run / ADAPTER
    model, _ = load(config, adapter)
    saved = safetensors.torch.load_file(run / CHECK)
    logits = _last_logits(model, saved["input_ids"])
    difference = (logits - saved["logits"]).abs().max().item()
    equal = {"equal": torch.equal(logits, saved["logits"]), "max_difference": difference, "prompts": len(logits)}
    return {"run": str(run), "adapter": str(adapter), **equal}


@torch.no_grad()
def save_check(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]], path: Path) -> None:
    """Keep the last tokens of a few rows, where rows of one task differ, and the logits that follow them."""
    texts = [json.dumps(row, ensure_ascii=False) for row in rows]
    ids = [tokenizer(text)["input_ids"][-_TOKENS:] for text in texts]
    shortest = min(map(len, ids))
    input_ids = torch.tensor([row[-shortest:] for row in ids])
    write_whole(path, safetensors.torch.save({"input_ids": input_ids, "logits": _last_logits(model, input_ids)}))


@torch.no_grad()
def _last_logits(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    was_training = model.training
    model.eval()
    logits = model(input_ids=input_ids.to(model.device)).logits[:, -1].cpu().contiguous()
    model.train(was_training)
    return logits
