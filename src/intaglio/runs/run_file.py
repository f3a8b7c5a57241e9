"""The text of a run file: YAML of plain values, and `block.key=value` on top of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..methods import nearest

__all__ = ["read_blocks", "unknown_keys"]


def read_blocks(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), *, known: Iterable[str] = ()
) -> dict[str, Any]:
    """The blocks of a run file as plain values, with overrides on top; nothing of them is checked yet.

    Args:
        source: path of a YAML file, or the blocks as a mapping, which is left as it is.
        overrides: `block.key=value` strings; values are YAML. A whole block is replaced by a mapping.
        known: names of the blocks, for the message where there are none.

    Raises:
        ValueError: for a missing file, one that is not YAML or holds no blocks, and an override that cannot be applied.

    Example:
        >>> read_blocks({"train": {"max_steps": 5}}, ["train.learning_rate=1e-3"])
        {'train': {'max_steps': 5, 'learning_rate': 0.001}}
    """
    raw: Any = source if isinstance(source, Mapping) else _read(Path(source))
    if not isinstance(raw, Mapping):
        raise ValueError(f"{source}: a run file holds the blocks {', '.join(known)}")
    blocks = {key: dict(value) if isinstance(value, Mapping) else value for key, value in raw.items()}
    for override in overrides:
        _override(blocks, override)
    return blocks


def unknown_keys(block: str, keys: Iterable[str], known: Sequence[str]) -> list[str]:
    """A problem for each key of a block that is not known, with the nearest one that is; `block` is "" at the top."""
    prefix = f"{block}." if block else ""
    return [f"{prefix}{key}: unknown key; {nearest(key, list(known))}" for key in keys if key not in known]


def _read(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"{path}: no such run file")
    try:
        return _parse(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from error


def _override(raw: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    steps = path.split(".")
    try:
        value = _parse(text)
    except yaml.YAMLError as error:
        raise ValueError(
            f"override {override!r}: the value is not YAML; put quotes around the argument for the shell, and around a "
            "value that begins with * or [ for YAML"
        ) from error
    if not equals or not all(steps) or (len(steps) < 2 and not isinstance(value, dict)):
        raise ValueError(f"override {override!r}: write block.key=value, e.g. train.learning_rate=1e-3")
    place = raw
    for step in steps[:-1]:
        place = place.setdefault(step, {})
        if not isinstance(place, dict):
            raise ValueError(f"override {override!r}: {step!r} is not a block")
    place[steps[-1]] = value


def _parse(text: str) -> Any:
    """One YAML document of plain values; a tag that would build an object is an error."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-3 as a number, as every user means it (YAML 1.1 wants 1.0e-3)."""


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_FLOAT = re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
for _first in "-+0123456789":
    _Loader.yaml_implicit_resolvers.setdefault(_first, []).insert(0, ("tag:yaml.org,2002:float", _FLOAT))
