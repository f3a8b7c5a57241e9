"""The artefact: tuned values at their places in the base, as a small folder that never holds code.

    adapter_config.json         method, format version, and per parameter its kind, shape, counts and base fingerprint
    adapter_model.safetensors   per parameter: `NAME.values` in the base's type, `NAME.indices` (int32 where it fits)
    README.md                   model card

A Delta holds values, not differences: applying swaps them in and keeps the originals, so that apply gives exactly the
trained model and revert exactly the base, in any type, any number of times.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, final

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from .selection import Elements, Entries, Selection, Slices, Whole
from .slots import Slots, fingerprint

__all__ = ["Delta", "read_config"]

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
FORMAT_VERSION = 1


@final
class Delta:
    """Tuned values of a selection, ready to be saved, loaded, applied and reverted.

    Args:
        selection: the places, in base coordinates.
        values: name → compact values in the base's type, shape `selection[name].values_shape`.
        fingerprints: name → `fingerprint` of the base values at those places.
        method: the method that trained it, `{"name": …, fields}`; for the record only.
        base: name of the base model, as `from_pretrained` takes it; or None.

    Raises:
        ValueError: naming the parameter, where shapes disagree or a value is not finite.
    """

    def __init__(
        self,
        selection: Selection,
        values: Mapping[str, Tensor],
        fingerprints: Mapping[str, str],
        method: Mapping[str, Any] | None = None,
        base: str | None = None,
    ) -> None:
        self.selection, self.values, self.fingerprints = selection, dict(values), dict(fingerprints)
        self.method, self.base = dict(method or {}), base
        self._originals: dict[str, Tensor] | None = None
        for name, entries in selection.items():
            _check_values(name, entries, self.values.get(name))

    def apply_(self, model: nn.Module) -> None:
        """Swap the tuned values into `model`, which then equals the trained model bit for bit.

        Everything is checked before the first weight changes.

        Raises:
            ValueError: where a parameter is missing or of another shape or type, where the model holds other base
                values at these places (a wrong base), or where this Delta is applied already.
        """
        if Slots.REGISTERED_AS in model._modules:
            raise ValueError("the model has a tuner attached, whose next step would overwrite this; call its detach() first")
        if self._originals is not None:
            raise ValueError("this Delta is applied already; call revert_ first, or load the folder a second time")
        self._originals = self._check_base(model)
        self._write(model, self.values)

    def revert_(self, model: nn.Module) -> None:
        """Put the base's values back, bit for bit.

        Raises:
            ValueError: where this Delta is not applied, or `model` does not hold its values.
        """
        if self._originals is None:
            raise ValueError("this Delta is not applied; nothing to revert")
        for name, parameter in self._parameters(model):
            if not torch.equal(self.selection[name].to(parameter.device).gather(parameter), self.values[name].to(parameter)):
                raise ValueError(f"{name}: the model no longer holds this Delta's values; was it applied to another model?")
        self._write(model, self._originals)
        self._originals = None

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write the folder; a reader never sees half of it.

        A new folder appears by one rename. In an existing folder (a checkpoint) the files are replaced one by one,
        the config last, which holds the hash of the weights; other files stay.

        Returns:
            The folder.
        """
        target = Path(directory).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            self._write_files(temporary)
            if target.exists():
                for file in (WEIGHTS, CARD, CONFIG):
                    os.replace(temporary / file, target / file)
            else:
                temporary.chmod(0o755)
                os.replace(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return target

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Delta:
        """Read a folder and check everything that can be checked without a model.

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
        return cls(Selection(selection), values, fingerprints, config["method"], config["base_model_name_or_path"])

    @property
    def nbytes(self) -> int:
        """Bytes of values and indices, as stored."""
        tensors = self._tensors()
        return sum(t.numel() * t.element_size() for t in tensors.values())

    def __repr__(self) -> str:
        return f"Delta({self.method.get('name', '?')}, {self.selection!r}, base={self.base!r})"

    def _parameters(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """The model's parameters in this Delta, each checked to exist with the right shape."""
        parameters = dict(model.named_parameters())
        for name, entries in self.selection.items():
            if name not in parameters:
                raise ValueError(f"{name}: the model has no such parameter; this adapter's base is {self.base!r}")
            if tuple(parameters[name].shape) != entries.shape:
                found = list(parameters[name].shape)
                raise ValueError(f"{name}: expected shape {list(entries.shape)}, the model has {found}")
            yield name, parameters[name]

    def _check_base(self, model: nn.Module) -> dict[str, Tensor]:
        """Originals at the selected places, after every check has passed."""
        originals = {}
        for name, parameter in self._parameters(model):
            expected = self.values[name].dtype
            if parameter.dtype != expected:
                raise ValueError(
                    f"{name}: trained on a {expected} base, the model is {parameter.dtype}; load it with dtype={expected}"
                )
            originals[name] = self.selection[name].to(parameter.device).gather(parameter)
            found = fingerprint(originals[name])
            if found != self.fingerprints[name]:
                raise ValueError(
                    f"{name}: base fingerprint {self.fingerprints[name]} expected, {found} found: the model is not the base "
                    f"{self.base!r} this adapter was trained on, or it has been changed since"
                )
        return originals

    def _write(self, model: nn.Module, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters(model):
            self.selection[name].to(parameter.device).scatter_(parameter, values[name].to(parameter.device))

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {}
        for name, entries in self.selection.items():
            tensors[f"{name}.values"] = self.values[name].detach().cpu().contiguous()
            if isinstance(entries, (Slices, Elements)):
                narrow = torch.int32 if entries.numel <= torch.iinfo(torch.int32).max else torch.int64
                tensors[f"{name}.indices"] = entries.index.cpu().to(narrow)
        return tensors

    def _write_files(self, folder: Path) -> None:
        raw = safetensors.torch.save(self._tensors(), {"format": "pt"})
        config = self._config() | {"sha256": hashlib.sha256(raw).hexdigest()}
        _write_synced(folder / WEIGHTS, raw)
        _write_synced(folder / CARD, self._card().encode())
        _write_synced(folder / CONFIG, json.dumps(config, indent=1).encode())

    def _config(self) -> dict[str, Any]:
        from . import __version__

        parameters = {name: self._record(name, entries) for name, entries in self.selection.items()}
        return {
            "peft_type": "INTAGLIO",
            "format_version": FORMAT_VERSION,
            "intaglio_version": __version__,
            "base_model_name_or_path": self.base,
            "method": self.method,
            "trainable": self.selection.size,
            "parameters": parameters,
        }

    def _record(self, name: str, entries: Entries) -> dict[str, Any]:
        record: dict[str, Any] = {"kind": entries.kind, "shape": list(entries.shape)}
        if isinstance(entries, Slices):
            record |= {"dim": entries.dim}
        if not isinstance(entries, Whole):
            record |= {"indices": entries.values_shape[entries.dim if isinstance(entries, Slices) else 0]}
        dtype = str(self.values[name].dtype).removeprefix("torch.")
        return record | {"dtype": dtype, "fingerprint": self.fingerprints[name]}

    def _card(self) -> str:
        return _CARD.format(
            base=self.base or "BASE",
            method=self.method.get("name", "delta"),
            fields=json.dumps(self.method),
            entries=f"{self.selection.size:,}",
            parameters=len(self.selection),
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


def _check_values(name: str, entries: Entries, values: Tensor | None) -> None:
    if values is None:
        raise ValueError(f"{name}: selected, but no values given")
    if tuple(values.shape) != entries.values_shape:
        raise ValueError(f"{name}: values of shape {list(entries.values_shape)} expected, {list(values.shape)} found")
    if not values.is_floating_point() or not bool(torch.isfinite(values).all()):
        raise ValueError(f"{name}: values must be finite floating-point numbers; found {values.dtype} with NaN or infinity")
