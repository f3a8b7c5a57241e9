"""The methods, one file each. To add one: write the file, and a line here; tests, command line and documents follow."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import typing
from collections.abc import Collection, Mapping
from importlib import import_module
from typing import Any

from ..method_kinds.method import Method

# In the order that tables show.
# isort: off
from .s2ft import S2FT as S2FT
from .id3 import ID3 as ID3
from .ist import IST as IST
from .salience import StaticGradient as StaticGradient
from .salience import SNIP as SNIP
from .random import Random as Random
from .magnitude import PaFi as PaFi
from .shira import SHiRA as SHiRA
from .fishmask import FishMask as FishMask
from .bitfit import BitFit as BitFit
from .full import Full as Full
from .lisa import LISA as LISA
from .rst import RST as RST
# isort: on

METHODS: dict[str, type[Method]] = {
    cls.name: cls
    for cls in list(globals().values())
    if isinstance(cls, type) and issubclass(cls, Method) and not inspect.isabstract(cls)
}


def build(config: Mapping[str, Any], where: str = "method", allowed: Collection[str] = ()) -> Method:
    """Make a method from `{"name": "s2ft", field: value, …}`, as a run file or an adapter holds it.

    Args:
        config: name and fields; of a method that trains layers of another, `of` holds that one likewise.
        where: what to call it in errors.
        allowed: packages whose methods may be named as `package.module:Class`, which imports them; default none. Only what
            the user says on the command line belongs here, never what a file says.

    Raises:
        ValueError: for an unknown name or field (the nearest known one is shown), or a value out of range.
    """
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
    name = fields.pop("name", None)
    cls = _imported(name, where, allowed) if isinstance(name, str) and ":" in name else METHODS.get(str(name))
    if cls is None:
        raise ValueError(f"{where}.name={name!r}: unknown; {nearest(str(name), METHODS)}")
    if isinstance(fields.get("of"), Mapping):
        fields["of"] = build(fields["of"], f"{where}.of", allowed)
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]  # every method is a dataclass
    unknown = [f"{where}.{key}: unknown for {name!r}; {nearest(key, known)}" for key in fields if key not in known]
    if unknown:
        raise ValueError("; ".join(unknown))
    hints = typing.get_type_hints(cls)
    wanted = {key: _wanted_instead(key, value, hints[key]) for key, value in fields.items()}
    problems = [f"{where}.{key}={fields[key]!r}: wanted is {what}" for key, what in wanted.items() if what is not None]
    if problems:
        raise ValueError("; ".join(problems))
    return cls(**fields)


def nearest(word: str, known: Mapping[str, Any] | list[str] | tuple[str, ...]) -> str:
    """'did you mean X?' where one of `known` is near, else the list of them."""
    match = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {match[0]!r}?" if match else f"known are {', '.join(known)}"


def _imported(name: str, where: str, allowed: Collection[str]) -> type[Method]:
    """A method of another package, `package.module:Class`."""
    module, _, own = name.partition(":")
    if not any(module == package or module.startswith(f"{package}.") for package in allowed):
        package = module.partition(".")[0]
        raise ValueError(
            f"{where}.name={name!r}: runs code of the package {package!r}; if you trust it, allow it on the command line: "
            f"--allow {package}"
        )
    try:
        cls = getattr(import_module(module), own)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{where}.name={name!r}: cannot be imported ({error})") from error
    if not (isinstance(cls, type) and issubclass(cls, Method) and dataclasses.is_dataclass(cls)) or inspect.isabstract(cls):
        raise ValueError(f"{where}.name={name!r}: is no method: give a frozen dataclass derived from intaglio.Method")
    return cls


def _wanted_instead(field: str, value: Any, hint: Any) -> str | None:
    """What a field takes, where a value is not of its type: a plain type, a union of them, or a tuple of one."""
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        wanted, fits = "a list of names", isinstance(value, tuple) and all(isinstance(item, parts[0]) for item in value)
    elif typing.get_origin(hint) is typing.Literal:
        wanted, fits = f"one of {', '.join(map(str, parts))}", value in parts
    else:
        wanted = getattr(hint, "__name__", str(hint)).replace("|", "or")
        fits = hint is bool or bool in parts if isinstance(value, bool) else isinstance(value, hint)
    if field == "of":
        wanted = "a method, {name: …, field: value, …}, or None"
    return None if fits else wanted
