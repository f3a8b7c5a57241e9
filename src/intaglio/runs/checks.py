"""Checks before the first step, of all that can be known by then: model, tokenizer, lengths, packages, rows."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .data import Examples

__all__ = ["check_model", "check_packages", "check_tokenizer", "rows_used"]

# What SFTConfig's values need beside the `train` extra: part of the value → (module, package).
_OPTIMIZERS = {
    "8bit": "bitsandbytes",
    "bnb": "bitsandbytes",
    "paged": "bitsandbytes",
    "galore": "galore_torch",
    "lomo": "lomo_optim",
    "apollo": "apollo_torch",
    "schedule_free": "schedulefree",
    "4bit": "torchao",
    "torchao": "torchao",
    "stable_adamw": "optimi",
    "grokadamw": "grokadamw",
}
_GENERATES = ("CausalLM", "LMHeadModel", "ConditionalGeneration")


def check_packages(train: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """Refuse settings that need a package which is not installed, or what this version cannot do.

    Args:
        train: the train block.
        model: the arguments of `from_pretrained`.

    Raises:
        ValueError: naming the setting and the package.
    """
    optimizer = str(train.get("optim", ""))
    needed = [("train.optim", optimizer, package) for part, package in _OPTIMIZERS.items() if part in optimizer]
    if train.get("use_liger_kernel"):
        needed.append(("train.use_liger_kernel", "true", "liger_kernel"))
    attention = str(model.get("attn_implementation", ""))
    if attention.startswith("flash_attention"):
        needed.append(("model.attn_implementation", attention, "flash_attn"))
    for key, value, package in needed:
        if find_spec(package) is None:
            raise ValueError(f"{key}={value}: needs the package {package}, which is not installed; install it or take another")
    for key in ("load_in_4bit", "load_in_8bit", "quantization_config"):
        if model.get(key):
            raise ValueError(f"model.{key}: no quantized base can be trained yet; leave it out, e.g. with model.dtype=bfloat16")


def check_model(config: Any, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> None:
    """Refuse a model that generates no text, and one that its tokenizer or the length of rows does not fit.

    Args:
        config: of the model.
        tokenizer: as it will be used.
        max_length: tokens of a row at most; None for no limit.

    Raises:
        ValueError: with both numbers.
    """
    kinds = config.architectures or []
    generates = not kinds or any(name in kind for kind in kinds for name in _GENERATES)
    if config.is_encoder_decoder or not (generates or "AutoModelForCausalLM" in _own_code(config)):
        raise ValueError(
            f"model: is a {', '.join(kinds) or config.model_type}; `intaglio train` fine-tunes causal language models: take one, "
            "or `attach` in a loop or Trainer of your own"
        )
    text = config.get_text_config()
    embeddings, tokens = getattr(text, "vocab_size", None), len(tokenizer)
    if embeddings is not None and tokens > embeddings:
        raise ValueError(
            f"model: the tokenizer has {tokens:,} tokens, the model {embeddings:,} embeddings; take the model's own tokenizer, "
            "or resize the embeddings and save the model first (a sparse adapter does not hold new rows)"
        )
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and max_length is not None and max_length > positions and not getattr(text, "rope_scaling", None):
        raise ValueError(f"train.max_length={max_length}: the model has {positions:,} positions; set it to that at most")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, examples: Examples) -> None:
    """Refuse conversations for a tokenizer that has no chat template.

    Raises:
        ValueError: naming what to do.
    """
    row = next(iter(examples.train))
    if (not isinstance(row.get("prompt", ""), str) or "messages" in row) and not tokenizer.chat_template:
        raise ValueError(
            "data: the rows are conversations, and the model's tokenizer has no chat template; use an instruction-tuned "
            "model, set train.chat_template_path, or give prompt and completion as strings with data.chat=false"
        )


def rows_used(examples: Examples, trainer: Any) -> dict[str, Any]:
    """How many training rows are left once they are tokenized, and which columns nobody reads; both are also warned of.

    Returns:
        rows and left_out (None where rows are packed, or come as a stream), unused (column → rows in which it is filled).

    Raises:
        ValueError: where no row is left.
    """
    unused = dict(examples.unused)
    if unused:
        counts = ", ".join(f"{name} (filled in {count:,} rows)" for name, count in unused.items())
        warnings.warn(f"data: not used: {counts}; map a column with data.columns to train on it", stacklevel=2)
    if examples.is_streamed:
        return {"rows": None, "left_out": None, "unused": unused}
    rows, used = len(examples.train), len(trainer.train_dataset)  # type: ignore[arg-type]  # no stream
    if used == 0 or (used < rows and not trainer.args.packing):
        said = (
            f"data: {rows - used:,} of {rows:,} rows are left out: nothing of them that is trained on lies within the first "
            f"{trainer.args.max_length} tokens; raise train.max_length"
        )
        if used == 0:
            raise ValueError(said)
        warnings.warn(said, stacklevel=2)
    return {"rows": rows, "left_out": None if trainer.args.packing else rows - used, "unused": unused}


def _own_code(config: Any) -> Any:
    return getattr(config, "auto_map", None) or ()
