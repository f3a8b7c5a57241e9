"""The adapter folder on disk: read with every check that needs no model, written so that no half of it is ever seen.

    adapter_config.json         method, format version, and per parameter its kind, shape, counts and base fingerprint
    adapter_model.safetensors   per parameter: its values, and its indices (see `stored_index`); see `key`
    README.md                   model card

Keys and config are those that PEFT and transformers expect of an adapter, so that one folder serves `Delta.load`,
`PeftModel.from_pretrained` and `model.load_adapter`. Nothing in it is ever executed or unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..core.entries import Entries
from ..core.files import folder_beside, publish, read_mapping
from ..core.selection import Selection
from ..core.version import VERSION
from .names import PREFIX
from .record import Record, stored_index

__all__ = [
    "CONFIG",
    "FORMAT_VERSION",
    "PEFT_TYPE",
    "WEIGHTS",
    "Contents",
    "key",
    "read",
    "read_config",
    "read_weights",
    "tensors",
    "write",
]

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
PEFT_TYPE = "INTAGLIO"
FORMAT_VERSION = 3


@dataclass(frozen=True)
class Contents:
    """The content of a folder; the fields are those of `Delta`."""

    selection: Selection
    values: Mapping[str, Tensor]
    fingerprints: Mapping[str, str]
    method: Mapping[str, Any]
    base: str | None
    of: int | None = None


def key(parameter: str, kind: str) -> str:
    """Key of a parameter's "values" or "indices" in the weights file, as PEFT writes a wrapped module's tensors.

    >>> key("model.norm.weight", "values")
    'base_model.model.model.norm.intaglio_values.weight'
    """
    module, _, name = parameter.rpartition(".")
    return PREFIX + ".".join(filter(None, (module, f"intaglio_{kind}", name)))


def write(contents: Contents, directory: str | os.PathLike[str]) -> Path:
    """Write a folder.

    A new folder appears by one rename. In an existing folder (a checkpoint) the files are replaced one by one, the
    config last, which holds the hash of the weights: a crash in between is noticed, and other files stay.

    Returns:
        The folder.
    """
    target = Path(directory).resolve()
    raw = safetensors.torch.save(tensors(contents), {"format": "pt"})
    config = _config(contents) | {"sha256": hashlib.sha256(raw).hexdigest()}
    with folder_beside(target) as folder:
        (folder / WEIGHTS).write_bytes(raw)
        (folder / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")
        if (target / CONFIG).exists() or not (target / CARD).exists():  # else that README is somebody else's
            (folder / CARD).write_text(_card(contents), encoding="utf-8")
        publish(folder, target, last=(CONFIG,))
    return target


def read(directory: str | os.PathLike[str]) -> Contents:
    """Read a folder.

    Raises:
        ValueError: naming the file or parameter, for a missing, damaged, truncated or inconsistent folder.
    """
    folder = Path(directory)
    config, path = _own_config(folder), folder / WEIGHTS
    records = {name: Record.parse(name, fields) for name, fields in config["parameters"].items()}
    selection, values, more = read_weights(path, records, config["sha256"])
    if more:
        hint = "" if not config.get("modules_to_save") else "; it trains whole modules too (modules_to_save): use PeftModel"
        raise ValueError(f"{path}: holds {more[0]!r}, which {CONFIG} does not name{hint}")
    prints = {name: record.fingerprint for name, record in records.items()}
    return Contents(selection, values, prints, config["method"], config["base_model_name_or_path"], config.get("of"))


def read_weights(path: Path, records: Mapping[str, Record], sha256: str | None) -> tuple[Selection, dict[str, Tensor], list[str]]:
    """The places and values in a weights file, and the keys of whatever else it holds.

    Args:
        path: the file.
        records: what the config says of each parameter.
        sha256: of the file; None where the config does not say.

    Raises:
        ValueError: naming the file or parameter, where it is missing, damaged, truncated, or not what the config says.
    """
    if not path.is_file():
        raise ValueError(f"{path}: missing")
    content = path.read_bytes()
    with ThreadPoolExecutor(1) as pool:  # hashing takes as long as all the rest, and beside it
        hashed = pool.submit(lambda: hashlib.sha256(content).hexdigest())
        try:
            return _parse(path, records, content)
        finally:  # where the hash is wrong, that is the better reason for whatever went wrong
            if sha256 is not None and hashed.result() != sha256:
                raise ValueError(f"{path}: damaged or truncated: SHA-256 {sha256[:12]}… expected, {hashed.result()[:12]}… found")


def _parse(path: Path, records: Mapping[str, Record], content: bytes) -> tuple[Selection, dict[str, Tensor], list[str]]:
    try:
        raw = safetensors.torch.load(content)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: damaged or truncated, not safetensors ({error})") from error
    entries = {name: _entries(name, record, raw) for name, record in records.items()}
    values = {name: _values(name, record, raw) for name, record in records.items()}
    return Selection(entries), values, list(raw)


def tensors(contents: Contents) -> dict[str, Tensor]:
    """What the weights file holds, by key."""
    found = {}
    for name, entries in contents.selection.items():
        found[key(name, "values")] = contents.values[name].detach().cpu().contiguous()
        index = stored_index(entries)
        if index is not None:
            found[key(name, "indices")] = index.cpu()
    return found


def _config(contents: Contents) -> dict[str, Any]:
    return {
        "peft_type": PEFT_TYPE,
        "format_version": FORMAT_VERSION,
        "intaglio_version": VERSION,
        "base_model_name_or_path": contents.base,
        "method": contents.method,
        "trainable": contents.selection.size,
        "of": contents.of,
        "parameters": {
            name: Record.of(entries, contents.values[name].dtype, contents.fingerprints[name]).to_dict()
            for name, entries in contents.selection.items()
        },
    }


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

Or with PEFT: `import intaglio.hf`, then `PeftModel.from_pretrained(base, "this/folder")`.
"""


def read_config(folder: Path) -> dict[str, Any]:
    """The config of an adapter folder of any type.

    Raises:
        ValueError: where there is none, or it is not a JSON mapping.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder}: not an adapter folder, it has no {CONFIG}")
    return read_mapping(path)


def _own_config(folder: Path) -> dict[str, Any]:
    """The config of a folder of ours, checked as far as it goes without the weights."""
    path, config = folder / CONFIG, read_config(folder)
    if config.get("peft_type") != PEFT_TYPE:
        raise ValueError(f"{path}: not an Intaglio adapter (peft_type is not {PEFT_TYPE})")
    if config.get("format_version") != FORMAT_VERSION:
        found = config.get("format_version")
        raise ValueError(f"{path}: format version {found!r}; this release reads {FORMAT_VERSION}: use the release that wrote it")
    missing = {"base_model_name_or_path", "method", "parameters", "sha256"} - config.keys()
    if missing:
        raise ValueError(f"{path}: damaged, without {', '.join(sorted(missing))}")
    if not isinstance(config["parameters"], dict):
        raise ValueError(f"{path}: damaged, its parameters are not a mapping")
    # transformers writes the config before the weights, whose hash it cannot know then
    hashed = config["sha256"] is None or isinstance(config["sha256"], str)
    named = isinstance(config["base_model_name_or_path"], str | None)
    if not isinstance(config["method"], dict) or not (hashed and named) or not isinstance(config.get("of"), int | None):
        raise ValueError(f"{path}: damaged, base_model_name_or_path, method, sha256 or of is of the wrong type")
    return config


def _take(raw: dict[str, Tensor], name: str, kind: str) -> Tensor:
    if key(name, kind) not in raw:
        raise ValueError(f"{WEIGHTS}: has no {key(name, kind)!r}, which {CONFIG} names")
    return raw.pop(key(name, kind))


def _entries(name: str, record: Record, raw: dict[str, Tensor]) -> Entries:
    """Rebuild and check one parameter's entries."""
    index = None if record.indices is None else _take(raw, name, "indices")
    try:
        return record.entries(index)
    except ValueError as error:
        raise ValueError(f"{name}: damaged adapter: {error}") from error


def _values(name: str, record: Record, raw: dict[str, Tensor]) -> Tensor:
    """One parameter's values in the base's type; PEFT trains and saves them in fp32 at least."""
    values = _take(raw, name, "values")
    if values.dtype not in (record.dtype, torch.promote_types(record.dtype, torch.float32)):
        raise ValueError(
            f"{name}: damaged adapter: values must be floating-point of the base's type {record.dtype}, found {values.dtype}"
        )
    if tuple(values.shape) != record.values_shape:
        raise ValueError(
            f"{name}: damaged adapter: values of shape {list(record.values_shape)} expected, {list(values.shape)} found"
        )
    return values.to(record.dtype)
