"""Names of adapters, and the names and figures that PEFT's own LoRA folders use."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

__all__ = ["LORA_KEY", "PREFIX", "RANKS", "changes_base", "check_name", "lora_key", "lora_scale"]

PREFIX = "base_model.model."  # what PEFT puts before the path of every module
LORA_KEY = re.compile(rf"{re.escape(PREFIX)}(?P<path>.+)\.lora_(?P<letter>[AB])\.weight")
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM takes as max_lora_rank, and our exports pad ranks to
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,127}")
_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")  # prefixes of `init_lora_weights` that change the base itself


def check_name(name: str) -> str:
    """The name, if an adapter may have it: no part of a path, no option of a command line.

    Raises:
        ValueError: for any other.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"adapter name {name!r}: give 1 to 128 letters, digits, '_', '.', ':' and '-', a letter, digit or '_' first"
        )
    return name


def lora_key(path: str, letter: str) -> str:
    """Key of a module's factor "A" or "B" in the weights file of a LoRA.

    >>> lora_key("model.layers.0.mlp.down_proj", "A")
    'base_model.model.model.layers.0.mlp.down_proj.lora_A.weight'
    """
    return f"{PREFIX}{path}.lora_{letter}.weight"


def lora_scale(config: Mapping[str, Any], path: str, rank: int) -> float:
    """What a LoRA multiplies B·A of a module by: alpha / rank, or alpha / √rank.

    Args:
        config: the LoRA's config.
        path: of the module.
        rank: of its factors.

    Source: PEFT 0.21, `get_pattern_key`: the first pattern that matches the end of the path counts.
    """
    patterns = config.get("alpha_pattern") or {}
    alpha = next((a for key, a in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def changes_base(config: Mapping[str, Any]) -> str | None:
    """The start that a LoRA took which changes the base's own weights (PiSSA and its like); None for any other."""
    start = config.get("init_lora_weights")
    return start if isinstance(start, str) and start.lower().startswith(_CHANGING) else None
