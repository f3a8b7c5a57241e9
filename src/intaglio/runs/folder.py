"""The folder of a run: the names in it, what an earlier run has left there, and how a finished one is read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..core.files import read_mapping
from ..training.rotation_record import FILE as LAYERS  # importance, draws and visits, for layers that train in turn
from ..training.unmasking_record import FILE as UNMASKING  # where the budget went, for methods that choose while training

try:
    import fcntl
except ImportError:
    fcntl = None

__all__ = ["FILES", "adapter_of", "earlier", "held", "output_folder", "read_run", "remove_earlier", "sweep"]

RESULT = "run.json"  # config, versions, trainable share, seconds per step, peak memory, loss log, scores
ADAPTER = "adapter"  # the result: a Delta, or a PEFT folder for PEFT's own methods
CHECK = "check.safetensors"  # a few prompts and the tuned model's logits, for `intaglio verify`
ANSWERS = "answers.jsonl"  # every held-out answer, before and after
LOCK = ".lock"  # while a process trains into it
LOSS, ACCURACY = "loss.png", "accuracy.png"
# What `intaglio inspect` draws and writes beside them.
SELECTION_PICTURE, UNMASKING_PICTURE, LAYERS_PICTURE, LAYERS_TABLE = "selection.png", "unmasking.png", "layers.png", "layers.csv"

FILES = (RESULT, ADAPTER, CHECK, ANSWERS, LOSS, ACCURACY, UNMASKING, LAYERS)
FILES += (SELECTION_PICTURE, UNMASKING_PICTURE, LAYERS_PICTURE, LAYERS_TABLE)


def output_folder(given: str | None, source: Any, *, resume: bool = False, overwrite: bool = False) -> Path:
    """The folder that a run writes into; an earlier run in it is refused, continued or, later, replaced: never mixed.

    Args:
        given: `train.output_dir`; default `runs/` and the name of the run file.
        source: path of the run file, or its blocks.
        resume: continue an earlier run.
        overwrite: replace it, by `remove_earlier`, once nothing can go wrong any more.

    Raises:
        ValueError: for an earlier run that is neither continued nor replaced, a file in the folder's place, and several
            processes, which would write into one folder.
    """
    if resume and overwrite:
        raise ValueError("resume and overwrite contradict each other; give one of them")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("intaglio train runs in one process; in a loop of your own, attach works under data parallelism")
    stem = Path(source).stem if isinstance(source, (str, Path)) else "run"
    output = Path(given or Path("runs") / stem)
    if output.exists() and not output.is_dir():
        raise ValueError(f"train.output_dir={str(output)!r}: is a file; give a folder")
    left = earlier(output)
    if left and not resume and not overwrite:
        raise ValueError(
            f"{output}: already holds a run ({left[0].name}); --resume continues it, --overwrite replaces it, or set "
            "another train.output_dir"
        )
    return output


@contextmanager
def held(output: Path) -> Iterator[None]:
    """Hold a run's folder for the length of a block: no other process may write into it meanwhile.

    The lock is the process's, and goes with it, however that ends.

    Raises:
        ValueError: where another process holds it.
    """
    there = output.exists()
    output.mkdir(parents=True, exist_ok=True)
    with (output / LOCK).open("a") as file:
        try:
            if fcntl is not None:  # Windows has none
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"{output}: another process is training into it; wait, or set another train.output_dir") from error
        try:
            yield
        finally:
            (output / LOCK).unlink(missing_ok=True)
            if not there:
                with suppress(OSError):  # a run that was refused leaves no empty folder
                    output.rmdir()


def sweep(output: Path) -> None:
    """Delete half-written files of a process that was killed while it saved; call it while the folder is `held`."""
    names = [*FILES, *(path.name for path in output.glob("checkpoint-*"))]
    for folder in (output, *output.glob("checkpoint-*")):
        for left in folder.glob(".*.????????"):
            if folder != output or left.name[1:-9] in names or left.name.startswith(".checkpoint-"):
                shutil.rmtree(left, ignore_errors=True)


def earlier(output: Path) -> list[Path]:
    """The files and folders that an earlier run has left in its folder, checkpoints included."""
    return [path for path in (*(output / name for name in FILES), *output.glob("checkpoint-*")) if path.exists()]


def remove_earlier(output: Path) -> None:
    """Delete what an earlier run has left; other files in the folder stay."""
    for path in earlier(output):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def read_run(run: Path) -> dict[str, Any]:
    """The content of `run.json` of a finished run.

    Raises:
        ValueError: where `run` holds no run.json, or a damaged one.
    """
    path = run / RESULT
    if not path.is_file():
        raise ValueError(f"{run}: not a finished run, it has no {RESULT}")
    result = read_mapping(path)
    if not isinstance(result.get("config"), dict):
        raise ValueError(f"{path}: damaged, it holds no config")
    return result


def adapter_of(path: Path) -> tuple[Path, dict[str, Any] | None]:
    """The adapter folder that `path` means, and the run it came from.

    Args:
        path: an adapter folder, or the folder of a finished run.

    Returns:
        (adapter folder, what run.json holds, or None for an adapter folder).
    """
    if (path / RESULT).is_file():
        return path / ADAPTER, read_run(path)
    return path, None
