"""A plain reader of adapter folders, to hold the real ones against: no checks, no speed, nothing in common with them.

It says what the weights of the tuned model are if a folder is taken at its word.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip
_BLOCK = 65_536


def tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, as the format's page says."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    found = {}
    for name, about in json.loads(content[8:start]).items():
        if name != "__metadata__":
            first, last = about["data_offsets"]
            data = bytearray(content[start + first : start + last])
            dtype = _DTYPES[about["dtype"]]
            found[name] = (torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)).view(about["shape"])
    return found


def tuned(folder: Path, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a base with an adapter of ours, where it changes any."""
    config, stored = json.loads((folder / "adapter_config.json").read_text()), tensors(folder / "adapter_model.safetensors")
    found = {}
    for name, record in config["parameters"].items():
        module, _, own = name.rpartition(".")
        key = ".".join(filter(None, ("base_model.model", module, "intaglio_{}", own)))
        weight = base[name].clone()
        values = stored[key.format("values")].to(weight.dtype)
        if record["kind"] == "whole":
            found[name] = values
            continue
        index = stored[key.format("indices")]
        if record["kind"] == "slices":
            for number, at in enumerate(index.tolist()):
                weight.select(record["dim"], at).copy_(values.select(record["dim"], number))
        else:
            for number, at in enumerate(_offsets(index, record["indices"], weight.numel())):
                weight.view(-1)[at] = values[number]
        found[name] = weight
    return found


def _offsets(index: Tensor, count: int, numel: int) -> list[int]:
    """Offsets as they stand, or of two bytes each, followed by how many fall into each block."""
    blocks = -(-numel // _BLOCK)
    if count + 2 * blocks >= 2 * count:
        return index.tolist()
    held = index[count:].clone().view(torch.int32).tolist()
    block = [number for number, size in enumerate(held) for _ in range(size)]
    return [_BLOCK * where + low % _BLOCK for where, low in zip(block, index[:count].tolist(), strict=True)]


def lora(folder: Path) -> dict[str, Tensor]:
    """What a LoRA adds to weights, in fp64, by PEFT's own rules for its scale."""
    from peft.utils.other import get_pattern_key

    config, stored = json.loads((folder / "adapter_config.json").read_text()), tensors(folder / "adapter_model.safetensors")
    found = {}
    for key in stored:
        path, _, letter = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
        if letter == "A":
            a_RI, b_OR = stored[key].double(), stored[key.replace("lora_A", "lora_B")].double()
            patterns: dict[str, Any] = config.get("alpha_pattern") or {}
            alpha = patterns.get(get_pattern_key(patterns.keys(), path), config["lora_alpha"])
            rank = len(a_RI)
            found[f"{path}.weight"] = b_OR @ a_RI * (alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
    return found
