"""The methods, one file each. To add one: write the file, add its class to `METHODS`; tests, CLI and docs follow."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from typing import Any

from ..method_kinds.method import Method
from .bitfit import BitFit
from .fishmask import FishMask
from .full import Full
from .id3 import ID3
from .ist import IST
from .lisa import LISA
from .magnitude import PaFi
from .random import Random
from .rst import RST
from .s2ft import S2FT
from .salience import SNIP, StaticGradient
from .shira import SHiRA

__all__ = [
    "ID3",
    "IST",
    "LISA",
    "METHODS",
    "RST",
    "S2FT",
    "SNIP",
    "BitFit",
    "FishMask",
    "Full",
    "PaFi",
    "Random",
    "SHiRA",
    "StaticGradient",
    "build",
    "nearest",
]

_ALL: tuple[type[Method], ...] = (S2FT, ID3, IST, StaticGradient, SNIP, Random, PaFi, SHiRA, FishMask, BitFit, Full, LISA, RST)
METHODS: dict[str, type[Method]] = {cls.name: cls for cls in _ALL}


def build(config: Mapping[str, Any], where: str = "method") -> Method:
    """Make a method from `{"name": "s2ft", field: value, …}`, as a run file or an adapter holds it.

    Args:
        config: name and fields; of a method that trains layers of another, `of` holds that one likewise.
        where: what to call it in errors.

    Raises:
        ValueError: for an unknown name or field (the nearest known one is shown), or a value out of range.
    """
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
    name = fields.pop("name", None)
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"{where}.name={name!r}: unknown; {nearest(str(name), METHODS)}")
    cls = METHODS[name]
    if isinstance(fields.get("of"), Mapping):
        fields["of"] = build(fields["of"], f"{where}.of")
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]  # every method is a dataclass
    unknown = [f"{where}.{key}: unknown for {name!r}; {nearest(key, known)}" for key in fields if key not in known]
    if unknown:
        raise ValueError("; ".join(unknown))
    problems = [f"{where}.{k}={v!r}: wanted is {_wanted(k, cls)}" for k, v in fields.items() if not _fits(v, _hint(k, cls))]
    if problems:
        raise ValueError("; ".join(problems))
    return cls(**fields)


def _hint(field: str, cls: type[Method]) -> Any:
    return typing.get_type_hints(cls)[field]


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a field's type: plain types, unions of them, and tuples of one."""
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(isinstance(item, typing.get_args(hint)[0]) for item in value)
    if typing.get_origin(hint) is typing.Literal:
        return value in typing.get_args(hint)
    if isinstance(value, bool):
        return hint is bool or bool in typing.get_args(hint)
    return isinstance(value, hint)


def _wanted(field: str, cls: type[Method]) -> str:
    hint = _hint(field, cls)
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {', '.join(typing.get_args(hint))}"
    if field == "of":
        return "a method, {name: …, field: value, …}, or None"
    return "a list of names" if typing.get_origin(hint) is tuple else getattr(hint, "__name__", str(hint)).replace("|", "or")


def nearest(word: str, known: Mapping[str, Any] | list[str] | tuple[str, ...]) -> str:
    """'did you mean X?' where one of `known` is near, else the list of them."""
    match = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {match[0]!r}?" if match else f"known are {', '.join(known)}"
