"""Read an adapter folder for serving: Intaglio's own, or a stock PEFT LoRA."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapter.delta import Delta
from ..adapter.folder import PEFT_TYPE, read_config
from ..adapter.names import lora_scale
from ..export.lora_folder import beyond, check_config, read_factors
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
    return _lora(path, config, layers), "lora", config.get("base_model_name_or_path")


def _lora(path: Path, config: dict[str, Any], layers: LinearLayers) -> Adapter:
    """A stock LoRA. It holds no fingerprint of its base: only shapes can be checked."""
    if problem := beyond(config):
        raise ValueError(f"{path}: uses {problem}; serve it merged, or retrain it without")
    check_config(path, config)
    if not all(_PLAIN.fullmatch(key) for key in config.get("alpha_pattern") or {}):
        raise ValueError(f"{path}: alpha_pattern must map names of layers to numbers, without regular expressions")
    changes = {name: _change(name, pair, config, layers) for name, pair in read_factors(path).items()}
    return Adapter({name: change for name, change in changes.items() if change.channels})


def _change(path: str, pair: tuple[Tensor, Tensor], config: dict[str, Any], layers: LinearLayers) -> Change:
    layers.of(f"{path}.weight")
    (inputs, outputs), (a_RI, b_OR) = layers.sizes(path), pair
    if a_RI.shape[1] != inputs or b_OR.shape[0] != outputs:
        shapes = f"{list(a_RI.shape)} and {list(b_OR.shape)}"
        raise ValueError(f"{path}: LoRA factors A [r, {inputs}] and B [{outputs}, r] expected, found {shapes}")
    a_RI, b_RO = a_RI.float(), b_OR.float().T * lora_scale(config, path, len(a_RI))
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
