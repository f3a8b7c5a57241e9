"""Find things in the folder of a finished run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..core.files import read_mapping

__all__ = ["adapter_of", "read_run"]


def read_run(run: Path) -> dict[str, Any]:
    """What `run.json` of a finished run holds.

    Raises:
        ValueError: where `run` holds no run.json, or a damaged one.
    """
    path = run / "run.json"
    if not path.is_file():
        raise ValueError(f"{run}: not a finished run, it has no run.json")
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
    if (path / "run.json").is_file():
        return path / "adapter", read_run(path)
    return path, None
