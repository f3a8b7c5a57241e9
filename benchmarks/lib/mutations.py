"""Damage to an adapter folder, drawn by a generator: to its JSON, its safetensors files, single tensors, and the files themselves.

A folder is a mapping of names to bytes; of another `Node` where it is no plain file. Every function here changes one in place and
says what it did, so that a failure can be told in words.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import struct
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Node = Enum("Node", "FOLDER DANGLING LOOP DEVICE PIPE")  # what may stand in a file's place
Folder = dict[str, bytes | Node]

DTYPES = [
    "float32", "bfloat16", "float16", "float64", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float4_e2m1fn_x2", "int8", "bool",
    "complex64", "qint8", "uint16", "nn", "load", "float", "Tensor", "torch.float32", "",
]  # fmt: skip
STORED = [
    "F32",
    "BF16",
    "F16",
    "F64",
    "F8_E4M3",
    "F8_E5M2",
    "F8_E8M0",
    "F4",
    "I8",
    "I16",
    "I32",
    "I64",
    "U8",
    "U16",
    "U64",
    "BOOL",
    "C64",
    "X",
]
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 16, 65_535, 65_536, 2**31, 2**32, 2**63, 10**18, 10**30, 1e308, -0.0, 0.5, float("nan"), float("inf"),
    "", "0", "x", "a" * 5000, "../../etc/passwd", "/etc", "\x00", "\ud800", "é" * 300, [], {}, [[]], [None], {"a": {}}, [0], [-1], [2**40], ["x"],
    {"": ""}, [1.5, 2], "slices", "elements", "whole", "INTAGLIO", "LORA", "all-linear", ["q_proj"], {"name": "s2ft"}, {"name": "x", "of": {"name": "y"}},
]  # fmt: skip
PATTERNS = [
    "(",
    "(a+)+$",
    "([\\w.]+)+!",
    "(.*)*#",
    ".*",
    "q_proj",
    "[",
    "\\",
    "(?P<x>.)(?P=x)",
    "a{99999}",
    "(?:" * 500 + ")" * 500,
]
EXTRA: list[tuple[str, Any]] = [
    ("modules_to_save", ["lm_head"]), ("use_dora", True), ("target_parameters", ["x"]), ("use_rslora", True), ("bias", "all"), ("fan_in_fan_out", True),
    ("trainable_token_indices", [1]), ("layers_to_transform", [0]), ("layers_pattern", "layers"), ("exclude_modules", ["o_proj"]),
    ("init_lora_weights", "pissa"), ("init_weights", False), ("inference_mode", False), ("task_type", "CAUSAL_LM"), ("revision", "main"),
    ("auto_mapping", {"base_model_class": "os", "parent_library": "os"}), ("trust_remote_code", True), ("lora_alpha", 1e308), ("r", 10**12),
    ("rank_pattern", {"q_proj": 4}), ("alpha_pattern", {"q_proj": 4}), ("runtime_config", {}), ("peft_version", "9.9"), ("megatron_config", {}),
    ("target_modules", ".*"), ("target_modules", []), ("layer_replication", [[0, 1]]), ("eva_config", {}), ("loftq_config", {"a": 1}),
]  # fmt: skip


def mutate(folder: Folder, draw: random.Random) -> list[str]:
    """Change a folder at one to three places; then, often, let its config name the hash of its weights as they are now."""
    done = []
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        name = draw.choice([name for name in folder if name != "README.md"])
        content = folder[name]
        if not isinstance(content, bytes) or draw.random() < 0.04:
            done.append(_file(folder, name, draw))
        elif name.endswith(".json"):
            folder[name], said = draw.choice([_json, _json, _json, _json, _text])(content, draw)
            done.append(f"{name}: {said}")
        else:
            folder[name], said = draw.choice([_tensors, _tensors, _tensors, _header, _bytes])(content, draw)
            done.append(f"{name}: {said}")
    if draw.random() < 0.7:
        done += _seal(folder)
    return done


def _seal(folder: Folder) -> list[str]:
    """Name the right hash, as whoever made the damage on purpose would."""
    config, weights = folder.get(CONFIG), folder.get(WEIGHTS)
    if not isinstance(config, bytes) or not isinstance(weights, bytes):
        return []
    digest = hashlib.sha256(weights).hexdigest().encode()
    folder[CONFIG] = re.sub(rb'"sha256":\s*"[0-9a-f]{64}"', b'"sha256": "' + digest + b'"', config)
    return ["sealed"]


def write(folder: Folder, place: Path) -> None:
    """Put a folder on the disk."""
    place.mkdir()
    for name, content in folder.items():
        path = place / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is Node.FOLDER:
            path.mkdir()
        elif content is Node.PIPE:
            os.mkfifo(path)
        else:
            path.symlink_to({Node.DANGLING: "nowhere", Node.LOOP: name, Node.DEVICE: "/dev/zero"}[content])


# JSON


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, inner in items for place in _places(inner, (*path, key)))]


def _odd(draw: random.Random) -> Any:
    kind = draw.random()
    if kind < 0.2:
        return draw.choice(DTYPES)
    if kind < 0.25:
        return {draw.choice(PATTERNS): draw.choice([1, 8, 1e300, None])}
    return draw.choice(ODD)


def _json(content: bytes, draw: random.Random) -> tuple[bytes, str]:
    """A field changed, removed, renamed, doubled or added."""
    try:
        whole = json.loads(content)
        places = _places(whole)[1:]
    except (ValueError, RecursionError):  # it is damaged already
        return _text(content, draw)
    if not isinstance(whole, dict | list) or not places:
        return _text(content, draw)
    path = draw.choice(places)
    holder = whole
    for key in path[:-1]:
        holder = holder[key]
    key, act = path[-1], draw.choice(["set", "set", "set", "set", "near", "remove", "rename", "swap", "double", "add", "deep"])
    if act == "set":
        holder[key] = _odd(draw)
    elif act == "near":
        holder[key] = _near(holder[key], draw)
    elif act == "remove":
        del holder[key]
    elif act == "rename" and isinstance(holder, dict):
        holder[f"{key}{draw.choice(['x', ' ', '.', '.weight'])}"] = holder.pop(key)
    elif act == "swap":
        other = draw.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        holder[key], holder[other] = holder[other], holder[key]
    elif act == "double":
        text, again = json.dumps(whole), json.dumps(str(key))
        return text.replace(f"{again}:", f"{again}: {json.dumps(_odd(draw))}, {again}:", 1).encode(
            "utf-8", "replace"
        ), f"{path} twice"
    elif act == "deep":
        depth, (left, right) = draw.choice([20, 900, 100_000]), draw.choice(["[]", ('{"a":', "}")])
        holder[key] = "DEEP"
        text = json.dumps(whole).replace('"DEEP"', left * depth + ("" if left == "[" else "0") + right * depth, 1)
        return text.encode("utf-8", "replace"), f"{path} nested {depth} times"
    elif isinstance(whole, dict):
        name, value = draw.choice(EXTRA)
        whole[name] = value
        return json.dumps(whole).encode("utf-8", "replace"), f"{name} = {value!r:.60}"
    shown = repr(holder.get(key) if isinstance(holder, dict) else holder[key] if key < len(holder) else None)
    return json.dumps(whole).encode("utf-8", "replace"), f"{act} {path} {shown:.60}"


def _near(value: Any, draw: random.Random) -> Any:
    """A value a little beside."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        return draw.choice([value + 1, value - 1, -value, value * 2, float(value), str(value), [value], value + 0.5])
    if isinstance(value, str):
        at = draw.randrange(len(value) + 1)
        return draw.choice([value[:at], value[:at] + "0" + value[at + 1 :], value.upper(), [value], value + " "])
    return draw.choice([list(value) * 2, list(value)[:1], str(value), {"a": value}])


def _text(content: bytes, draw: random.Random) -> tuple[bytes, str]:
    """Text that is JSON no more, or in another way."""
    at = draw.randrange(len(content) + 1)
    acts: list[Callable[[], tuple[bytes, str]]] = [
        lambda: (content[:at], f"cut at {at}"),
        lambda: _bytes(content, draw),
        lambda: (b"\xef\xbb\xbf" + content, "with a byte-order mark"),
        lambda: (content.decode("utf-8", "replace").encode("utf-16"), "in UTF-16"),
        lambda: (content + draw.choice([b"}", b"x", b"\x00", content]), "and more behind"),
        lambda: (
            draw.choice([b"[" * 100_000, b'{"a":' * 100_000, b"null", b"[]", b"3", b'"x"', b"", b"NaN", b"9" * 6000]),
            "something else",
        ),
        lambda: (
            re.sub(
                rb"\d+",
                lambda m: draw.choice([m[0], m[0], m[0][:9] * 40, m[0][:9] * 700, b"-" + m[0], b"1e999"]),
                content,
                count=at,
            ),
            "other numbers",
        ),
        lambda: (content.replace(b'"', b"'"), "single quotes"),
    ]
    return draw.choice(acts)()


# safetensors


def _bytes(content: bytes, draw: random.Random) -> tuple[bytes, str]:
    """Bytes flipped, cut, inserted, overwritten or moved."""
    if not content:
        return b"\x00" * 9, "nine zeros"
    at, size = draw.randrange(len(content)), draw.choice([1, 2, 8, 64, 1000])
    if draw.random() < 0.3:  # in the header
        at = draw.randrange(min(len(content), 200))
    acts: list[Callable[[], tuple[bytes, str]]] = [
        lambda: (content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :], f"bit flipped in byte {at}"),
        lambda: (content[:at] + draw.randbytes(size) + content[at + size :], f"{size} bytes overwritten at {at}"),
        lambda: (content[:at] + draw.randbytes(size) + content[at:], f"{size} bytes inserted at {at}"),
        lambda: (content[:at] + content[at + size :], f"{size} bytes lost at {at}"),
        lambda: (content[:at], f"cut at {at}"),
        lambda: (content + bytes(size), f"{size} zeros behind"),
        lambda: (content[at:] + content[:at], f"turned by {at}"),
        lambda: (
            struct.pack("<Q", draw.choice([0, 1, 2, 2**20, 10**8 + 1, 2**40, 2**63, 2**64 - 1])) + content[8:],
            "another length of the header",
        ),
    ]
    return draw.choice(acts)()


def _header(content: bytes, draw: random.Random) -> tuple[bytes, str]:
    """The header's JSON changed: types, shapes, offsets, names."""
    size = int.from_bytes(content[:8], "little")
    if size > len(content):
        return _bytes(content, draw)
    try:
        header = json.loads(content[8 : 8 + size])
        name = draw.choice([name for name in header if name != "__metadata__"])
        field = draw.choice(["dtype", "shape", "data_offsets"])
        if draw.random() < 0.6:
            values: dict[str, list[Any]] = {
                "dtype": STORED,
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
            changed, said = _json(json.dumps(header).encode(), draw)
    except (ValueError, RecursionError, IndexError, TypeError, KeyError, AttributeError):
        return _bytes(content, draw)
    return struct.pack("<Q", len(changed)) + changed + content[8 + size :], f"header: {said}"


def _tensors(content: bytes, draw: random.Random) -> tuple[bytes, str]:
    """One tensor changed, in a file that is well formed otherwise."""
    try:
        tensors = safetensors.torch.load(content)
        name = draw.choice(sorted(tensors))
    except Exception:  # it is damaged already; whatever the library says of it
        return _bytes(content, draw)
    act = draw.choice(["change", "change", "change", "change", "type", "shape", "drop", "rename", "add"])
    old = tensors[name]
    if not old.dim():
        return _bytes(content, draw)
    if act == "change":
        tensors[name], said = (_index if not old.is_floating_point() else _values)(old.clone(), draw)
    elif act == "type":
        to = draw.choice(
            [
                torch.float32,
                torch.bfloat16,
                torch.float16,
                torch.float64,
                torch.int16,
                torch.int32,
                torch.int64,
                torch.uint8,
                torch.bool,
                torch.float8_e4m3fn,
            ]
        )
        tensors[name], said = old.to(to), f"as {to}"
    elif act == "shape":
        count = old.numel()
        shapes: list[Callable[[], torch.Tensor]] = [
            lambda: old.flatten(), lambda: old[None], lambda: old[..., None], lambda: old[:0], lambda: old[:-1], lambda: old.mT if old.dim() > 1 else old,
            lambda: torch.cat([old, old]), lambda: old.flatten()[: count // 2], lambda: old.sum(),
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
    to = draw.choice([float("nan"), float("inf"), float("-inf"), largest, -largest, 1e20, 1e4, 0.0, 1.0, 1e-40, draw.gauss(0, 1)])
    if draw.random() < 0.3:
        flat.fill_(to)
        return flat.view(values.shape), f"all {to:g}"
    flat[at] = to
    return flat.view(values.shape), f"value {at} is {to:g}"


# files


def _file(folder: Folder, name: str, draw: random.Random) -> str:
    """A file missing, empty, or no file."""
    act = draw.choice(["missing", "empty", "twice", *Node])
    if act == "missing":
        del folder[name]
        if not folder:
            folder["README.md"] = b""
    elif act == "twice":
        folder[draw.choice([CONFIG, WEIGHTS])] = folder[name]
    else:
        folder[name] = b"" if act == "empty" else act
    return f"{name}: {act if isinstance(act, str) else act.name.lower()}"
