"""A PEFT LoRA folder, as far as every reader of one has to read it: its config, and its pairs of factors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from ..adapter.folder import WEIGHTS
from ..adapter.names import LORA_KEY, changes_base
from ..method_kinds.fields import count, number, refuse

__all__ = ["beyond", "check_config", "read_factors", "read_tensors"]

_MORE = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "layer_replication",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "target_parameters",
)
_LARGEST = 1e30  # of a scale: any JSON number is read, however long
_LONGEST, _REPEATS = 1000, 4  # of a pattern: its length, and how many parts of it repeat


def check_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse the config of a LoRA whose rank, scale, patterns or base's name cannot be read.

    Raises:
        ValueError: naming the folder and every such field.
    """
    problems = count("r", config.get("r")) + _scale("lora_alpha", config.get("lora_alpha"))
    base = config.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        problems.append(f"base_model_name_or_path={base!r}: give a name")
    whole = config.get("modules_to_save") or []
    if not isinstance(whole, list) or not all(isinstance(name, str) for name in whole):
        problems.append(f"modules_to_save={whole!r}: must be a list of names of modules")
    for key, check in (("rank_pattern", count), ("alpha_pattern", _scale)):
        patterns = config.get(key) or {}
        if not isinstance(patterns, Mapping):
            problems.append(f"{key}={patterns!r}: must map names of modules to numbers")
            continue
        for pattern, value in patterns.items():
            problems += _expression(key, pattern) + check(f"{key}[{pattern!r}]", value)
    refuse(f"{folder}: damaged config", problems)


def beyond(config: Mapping[str, Any]) -> str | None:
    """What a LoRA has beyond two factors and a scale; None where nothing."""
    for name in _MORE:
        if config.get(name):
            return f"{name}={config[name]!r}"
    if config.get("bias", "none") != "none":
        return f"bias={config['bias']!r}"
    start = changes_base(config)
    return f"init_lora_weights={start!r}" if start else None


def read_factors(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors of every module.

    Returns:
        Module path → (A `[r, in]`, B `[out, r]`), as stored; at least one.

    Raises:
        ValueError: naming the file and the tensor, for anything but pairs of floating-point matrices of one rank.
    """
    path = folder / WEIGHTS
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_tensors(path).items():
        found = LORA_KEY.fullmatch(key)
        if found is None:
            raise ValueError(f"{path}: holds {key!r}, which is no factor of a linear layer's LoRA")
        if not tensor.is_floating_point():
            raise ValueError(f"{path}: {key} is of {tensor.dtype}; factors are floating-point numbers")
        factors.setdefault(found["path"], {})[found["letter"]] = tensor
    if not factors:
        raise ValueError(f"{path}: holds no LoRA factors")
    for module, pair in factors.items():
        a_RI, b_OR = pair.get("A"), pair.get("B")
        fit = a_RI is not None and b_OR is not None and a_RI.dim() == b_OR.dim() == 2 and a_RI.shape[0] == b_OR.shape[1]
        if a_RI is None or b_OR is None or not fit or not a_RI.numel() or not b_OR.numel():
            shapes = {letter: list(tensor.shape) for letter, tensor in sorted(pair.items())}
            raise ValueError(f"{path}: {module}: LoRA factors A [r, in] and B [out, r] expected, found {shapes}")
    return {module: (pair["A"], pair["B"]) for module, pair in factors.items()}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, read at once: a file that changes later changes none of them.

    Raises:
        ValueError: where it is missing or damaged.
    """
    if not path.is_file():  # nor a pipe or a device, which could be read forever
        raise ValueError(f"{path}: missing, damaged or truncated")
    try:
        return safetensors.torch.load(path.read_bytes())
    except (OSError, KeyError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path}: missing, damaged or truncated, not safetensors ({error})") from error


def _scale(name: str, value: object) -> list[str]:
    return number(name, value, f"a finite number, at most {_LARGEST:g}", low=-_LARGEST, high=_LARGEST)


def _expression(key: str, pattern: str) -> list[str]:
    """Problems of a pattern, as it is matched with the ends of paths; one that repeats a group could take forever to match."""
    if len(pattern) > _LONGEST or len(re.findall(r"[*+{]", pattern)) > _REPEATS or re.search(r"\)\s*[*+{]", pattern):
        advice = "give names of modules, without regular expressions that could take forever to match"
        return [f"{key}: {pattern!r:.80} repeats a group, or is too long; {advice}"]
    try:
        re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, RecursionError, OverflowError) as error:
        return [f"{key}: {pattern!r} is no regular expression ({error})"]
    return []
