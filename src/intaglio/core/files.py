"""Files and folders that appear whole or not at all, and JSON that is read or refused by name."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["folder_beside", "publish", "read_mapping", "synced", "write_whole"]


@contextmanager
def folder_beside(target: Path) -> Iterator[Path]:
    """A temporary folder next to `target`, on its file system, for what is to become it; it vanishes after the block."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(folder: Path, target: Path, last: Sequence[str] = ()) -> None:
    """Put the files of a finished folder in place.

    A new `target` appears by one rename. In one that exists, files are replaced one by one, and others stay.

    Args:
        folder: what is finished, on the file system of `target`.
        target: the place.
        last: names of files that are replaced after all others, in this order.
    """
    for path in _files(folder):
        synced(path)
    if not target.exists():
        folder.chmod(0o755)
        os.replace(folder, target)
        return
    order = {name: place for place, name in enumerate(last, start=1)}
    for path in sorted(_files(folder), key=lambda path: (order.get(str(path.relative_to(folder)), 0), path)):
        place = target / path.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, place)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears by one rename, once it is on the disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    synced(temporary)
    os.replace(temporary, path)


def synced(path: Path) -> None:
    """Wait until a file's content is on the disk."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]
