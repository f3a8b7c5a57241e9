"""The adapter folder on disk: read with every check that needs no model, written so that no half of it is ever seen.

    adapter_config.json         method, format version, and per parameter its kind, shape, counts and base fingerprint
    adapter_model.safetensors   per parameter: `NAME.values` in the base's type, `NAME.indices` (int32 where it fits)
    README.md                   model card

Nothing in it is ever executed or unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from .selection import Elements, Entries, Selection, Slices, Whole

__all__ = ["CONFIG", "WEIGHTS", "Contents", "read", "read_config", "tensors", "write"]

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Contents:
    """What a folder holds; the fields are those of `Delta`."""

    selection: Selection
    values: Mapping[str, Tensor]
    fingerprints: Mapping[str, str]
    method: Mapping[str, Any]
    base: str | None


def write(contents: Contents, directory: str | os.PathLike[str]) -> Path:
    """Write a folder.

    A new folder appears by one rename. In an existing folder (a checkpoint) the files are replaced one by one, the
    config last, which holds the hash of the weights: a crash in between is noticed, and other files stay.

    Returns:
        The folder.
    """
    target = Path(directory).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        _write_files(contents, temporary)
        if target.exists():
            # A README that stands beside no adapter is somebody else's.
            keep_card = (target / CARD).exists() and not (target / CONFIG).exists()
            for file in (WEIGHTS, CONFIG) if keep_card else (WEIGHTS, CARD, CONFIG):
                os.replace(temporary / file, target / file)
        else:
            temporary.chmod(0o755)
            os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def read(directory: str | os.PathLike[str]) -> Contents:
    """Read a folder.

    Raises:
        ValueError: naming the file or parameter, for a missing, damaged, truncated or inconsistent folder.
    """
    folder = Path(directory)
    config = _own_config(folder)
    raw = _read_weights(folder / WEIGHTS, config["sha256"])
    selection, values, fingerprints = {}, {}, {}
    for name, record in config["parameters"].items():
        selection[name] = _entries(name, record, raw)
        values[name] = _take(raw, f"{name}.values")
        fingerprints[name] = str(record["fingerprint"])
    if raw:
        raise ValueError(f"{folder / WEIGHTS}: holds {next(iter(raw))!r}, which {CONFIG} does not name")
    return Contents(Selection(selection), values, fingerprints, config["method"], config["base_model_name_or_path"])


def tensors(contents: Contents) -> dict[str, Tensor]:
    """What the weights file holds, by key."""
    found = {}
    for name, entries in contents.selection.items():
        found[f"{name}.values"] = contents.values[name].detach().cpu().contiguous()
        if isinstance(entries, (Slices, Elements)):
            narrow = torch.int32 if entries.numel <= torch.iinfo(torch.int32).max else torch.int64
            found[f"{name}.indices"] = entries.index.cpu().to(narrow)
    return found


def _write_files(contents: Contents, folder: Path) -> None:
    raw = safetensors.torch.save(tensors(contents), {"format": "pt"})
    config = _config(contents) | {"sha256": hashlib.sha256(raw).hexdigest()}
    _write_synced(folder / WEIGHTS, raw)
    _write_synced(folder / CARD, _card(contents).encode())
    _write_synced(folder / CONFIG, json.dumps(config, indent=1).encode())


def _config(contents: Contents) -> dict[str, Any]:
    from . import __version__

    parameters = {name: _record(contents, name, entries) for name, entries in contents.selection.items()}
    return {
        "peft_type": "INTAGLIO",
        "format_version": FORMAT_VERSION,
        "intaglio_version": __version__,
        "base_model_name_or_path": contents.base,
        "method": contents.method,
        "trainable": contents.selection.size,
        "parameters": parameters,
    }


def _record(contents: Contents, name: str, entries: Entries) -> dict[str, Any]:
    record: dict[str, Any] = {"kind": entries.kind, "shape": list(entries.shape)}
    if isinstance(entries, Slices):
        record |= {"dim": entries.dim}
    if not isinstance(entries, Whole):
        record |= {"indices": entries.values_shape[entries.dim if isinstance(entries, Slices) else 0]}
    dtype = str(contents.values[name].dtype).removeprefix("torch.")
    return record | {"dtype": dtype, "fingerprint": contents.fingerprints[name]}


def _card(contents: Contents) -> str:
    return _CARD.format(
        base=contents.base or "BASE",
        method=contents.method.get("name", "delta"),
        fields=json.dumps(contents.method),
        entries=f"{contents.selection.size:,}",
        parameters=len(contents.selection),
    )


_CARD = """---
library_name: intaglio
base_model: {base}
tags: [intaglio, sparse-fine-tuning, {method}]
---

# Sparse adapter for {base}

{entries} tuned values in {parameters} parameters, method `{fields}`.

```python
from intaglio import Delta

delta = Delta.load("this/folder")
delta.apply_(model)   # the base named above becomes the tuned model
delta.revert_(model)  # and back, bit for bit
```
"""


def _write_synced(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def read_config(folder: Path) -> dict[str, Any]:
    """The config of an adapter folder of any type.

    Raises:
        ValueError: where there is none, or it is not a JSON mapping.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder}: not an adapter folder, it has no {CONFIG}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: damaged, not JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: damaged, not a mapping")
    return config


def _own_config(folder: Path) -> dict[str, Any]:
    """The config of a folder of ours, checked as far as it goes without the weights."""
    path, config = folder / CONFIG, read_config(folder)
    if config.get("peft_type") != "INTAGLIO":
        raise ValueError(f"{path}: not an Intaglio adapter (peft_type is not INTAGLIO)")
    if config.get("format_version") != FORMAT_VERSION:
        found = config.get("format_version")
        raise ValueError(f"{path}: format version {found!r}; this release reads {FORMAT_VERSION}: upgrade intaglio")
    missing = {"base_model_name_or_path", "method", "parameters", "sha256"} - config.keys()
    if missing:
        raise ValueError(f"{path}: damaged, without {', '.join(sorted(missing))}")
    records = config["parameters"]
    if not isinstance(records, dict) or not all(isinstance(r, dict) and "fingerprint" in r for r in records.values()):
        raise ValueError(f"{path}: damaged, its parameters are not records with a fingerprint")
    if not isinstance(config["method"], dict) or not isinstance(config["sha256"], str):
        raise ValueError(f"{path}: damaged, method or sha256 is of the wrong type")
    return config


def _read_weights(path: Path, expected: str) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"{path}: missing")
    raw = path.read_bytes()
    found = hashlib.sha256(raw).hexdigest()
    if found != expected:
        raise ValueError(f"{path}: damaged or truncated: SHA-256 {expected[:12]}… expected, {found[:12]}… found")
    try:
        return safetensors.torch.load(raw)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: damaged, not safetensors ({error})") from error


def _take(raw: dict[str, Tensor], key: str) -> Tensor:
    if key not in raw:
        raise ValueError(f"{WEIGHTS}: has no {key!r}, which {CONFIG} names")
    return raw.pop(key)


def _entries(name: str, record: Mapping[str, Any], raw: dict[str, Tensor]) -> Entries:
    """Rebuild and check one parameter's entries."""
    try:
        shape, kind = tuple(int(n) for n in record["shape"]), record["kind"]
        if kind == "whole":
            return Whole(shape)
        index = _take(raw, f"{name}.indices")
        if index.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"an index must be of integers, found {index.dtype}")
        if index.numel() != record["indices"]:
            raise ValueError(f"{record['indices']} indices expected, {index.numel()} found")
        if kind == "slices":
            return Slices(shape, int(record["dim"]), index.long())
        if kind == "elements":
            return Elements(shape, index.long())
        raise ValueError(f"unknown kind {kind!r}")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name}: damaged adapter: {error}") from error
