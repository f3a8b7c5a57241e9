"""Files and folders that appear whole or not at all, and JSON that is read or refused by name."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

__all__ = ["are_numbers", "folder_beside", "is_number", "publish", "read_mapping", "write_whole"]

_LARGEST = 1e300  # JSON has numbers of any length, of which not every one is a float


@contextmanager
def folder_beside(target: Path) -> Iterator[Path]:
    """A new folder on the file system of `target`, for what is to become it; what is left of it vanishes after the block."""
    target.parent.mkdir(parents=True, exist_ok=True)
    hidden = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))  # which its owner alone may enter
    try:
        folder = hidden / target.name
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def publish(folder: Path, target: Path, last: Sequence[str] = ()) -> None:
    """Put a finished folder in place; not even a crash of the machine lets half a file be seen there.

    A new `target` appears by one rename. In one that exists, files are replaced one by one, and others stay.

    Args:
        folder: what is finished, on the file system of `target`. Its files get its own permissions: safetensors writes files
            that only their owner can read.
        target: the place.
        last: names of files that are replaced after all others, in this order.
    """
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        path.chmod(folder.stat().st_mode & 0o666)
        _sync(path)
    if not target.exists():
        for inner in {path.parent for path in files}:
            _sync(inner)
        os.replace(folder, target)
        _sync(target.parent)
        return
    names = [str(path.relative_to(folder)) for path in files]
    for name in [*sorted(set(names) - set(last)), *(name for name in last if name in names)]:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(folder / name, target / name)
        _sync((target / name).parent)  # so that the disk keeps the order


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears by one rename, once it is on the disk."""
    with folder_beside(path) as folder:
        (folder / path.name).write_bytes(content)
        publish(folder, path.parent)


def read_mapping(path: Path) -> dict[str, Any]:
    """A JSON file that holds a mapping.

    Raises:
        ValueError: where it is damaged; a missing file is an `OSError`, as ever.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged, not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: damaged, not a mapping")
    return found


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a value of a JSON file is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -_LARGEST <= value <= _LARGEST


def are_numbers(values: Any, count: int | None = None) -> TypeGuard[list[Any]]:
    """Whether a value of a JSON file is a list of finite numbers, of that length where one is given."""
    return isinstance(values, list) and (count is None or len(values) == count) and all(map(is_number, values))


def _sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError:
        if not folder:  # Windows opens no folders, and some file systems sync none
            raise
