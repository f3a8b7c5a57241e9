"""Damage to safetensors files, drawn by a generator: to their header, or to one tensor in a file that is well formed."""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Callable
from typing import Any

import safetensors.torch
import torch

from lib import mutated_json
from lib.mutated_bytes import damage_bytes

STORED = "F32 BF16 F16 F64 F8_E4M3 F8_E5M2 F8_E8M0 F4 I8 I16 I32 I64 U8 U16 U64 BOOL C64 X"
TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn]
TYPES += [torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool]


def damage_header(content: bytes, draw: random.Random) -> tuple[bytes, str]:
    """The header's JSON changed: types, shapes, offsets, names."""
    size = int.from_bytes(content[:8], "little")
    if size > len(content):
        return damage_bytes(content, draw)
    try:
        header = json.loads(content[8 : 8 + size])
        name = draw.choice([name for name in header if name != "__metadata__"])
        field = draw.choice(["dtype", "shape", "data_offsets"])
        if draw.random() < 0.6:
            values: dict[str, list[Any]] = {
                "dtype": STORED.split(),
                "shape": [
                    [],
                    [0],
                    [-1],
                    [2**40],
                    [2**63],
                    [1, *header[name]["shape"]],
                    header[name]["shape"][::-1],
                    [2**32, 2**32],
                    "x",
                    None,
                ],
                "data_offsets": [
                    [0, 0],
                    [0, 4],
                    [4, 0],
                    [-4, 0],
                    [0, 2**40],
                    [0, len(content)],
                    [0.5, 1],
                    [0],
                    None,
                    header[name]["data_offsets"][::-1],
                ],
            }
            header[name][field] = draw.choice(values[field])
            changed, said = json.dumps(header).encode(), f"{field} of {name} is {header[name][field]!r}"
        else:
            changed, said = mutated_json.mutate(json.dumps(header).encode(), draw)
    except (ValueError, RecursionError, IndexError, TypeError, KeyError, AttributeError):
        return damage_bytes(content, draw)
    return struct.pack("<Q", len(changed)) + changed + content[8 + size :], f"header: {said}"


def damage_tensor(content: bytes, draw: random.Random) -> tuple[bytes, str]:
    """One tensor changed, in a file that is well formed otherwise."""
    try:
        tensors = safetensors.torch.load(content)
        name = draw.choice(sorted(tensors))
    except Exception:  # it is damaged already; whatever the library says of it
        return damage_bytes(content, draw)
    act = draw.choice(["change", "change", "change", "change", "type", "shape", "drop", "rename", "add"])
    old = tensors[name]
    if not old.dim():
        return damage_bytes(content, draw)
    if act == "change":
        tensors[name], said = (_index if not old.is_floating_point() else _values)(old.clone(), draw)
    elif act == "type":
        to = draw.choice(TYPES)
        tensors[name], said = old.to(to), f"as {to}"
    elif act == "shape":
        count = old.numel()
        shapes: list[Callable[[], torch.Tensor]] = [
            lambda: old.flatten(), lambda: old[None], lambda: old[..., None], lambda: old[:0], lambda: old[:-1],
            lambda: old.sum(), lambda: old.mT if old.dim() > 1 else old, lambda: torch.cat([old, old]),
            lambda: old.flatten()[: count // 2],
        ]  # fmt: skip
        tensors[name] = draw.choice(shapes)().clone().contiguous()
        said = f"of shape {list(tensors[name].shape)}"
    elif act == "drop":
        del tensors[name]
        said = "dropped"
    else:
        other = draw.choice(
            [
                f"{name}x",
                name.replace("layers.0", "layers.1"),
                name.replace("lora_A", "lora_B"),
                "x",
                name.replace("weight", "bias"),
                "",
            ]
        )
        tensors[other] = (tensors.pop(name) if act == "rename" else old).clone()
        said = f"{act} {other!r:.80}"
    return safetensors.torch.save(tensors, {"format": "pt"}), f"{name}: {said}"


def _index(index: torch.Tensor, draw: random.Random) -> tuple[torch.Tensor, str]:
    """Indices out of order, out of range, twice, or others."""
    flat, at = index.flatten(), draw.randrange(max(index.numel(), 1))
    if not flat.numel():
        return index, "empty already"
    info = torch.iinfo(flat.dtype) if flat.dtype != torch.bool else None
    act = draw.choice(["set", "set", "swap", "reverse", "shift", "same"])
    if act == "set":
        values = [0, 1, -1, 2, 255, *([info.max, info.min, info.max - 1] if info else [])]
        flat[at] = draw.choice([value for value in values if info is None or info.min <= value <= info.max])
    elif act == "swap":
        other = draw.randrange(flat.numel())
        flat[[at, other]] = flat[[other, at]]
    else:
        flat.copy_({"reverse": flat.flip(0), "shift": flat + 1, "same": flat[:1].expand_as(flat)}[act].clone())
    return flat.view(index.shape), f"{act} index {at}"


def _values(values: torch.Tensor, draw: random.Random) -> tuple[torch.Tensor, str]:
    """Values others, not finite, or too large."""
    flat, at = values.flatten(), draw.randrange(max(values.numel(), 1))
    if not flat.numel():
        return values, "empty already"
    largest = torch.finfo(flat.dtype).max
    to = draw.choice([math.nan, math.inf, -math.inf, largest, -largest, 1e20, 1e4, 0.0, 1.0, 1e-40, draw.gauss(0, 1)])
    if draw.random() < 0.3:
        flat.fill_(to)
        return flat.view(values.shape), f"all {to:g}"
    flat[at] = to
    return flat.view(values.shape), f"value {at} is {to:g}"
