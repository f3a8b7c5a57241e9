"""A tuner's part of a Trainer's checkpoint, and which checkpoint of a run is complete."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch

from ..core.files import read_mapping, write_whole
from ..model import peft_layers

if TYPE_CHECKING:
    from ..training.tuner import Tuner

__all__ = [
    "COMPLETE",
    "STATE",
    "last_checkpoint",
    "load_tuner_state",
    "mark_complete",
    "refuse_other_settings",
    "save_tuner_state",
]

STATE, COMPLETE = "tuner_state.safetensors", "complete.json"


def mark_complete(folder: Path, step: int, settings: Mapping[str, Any] | None = None) -> None:
    """Say of a checkpoint that all of it is on disk: hashes of its files, and the settings of its run."""
    files = {str(path.relative_to(folder)): _hash(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    files.pop(COMPLETE, None)
    manifest = {"step": step, "files": files, "settings": dict(settings or {})}
    write_whole(folder / COMPLETE, json.dumps(manifest, indent=1, default=str).encode())


def refuse_other_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuse to go on from a checkpoint of a run with other settings; what a checkpoint does not know is not compared.

    Raises:
        ValueError: with everything that differs.
    """
    then = read_mapping(folder / COMPLETE).get("settings", {})
    now = json.loads(json.dumps(dict(settings), default=str))
    differ = [f"{key} was {then[key]!r}, now {now.get(key)!r}" for key in then if then[key] != now.get(key)]
    if differ:
        raise ValueError(
            f"resume: {folder.name} is of a run with other settings: {'; '.join(differ)}; change it back, or start anew"
        )


def save_tuner_state(tuner: Tuner, folder: str | os.PathLike[str]) -> None:
    """Write `tuner.state_dict()` as `tuner_state.safetensors`: tensors as such, everything else as JSON."""
    state = tuner.state_dict()
    tensors = {f"slots/{key}": tensor.cpu().contiguous() for key, tensor in state.pop("slots").items()}
    write_whole(Path(folder) / STATE, safetensors.torch.save(tensors, {"tuner": json.dumps(state)}))


def load_tuner_state(tuner: Tuner, folder: str | os.PathLike[str]) -> None:
    """Continue `tuner` from a checkpoint folder.

    Raises:
        ValueError: where the file is missing or damaged, or belongs to another method, base or selection.
    """
    path = Path(folder) / STATE
    if not path.is_file():
        raise ValueError(f"{folder}: not a checkpoint of a sparse run, it has no {STATE}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call]
            state = json.loads(file.metadata()["tuner"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a mapping
    except (safetensors.SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: damaged ({error}); resume from an earlier checkpoint") from error
    tuner.check(state)  # before anything is changed
    if peft_layers.is_peft(tuner.model):
        peft_layers.load(tuner.model, folder)  # the entries that are not chosen differ from run to run: LoRA starts at random
    state["slots"] = {key.removeprefix("slots/"): t for key, t in tensors.items() if key.startswith("slots/")}
    tuner.load_state_dict(state)


def last_checkpoint(run: str | os.PathLike[str]) -> Path | None:
    """The newest complete checkpoint of a run folder; None where there is none.

    Torn ones are passed over, and those of which a file has changed since, with a warning that names it.
    """
    folders = [marker.parent for marker in Path(run).glob(f"checkpoint-*/{COMPLETE}")]
    numbered = [folder for folder in folders if folder.name.removeprefix("checkpoint-").isdigit()]
    for folder in sorted(numbered, key=lambda folder: int(folder.name.removeprefix("checkpoint-")), reverse=True):
        damaged = _damaged(folder)
        if damaged is None:
            return folder
        warnings.warn(f"{folder}: {damaged}; an earlier checkpoint is taken", stacklevel=2)
    return None


def _damaged(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint; None where all are as they were written."""
    try:
        files = read_mapping(folder / COMPLETE).get("files", {})
    except (OSError, ValueError) as error:
        return str(error)
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if _hash(path) != expected:
            return f"{name} is damaged, or was changed"
    return None


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if sys.version_info >= (3, 11)
            else hashlib.sha256(file.read()).hexdigest()
        )
