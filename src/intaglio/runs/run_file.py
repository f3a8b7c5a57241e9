"""The text of a run file: YAML of plain values, and `block.key=value` on top of it."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..methods import nearest

__all__ = ["read_blocks", "unknown_keys", "with_truths"]

_TRUTHS = {"yes": True, "on": True, "no": False, "off": False}


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


def with_truths(block: Mapping[str, Any], hints: Mapping[str, Any]) -> dict[str, Any]:
    """A block in which yes, no, on and off are truth values where its key wants one, and words where it does not."""
    return {
        key: _TRUTHS[value.lower()]
        if isinstance(value, str) and value.lower() in _TRUTHS and _is_truth(hints.get(key))
        else value
        for key, value in block.items()
    }


def _is_truth(hint: Any) -> bool:
    return set(typing.get_args(hint) or (hint,)) <= {bool, "bool", type(None)} and hint is not None


def _read(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"{path}: no such run file")
    try:
        return _parse(path.read_text(encoding="utf-8-sig"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error


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
    if not equals or not all(steps) or (len(steps) < 2 and value is not None and not isinstance(value, dict)):
        raise ValueError(f"override {override!r}: write block.key=value, e.g. train.learning_rate=1e-3")
    place = raw
    for step in steps[:-1]:
        if place.get(step) is None:  # absent, or said to be
            place[step] = {}
        place = place[step]
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
    """SafeLoader of plain values as YAML 1.2 and every user means them, and of keys that stand once."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)  # type: ignore[no-untyped-call]  # PyYAML has no types
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise ValueError(f"line {key.start_mark.line + 1}: the key {key.value!r} stands twice; drop one of them")
            seen.add(key.value)
        return node

    def construct_yaml_int(self, node: Any) -> int:
        return int(self.construct_scalar(node).replace("_", ""), 0 if "x" in node.value or "o" in node.value else 10)


# YAML 1.1 reads 1e-3 as a string, 010 as eight, 1:30 as ninety, and no, on and 2024-03-05 as what they are not.
_PLAIN = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+.0123456789"),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "merge": (r"<<", "<"),
}
_Loader.yaml_implicit_resolvers = {}
for _kind, (_pattern, _firsts) in _PLAIN.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), list(_firsts))
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
