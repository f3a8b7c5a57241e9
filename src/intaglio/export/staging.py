"""A folder of an export, which appears complete or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..core.files import folder_beside, publish

__all__ = ["MARKER", "check_target", "mark", "staged"]

MARKER = "intaglio_export.json"  # what was exported and how exact it is; only a folder with it is ever replaced


def check_target(directory: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Refuse, before any work, a folder that an export would damage.

    Args:
        directory: where the export is to appear.
        overwrite: replace an earlier export there; default False. Anything else is never replaced.

    Raises:
        ValueError: where something is there already.
    """
    target = Path(directory).resolve()
    if not target.exists():
        return target
    if not (target / MARKER).is_file():
        raise ValueError(f"output {str(directory)!r}: exists and is no earlier export; give a new folder")
    if not overwrite:
        raise ValueError(f"output {str(directory)!r}: holds an earlier export; --overwrite replaces it, or give a new folder")
    return target


def mark(folder: Path, figures: Mapping[str, Any]) -> None:
    """Leave the figures of an export in its folder, which says too that it is one."""
    (folder / MARKER).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


@contextmanager
def staged(directory: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `directory` by one rename if the block ends well, and vanishes if it does not.

    Raises:
        ValueError: as `check_target`.
    """
    target = check_target(directory, overwrite=overwrite)
    with folder_beside(target) as folder:
        old = folder.parent / "old"
        yield folder
        check_target(target, overwrite=overwrite)  # something may have appeared since
        try:
            if target.exists():
                os.replace(target, old)
            publish(folder, target)
        except BaseException:
            if old.exists() and not target.exists():
                os.replace(old, target)
            raise
