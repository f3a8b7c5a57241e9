"""The model of a run file, with an adapter on it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..adapter.delta import Delta
from ..adapter.folder import PEFT_TYPE, TEMPLATE, own_template, read_config
from .config import Config, load_config
from .folder import RESULT, adapter_of, read_run

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["apply_adapter", "load", "stored_config", "template_of"]


def stored_config(run: Path, overrides: Sequence[str] = (), *, trust: bool = False) -> Config:
    """The settings of a finished run, for a command that trains nothing.

    Args:
        run: the run's folder, which may come from somebody else.
        overrides: `block.key=value` strings on top.
        trust: let the folder's settings run code of its base's, as the user says on the command line; default False.

    Raises:
        ValueError: where `run` is no finished run, and where it asks for what would run code.
    """
    blocks = read_run(run)["config"]
    asked = [key for key, value in (blocks.get("model") or {}).items() if _runs_code(key, value)]
    if asked and not trust:
        raise ValueError(
            f"{run / RESULT}: model.{asked[0]}={blocks['model'][asked[0]]!r} would run code that this folder names; say "
            "--trust-remote-code if you trust whoever made it"
        )
    return load_config(blocks, overrides, build=False)


def _runs_code(key: str, value: Any) -> bool:
    """Whether an argument of `from_pretrained` runs Python or native code from elsewhere, or unpickles it."""
    kernels = key in ("attn_implementation", "experts_implementation") and "/" in str(value)
    return (
        kernels
        or (key in ("trust_remote_code", "use_kernels", "kernel_config") and bool(value))
        or (key == "weights_only" and value is False)
    )


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
    own = None if adapter is None else own_template(adapter)
    template = config.train.get("chat_template_path") if own is None else None
    tokenizer = load_tokenizer(config.model.name, chat_template=template, **config.model.kwargs())
    if own is not None:
        tokenizer.chat_template = own
    device = "cuda" if torch.cuda.is_available() and not config.train.get("use_cpu") else "cpu"
    model = load_model(config.model.name, device=device, **config.model.kwargs())
    return (model if adapter is None else apply_adapter(model, adapter)), tokenizer


def template_of(path: Path) -> str | None:
    """The chat template that an adapter folder, or a run, was trained with; None for its base's.

    Raises:
        ValueError: where a run names a template that is not there any more.
    """
    adapter, run = adapter_of(path)
    own = own_template(adapter)
    named = None if own is not None or run is None else run["config"].get("train", {}).get("chat_template_path")
    if named is None:
        return own
    if not Path(named).is_file():
        raise ValueError(
            f"{path}: was trained with the chat template {named}, which is not there; put it back, or copy it to "
            f"{adapter / TEMPLATE}"
        )
    return Path(named).read_text(encoding="utf-8")


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
