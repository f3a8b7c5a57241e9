"""Damage to JSON, drawn by a generator: fields changed, removed, renamed, doubled, added or nested, text that is JSON no more."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from typing import Any

from lib.mutated_bytes import damage_bytes

DTYPES = [
    "float32", "bfloat16", "float16", "float64", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float4_e2m1fn_x2", "int8",
    "bool", "complex64", "qint8", "uint16", "nn", "load", "float", "Tensor", "torch.float32", "",
]  # fmt: skip
NUMBERS: list[Any] = [0, -1, 1, 2, 3, 16, 65_535, 65_536, 2**31, 2**32, 2**63, 10**18, 10**30]
NUMBERS += [1e308, -0.0, 0.5, float("nan"), float("inf")]
TEXTS = [
    "",
    "0",
    "x",
    "a" * 5000,
    "../../etc/passwd",
    "/etc",
    "\x00",
    "\ud800",
    "é" * 300,
    "slices",
    "elements",
    "whole",
    "INTAGLIO",
    "LORA",
]
ODD: list[Any] = [
    *NUMBERS, *TEXTS, "all-linear", None, True, False, [], {}, [[]], [None], {"a": {}}, [0], [-1], [2**40], ["x"], {"": ""},
    [1.5, 2], ["q_proj"], {"name": "s2ft"}, {"name": "x", "of": {"name": "y"}},
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
    "(?i)q",
]
EXTRA: dict[str, Any] = {
    "modules_to_save": ["lm_head"], "use_dora": True, "target_parameters": ["x"], "use_rslora": True, "bias": "all", "r": 10**12,
    "trainable_token_indices": [1], "layers_to_transform": [0], "layers_pattern": "layers", "exclude_modules": ["o_proj"],
    "init_lora_weights": "pissa", "init_weights": False, "inference_mode": False, "task_type": "CAUSAL_LM", "revision": "main",
    "auto_mapping": {"base_model_class": "os", "parent_library": "os"}, "trust_remote_code": True, "lora_alpha": 1e308,
    "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 4}, "runtime_config": {}, "peft_version": "9.9",
    "target_modules": ".*",
    "layer_replication": [[0, 1]], "eva_config": {}, "loftq_config": {"a": 1}, "megatron_config": {}, "fan_in_fan_out": True,
}  # fmt: skip


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


def mutate(content: bytes, draw: random.Random) -> tuple[bytes, str]:
    """A field changed, removed, renamed, doubled or added."""
    try:
        whole = json.loads(content)
        places = _places(whole)[1:]
    except (ValueError, RecursionError):  # it is damaged already
        return damage_text(content, draw)
    if not isinstance(whole, dict | list) or not places:
        return damage_text(content, draw)
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
        name, value = draw.choice(sorted(EXTRA.items()))
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


def damage_text(content: bytes, draw: random.Random) -> tuple[bytes, str]:
    """Text that is JSON no more, or in another way."""
    at = draw.randrange(len(content) + 1)
    acts: list[Callable[[], tuple[bytes, str]]] = [
        lambda: (content[:at], f"cut at {at}"),
        lambda: damage_bytes(content, draw),
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
