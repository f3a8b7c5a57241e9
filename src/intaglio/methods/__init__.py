"""The methods, one file each. To add one: write the file, add its class to `METHODS`; tests, CLI and docs follow."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from ..method import Method
from .full import Full
from .magnitude import PaFi
from .random import Random
from .s2ft import S2FT

__all__ = ["METHODS", "S2FT", "Full", "PaFi", "Random", "build", "nearest"]

METHODS: dict[str, type[Method]] = {cls.name: cls for cls in (S2FT, Random, PaFi, Full)}


def build(config: Mapping[str, Any]) -> Method:
    """Make a method from `{"name": "s2ft", field: value, …}`, as a run file or an adapter holds it.

    Raises:
        ValueError: for an unknown name or field (the nearest known one is shown), or a value out of range.
    """
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
    name = fields.pop("name", None)
    if name not in METHODS:
        raise ValueError(f"method.name={name!r}: unknown; {nearest(str(name), METHODS)}")
    cls = METHODS[name]
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]  # every method is a dataclass
    unknown = [f"method.{key}: unknown for {name!r}; {nearest(key, known)}" for key in fields if key not in known]
    if unknown:
        raise ValueError("; ".join(unknown))
    return cls(**fields)


def nearest(word: str, known: Mapping[str, Any] | list[str] | tuple[str, ...]) -> str:
    """'did you mean X?' where one of `known` is near, else the list of them."""
    match = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {match[0]!r}?" if match else f"known are {', '.join(known)}"
