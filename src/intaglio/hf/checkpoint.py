"""A tuner's part of a Trainer's checkpoint, and which checkpoint of a run is complete."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors
import safetensors.torch

from ..core.files import write_whole
from ..model import peft_layers

if TYPE_CHECKING:
    from ..training.tuner import Tuner

__all__ = ["COMPLETE", "STATE", "last_checkpoint", "load_tuner_state", "mark_complete", "save_tuner_state"]

STATE, COMPLETE = "tuner_state.safetensors", "complete.json"


def mark_complete(folder: Path, step: int) -> None:
    """Say of a checkpoint that all of it is on disk."""
    write_whole(folder / COMPLETE, json.dumps({"step": step}).encode())


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
    """The newest complete checkpoint of a run folder; torn ones are passed over. None where there is none."""
    folders = [marker.parent for marker in Path(run).glob(f"checkpoint-*/{COMPLETE}")]
    numbered = [folder for folder in folders if folder.name.removeprefix("checkpoint-").isdigit()]
    return max(numbered, key=lambda folder: int(folder.name.removeprefix("checkpoint-")), default=None)
