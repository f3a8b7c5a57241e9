"""Methods of a run file that PEFT runs, so that comparisons need one tool; their fields are those of a PEFT config."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from .run_file import unknown_keys

__all__ = ["PEFT_METHODS", "peft_config", "peft_fields", "peft_problems"]

PEFT_METHODS = {
    "lora": "PEFT's LoRA, for comparison; fields are LoraConfig's",
    "bottleneck": "series and parallel bottleneck adapters; fields are BottleneckConfig's",
}


def peft_config(name: str, fields: Mapping[str, Any]) -> Any:
    """The PEFT config of one of `PEFT_METHODS`, for a causal language model unless `fields` say otherwise.

    Raises:
        ValueError: for what the config's class refuses.

    Example:
        >>> peft_config("bottleneck", {"bottleneck_size": 64}).task_type
        'CAUSAL_LM'
    """
    return _class(name)(**({"task_type": "CAUSAL_LM"} | dict(fields)))


def peft_fields(name: str) -> dict[str, Any]:
    """The fields and defaults of one of `PEFT_METHODS`, without those that every PEFT config has."""
    from peft import PeftConfig

    common = {field.name for field in dataclasses.fields(PeftConfig)}
    defaults = _class(name)()
    return {field.name: getattr(defaults, field.name) for field in dataclasses.fields(defaults) if field.name not in common}


def peft_problems(block: str, name: str, fields: Mapping[str, Any]) -> list[str]:
    """Mistakes in the fields of one of `PEFT_METHODS`, a line each, under the run file's `block`."""
    if not fields:
        return []
    known = [field.name for field in dataclasses.fields(_class(name))]
    unknown = unknown_keys(block, fields, known)
    if unknown or name == "lora":  # what LoraConfig checks, it checks when the model is made
        return unknown
    try:
        peft_config(name, fields)
    except ValueError as error:
        return [f"{block}: {error}"]
    return []


def _class(name: str) -> type[Any]:
    if name == "bottleneck":
        from ..hf import BottleneckConfig

        return BottleneckConfig
    from peft import LoraConfig

    return LoraConfig
