"""The tables in the documents that the code gives: `python docs/tables.py` writes them, `make test` holds pages against them.

A table stands behind a comment with its name, `<!-- methods -->`, up to the next blank line.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from pydantic import BaseModel

from intaglio.methods import METHODS
from intaglio.model.structure import describe
from intaglio.runs import config

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))
from support import tiny  # noqa: E402  (beside the package, not in it)


def tables() -> dict[tuple[str, str], list[str]]:
    """(page, name of the table) → its lines."""
    found = {("README.md", "methods"): _methods(), ("docs/s2ft.md", "architectures"): _architectures()}
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


def _architectures() -> list[str]:
    """What is known of each architecture that is tested, `model_type` by `model_type`."""
    known: dict[tuple[str, ...], list[str]] = {}
    for name in tiny.DESCRIBED | tiny.CHANNELS:
        model = tiny.build(name)
        layers = [layer.projections for layer in describe(model)]
        heads = [layer["o"].width for layer in layers if "o" in layer]
        experts = any(len(layer["down"].shape) == 3 for layer in layers)
        row = (
            f"`{model.config.model_type}`",
            "no" if not heads else "in every layer" if len(heads) == len(layers) else "in some layers",
            "of every expert" if experts else "yes",
            "channels" if name in tiny.FIXED_HEADS or len(heads) < len(layers) else "heads, channels",
            "every method" if name in tiny.MODELS else "S2FT",
        )
        known.setdefault(row, []).append(name)
    rows = [f"| {' | '.join(row)} | {', '.join(f'`{name}`' for name in names)} |" for row, names in sorted(known.items())]
    return ["| `model_type` | heads | channels | `permute` | tested with | by tiny model |", "|---|---|---|---|---|---|", *rows]


def _fields(block: type[BaseModel]) -> list[str]:
    rows = [f"| `{key}` | `{field.default!r}` | {field.description} |" for key, field in block.model_fields.items()]
    return ["| key | default | meaning |", "|---|---|---|", *rows]


if __name__ == "__main__":
    for (page, name), rows in tables().items():
        (ROOT / page).write_text(written(page, name, rows), encoding="utf-8")
