"""The train block: keys of TRL's SFTConfig, verbatim, with a few defaults of ours."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from .run_file import unknown_keys

__all__ = ["sft_config", "train_hints", "train_problems"]


def sft_config(train: Mapping[str, Any], output_dir: str) -> Any:
    """SFTConfig from the train block.

    Defaults are TRL's, but for: no reporting service unless `report_to` names one, bf16 only on a GPU, and no
    activation checkpointing (what a sparse method keeps for backward is small; set it where memory is short).

    Raises:
        ValueError: where SFTConfig refuses a value.
    """
    import torch
    from trl.trainer.sft_config import SFTConfig

    gpu = torch.cuda.is_available()
    ours: dict[str, Any] = {"report_to": "none", "bf16": gpu, "dataloader_pin_memory": gpu}
    checkpointing = ("activation_checkpointing", "gradient_checkpointing")  # the new name, and that of transformers < 5.20
    if not train.keys() & set(checkpointing):
        known = {f.name for f in dataclasses.fields(SFTConfig)}
        ours[next(name for name in checkpointing if name in known)] = False
    fields: dict[str, Any] = ours | {"output_dir": output_dir} | dict(train)
    try:
        return SFTConfig(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"train: {str(error).splitlines()[0]}") from error


def train_hints() -> dict[str, Any]:
    """The types of SFTConfig's fields, by name."""
    from trl.trainer.sft_config import SFTConfig

    return typing.get_type_hints(SFTConfig)


def train_problems(train: Any) -> list[str]:
    """Unknown keys of a train block, and plain values of another type than SFTConfig's; a line each."""
    if not isinstance(train, dict) or not train:
        return []
    from trl.trainer.sft_config import SFTConfig

    hints = train_hints()
    problems = unknown_keys("train", train, [f.name for f in dataclasses.fields(SFTConfig)])
    if train.get("max_steps") == 0:
        problems.append("train.max_steps=0: trains nothing; give the number of updates, or leave it out for whole epochs")
    if not isinstance(train.get("output_dir", ""), str):
        problems.append(f"train.output_dir={train['output_dir']!r}: wanted is a folder's name")
    for key in train.keys() & hints.keys():
        kinds = set(typing.get_args(hints[key]) or (hints[key],))
        if kinds <= {int, float, bool, type(None)} and type(train[key]) not in kinds | ({int} if float in kinds else set()):
            wanted = " or ".join(sorted(kind.__name__ for kind in kinds))
            problems.append(f"train.{key}={train[key]!r}: wanted is {wanted}")
    return problems
