"""A file of results, a line of JSON for each, to which a long program adds as it goes, so that it can go on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Journal:
    """Results by key, on disk.

    Args:
        path: the file; a last line that was torn when the program was stopped is dropped.
        about: what all results depend on. A file that was begun with something else is begun anew.

    Attributes:
        found: key → result.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self._path, self.found = path, dict[str, Any]()
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [json.loads(line) for line in lines if line.endswith("\n")]
        if not whole or whole[0] != json.loads(json.dumps(about)):
            whole = [about]
        self.found = {entry["key"]: entry["result"] for entry in whole[1:]}
        path.write_text("".join(json.dumps(entry) + "\n" for entry in whole))

    def add(self, key: str, result: Any) -> None:
        """Keep one more result."""
        self.found[key] = result
        with self._path.open("a") as file:
            file.write(json.dumps({"key": key, "result": result}) + "\n")
