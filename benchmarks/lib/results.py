"""The files of a benchmark's results: `NAME.json` has all figures, `NAME.md` what people read, `NAME.png` shows it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write(output: Path, data: Any, text: str, draw: Callable[[Path], None] | None = None, *, indent: int | None = 1) -> None:
    """Write figures, text and, where it can be drawn, a picture.

    Args:
        output: path of the files; its ending does not matter.
        data: what JSON holds.
        text: Markdown.
        draw: called with the path of the picture.
        indent: of JSON; None for long lists of numbers.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(data, indent=indent) + "\n")
    output.with_suffix(".md").write_text(text)
    if draw is not None:
        draw(output.with_suffix(".png"))


def read(output: Path | None) -> dict[str, Any]:
    """The figures that an earlier run has written there, if any."""
    file = None if output is None else output.with_suffix(".json")
    return json.loads(file.read_text()) if file is not None and file.is_file() else {}
