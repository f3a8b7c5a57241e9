"""Read an adapter folder for serving: Intaglio's own, or a stock PEFT LoRA."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from ..adapter.delta import Delta
from ..adapter.folder import PEFT_TYPE, WEIGHTS, read_config
from ..adapter.names import LORA_KEY, lora_scale
from ..export.from_lora import beyond
from .changes import Adapter, Change, LinearLayers, check_values, from_delta, one_hot

__all__ = ["read_adapter"]

_PLAIN = re.compile(r"[\w.]+")


def read_adapter(path: Path, layers: LinearLayers) -> tuple[Adapter, str, str | None]:
    """Read and check a folder.

    Args:
        path: the folder.
        layers: of the base that it is for.

    Returns:
        The adapter, its kind ("slices" or "lora"), and the base's name that it gives.

    Raises:
        ValueError: naming the file or parameter, for a damaged folder, another base or an unsupported kind.
    """
    config = read_config(path)
    if config.get("peft_type") == PEFT_TYPE:
        delta = Delta.load(path)
        return from_delta(delta, layers), "slices", delta.base
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type {config.get('peft_type')!r}; {PEFT_TYPE} and LORA folders are served")
    base = config.get("base_model_name_or_path")
    return _lora(path, config, layers), "lora", base if isinstance(base, str) else None


def _lora(path: Path, config: dict[str, Any], layers: LinearLayers) -> Adapter:
    """A stock LoRA. It holds no fingerprint of its base: only shapes can be checked."""
    if problem := beyond(config):
        raise ValueError(f"{path}: uses {problem}; serve it merged, or retrain it without")
    try:
        tensors = safetensors.torch.load((path / WEIGHTS).read_bytes())
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path / WEIGHTS}: damaged or truncated, not safetensors ({error})") from error
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        found = LORA_KEY.fullmatch(key)
        if found is None:
            raise ValueError(f"{path / WEIGHTS}: holds {key!r}, which is no factor of a linear layer's LoRA")
        if not tensor.is_floating_point():
            raise ValueError(f"{path / WEIGHTS}: {key} is of {tensor.dtype}; factors are floating-point numbers")
        factors.setdefault(found["path"], {})[found["letter"]] = tensor
    if not factors:
        raise ValueError(f"{path / WEIGHTS}: holds no LoRA factors")
    changes = {name: _change(name, pair, config, layers) for name, pair in factors.items()}
    return Adapter({name: change for name, change in changes.items() if change.channels})


def _change(path: str, pair: dict[str, Tensor], config: dict[str, Any], layers: LinearLayers) -> Change:
    layers.of(f"{path}.weight")
    inputs, outputs = layers.sizes(path)
    a, b = pair.get("A"), pair.get("B")
    if a is None or b is None or a.dim() != 2 or not len(a) or a.shape[1] != inputs or tuple(b.shape) != (outputs, a.shape[0]):
        shapes = {letter: list(tensor.shape) for letter, tensor in pair.items()}
        raise ValueError(f"{path}: LoRA factors A [r, {inputs}] and B [{outputs}, r] expected, found {shapes}")
    a_RI, b_RO = a.float(), b.float().T * _scale(path, a.shape[0], config)
    check_values(f"{path}.lora_A", a_RI)
    check_values(f"{path}.lora_B", b_RO)
    used = (a_RI != 0).any(1) & (b_RO != 0).any(1)  # without the rows that pad the rank
    a_RI, b_RO = a_RI[used], b_RO[used]
    read = one_hot(a_RI)
    write = one_hot(b_RO) if read is None else None
    distinct = write is not None and write.unique().numel() == write.numel()
    weight = layers.by_path[path].weight
    assert isinstance(weight, Tensor)
    return Change(
        a_RI.to(weight) if read is None else read.to(weight.device),
        write.to(weight.device) if write is not None and distinct else b_RO.to(weight),
    )


def _scale(path: str, rank: int, config: dict[str, Any]) -> float:
    """lora_alpha / r, or / √r; r is that of the factors, whatever the config says."""
    patterns, alpha = config.get("alpha_pattern") or {}, config.get("lora_alpha")
    if not isinstance(patterns, dict) or not all(_PLAIN.fullmatch(key) for key in patterns):
        raise ValueError(f"{path}: alpha_pattern must map names of layers to numbers, without regular expressions")
    wrong = [value for value in (alpha, *patterns.values()) if isinstance(value, bool) or not isinstance(value, int | float)]
    if wrong:
        raise ValueError(f"{path}: damaged LoRA config, lora_alpha {wrong[0]!r} is no number")
    return lora_scale(config, path, rank)
