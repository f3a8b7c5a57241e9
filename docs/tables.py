"""The tables in the documents that the code gives: `python docs/tables.py` writes them, `make test` holds pages against them.

A table stands behind a comment with its name, `<!-- methods -->`, up to the next blank line.
"""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import BaseModel

from intaglio.methods import METHODS
from intaglio.runs import config

ROOT = Path(__file__).parents[1]


def tables() -> dict[tuple[str, str], list[str]]:
    """(page, name of the table) → its lines."""
    found = {("README.md", "methods"): _methods()}
    for block in (config.DataBlock, config.AttachBlock, config.EvaluateBlock):
        found["docs/run-file.md", f"fields: {block.__name__}"] = _fields(block)
    return found


def written(page: str, name: str, rows: list[str]) -> str:
    """A page's text with one of its tables replaced.

    Raises:
        ValueError: where the page has no place for it.
    """
    text = (ROOT / page).read_text(encoding="utf-8")
    place = re.compile(rf"(<!-- {re.escape(name)} -->\n\n?)(.*?)(?=\n\n|\Z)", re.DOTALL)
    if not place.search(text):
        raise ValueError(f"{page}: has no comment <!-- {name} -->, where this table would stand")
    return place.sub(lambda match: match[1] + "\n".join(rows), text, count=1)


def _methods() -> list[str]:
    rows = [f"| `{cls.__name__}` | `{name}` | {cls.summary} |" for name, cls in METHODS.items()]
    return ["| method | `name` | what it trains |", "|---|---|---|", *rows]


def _fields(block: type[BaseModel]) -> list[str]:
    rows = [f"| `{key}` | `{field.default!r}` | {field.description} |" for key, field in block.model_fields.items()]
    return ["| key | default | meaning |", "|---|---|---|", *rows]


if __name__ == "__main__":
    for (page, name), rows in tables().items():
        (ROOT / page).write_text(written(page, name, rows), encoding="utf-8")
