"""Adapters that are to be served, as far as their shapes and configs tell: Delta folders, PEFT LoRAs, GGUF LoRAs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors

from ..adapter.delta import Delta
from ..adapter.folder import PEFT_TYPE, WEIGHTS, read_config
from ..adapter.names import LORA_KEY, check_name
from ..core.entries import Slices
from ..core.files import read_mapping
from ..export.gguf import FILE, read_gguf
from ..export.lora_folder import check_config
from ..export.staging import MARKER
from ..runs.folder import adapter_of

__all__ = ["Candidate", "Module", "projection", "read"]


@dataclass(frozen=True)
class Module:
    """A linear layer of an adapter: its rank, and the width of its inputs and outputs."""

    rank: int
    inputs: int
    outputs: int


@dataclass(frozen=True)
class Candidate:
    """An adapter that is to be served.

    Attributes:
        name: what requests call it.
        path: the folder.
        form: "delta", "lora" or "gguf".
        base: the base model it names, or None.
        modules: module path → `Module`; for a GGUF LoRA, name of the weight there.
        config: adapter_config.json, or the fields of the GGUF file.
        other: what else it holds that is no factor of a LoRA, by name.
        exported: whether it is an exact export of ours, which becomes a Delta again.
        planned: whether it is what an export of a Delta would give, not yet written.
        dtype: of the base that it was trained on, e.g. "bfloat16"; None where it does not say.
    """

    name: str
    path: Path
    form: str
    base: str | None
    modules: Mapping[str, Module]
    config: Mapping[str, Any]
    other: tuple[str, ...] = ()
    exported: bool = False
    planned: bool = False
    dtype: str | None = None

    @property
    def rank(self) -> int:
        """The greatest rank of its modules; 0 where it has none."""
        return max((module.rank for module in self.modules.values()), default=0)

    @property
    def projections(self) -> set[str]:
        """Last names of its modules."""
        return {projection(path) for path in self.modules}


def projection(path: str) -> str:
    """The last name of a module path."""
    return path.rpartition(".")[2]


def read(adapters: Sequence[str]) -> list[Candidate]:
    """Read adapters given as `path` or `name=path`; a path's own name is its folder's.

    Raises:
        ValueError: where none is given, a name is no name, two are the same, or a folder is no adapter or damaged.
    """
    if not adapters:
        raise ValueError("doctor: give at least one adapter: a folder, or NAME=FOLDER")
    found: dict[str, Candidate] = {}
    for given in adapters:
        name, _, path = given.rpartition("=")
        candidate = _read(name or Path(path).resolve().name, Path(path))
        if candidate.name in found:
            raise ValueError(
                f"{given}: a second adapter of the name {candidate.name!r}; requests choose by name: give NAME=FOLDER"
            )
        found[candidate.name] = candidate
    return list(found.values())


def _read(name: str, path: Path) -> Candidate:
    check_name(name)
    folder, _ = adapter_of(path)
    if (folder / FILE).is_file():
        return _gguf(name, folder)
    config = read_config(folder)
    if config.get("peft_type") == PEFT_TYPE:
        return _delta(name, folder, config)
    if config.get("peft_type") == "LORA":
        return _lora(name, folder, config)
    raise ValueError(f"{folder}: an adapter of type {config.get('peft_type')!r}, which no engine serves; merge it into its base")


def _delta(name: str, folder: Path, config: dict[str, Any]) -> Candidate:
    delta, modules, other = Delta.load(folder), {}, []
    for parameter, entries in delta.selection.items():
        path, _, own = parameter.rpartition(".")
        if isinstance(entries, Slices) and len(entries.shape) == 2 and own == "weight":
            outputs, inputs = entries.shape
            modules[path] = Module(entries.index.numel(), inputs, outputs)
        else:
            other.append(f"{parameter} ({entries.kind})")
    if not delta.selection:
        raise ValueError(f"{folder}: an adapter without a single parameter; there is nothing to serve")
    dtype = str(next(iter(delta.values.values())).dtype).removeprefix("torch.")
    return Candidate(name, folder, "delta", delta.base, modules, config, tuple(other), dtype=dtype)


def _lora(name: str, folder: Path, config: dict[str, Any]) -> Candidate:
    check_config(folder, config)
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder / WEIGHTS}: missing")
    shapes, other = {}, []
    try:
        with safetensors.safe_open(folder / WEIGHTS, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  # no mapping
                match, shape = LORA_KEY.fullmatch(key), file.get_slice(key).get_shape()
                if match and len(shape) == 2:
                    shapes[match[1], match[2]] = shape
                else:
                    other.append(key)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{folder / WEIGHTS}: missing or damaged ({error})") from error
    modules = {}
    for path in dict.fromkeys(path for path, _ in shapes):
        a_RI, b_OR = shapes.get((path, "A")), shapes.get((path, "B"))
        if a_RI is None or b_OR is None or a_RI[0] != b_OR[1]:
            raise ValueError(f"{folder / WEIGHTS}: {path}: no pair of factors of one rank ({a_RI} and {b_OR})")
        modules[path] = Module(a_RI[0], a_RI[1], b_OR[0])
    if not modules:
        raise ValueError(f"{folder / WEIGHTS}: holds no factors of linear layers")
    noted = read_mapping(folder / MARKER) if (folder / MARKER).is_file() else {}
    exported, base = noted.get("to") == "lora", config.get("base_model_name_or_path")
    dtype = noted.get("base_dtype") if exported else None
    if not isinstance(dtype, str | None):
        raise ValueError(f"{folder / MARKER}: damaged, base_dtype={dtype!r} is no name of a type")
    return Candidate(name, folder, "lora", base, modules, config, tuple(other), exported, dtype=dtype)


def _gguf(name: str, folder: Path) -> Candidate:
    fields, pairs = read_gguf(folder / FILE)
    modules = {weight: Module(len(a_RI), a_RI.shape[1], len(b_OR)) for weight, (a_RI, b_OR) in pairs.items()}
    return Candidate(name, folder, "gguf", None, modules, fields)
