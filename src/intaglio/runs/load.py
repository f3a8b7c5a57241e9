"""The model of a run file, with an adapter on it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..adapter.delta import Delta
from ..adapter.folder import PEFT_TYPE, read_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .config import Config

__all__ = ["apply_adapter", "load"]


def load(config: Config, adapter: Path | None) -> tuple[Any, Any]:
    """The model of a run file, with an adapter on it, and its tokenizer.

    Raises:
        ValueError: where the model cannot be had, or the folder is no adapter, before any weights are read; and where the
            adapter is damaged or belongs to another base.
    """
    from ..hf.models import check_available, load_model, load_tokenizer

    check_available(config.model.name, **config.model.kwargs())
    if adapter is not None:
        read_config(adapter)  # before any weights are read
    template = config.train.get("chat_template_path")
    tokenizer = load_tokenizer(config.model.name, chat_template=template, **config.model.kwargs())
    device = "cuda" if torch.cuda.is_available() and not config.train.get("use_cpu") else "cpu"
    model = load_model(config.model.name, device=device, **config.model.kwargs())
    return (model if adapter is None else apply_adapter(model, adapter)), tokenizer


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
