"""Rows of local files, as they are written: no type is guessed, and one row is in memory at a time.

    .jsonl .json    objects, one a line or in one list         .csv .tsv    a header and cells, all of them text
    .txt            paragraphs, with an empty line between     .parquet     typed columns

JSON, CSV and text may be compressed (`.gz`), in UTF-8, or in UTF-16 where a byte order mark says so.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

__all__ = ["READERS", "Written", "is_local", "read_rows"]

Row = dict[str, Any]
_MARKS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16", b"\xef\xbb\xbf": "utf-8-sig"}
_PIECE = 1 << 20  # characters of a JSON list read at a time


class Written(str):
    """A number or truth value of a JSON row, as the file has it: `1.50`, `007`, `true`."""


def is_local(source: str) -> bool:
    """Whether a name is of a local file, there or not; else it is one of the hub, or a folder."""
    return _kind(source) in READERS or Path(source).is_file()


def read_rows(source: str) -> Iterator[tuple[str, Row]]:
    """Rows of a file, each with its place in words.

    Values are text, None, or what JSON and Parquet nest; a bare number or truth value of a JSON file is `Written`.

    Raises:
        ValueError: naming file and row, where it cannot be read as what it is called.
    """
    kind = _kind(source)
    if not Path(source).exists():
        raise ValueError(f"data: {source}: no such file")
    if kind not in READERS:
        raise ValueError(f"data: {source}: no kind of file that is read; known are {', '.join(READERS)}, the first ones also .gz")
    try:
        yield from READERS[kind](source)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"data: {source}: not in UTF-8 (byte {error.start:,}: {error.reason}); save it so, e.g. iconv -f latin1 -t utf-8"
        ) from error
    except (OSError, EOFError, csv.Error) as error:
        raise ValueError(f"data: {source} cannot be read ({error})") from error


def _kind(source: str) -> str:
    return Path(source.removesuffix(".gz")).suffix.lower()


def _open(source: str) -> IO[str]:
    binary: Any = (gzip.open if source.endswith(".gz") else open)(source, "rb")
    mark = binary.read(3)
    binary.seek(0)
    encoding = next((encoding for first, encoding in _MARKS.items() if mark.startswith(first)), "utf-8")
    return io.TextIOWrapper(binary, encoding=encoding, newline="")


def _lines(source: str) -> Iterator[tuple[str, Row]]:
    count = 0
    with _open(source) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                count += 1
                yield f"row {count}", _row(line, source, f"line {number}")


def _json(source: str) -> Iterator[tuple[str, Row]]:
    """Objects that follow each other, or stand in one list: each is read by itself."""
    with _open(source) as file:
        text, end, number, decoder = "", False, 0, json.JSONDecoder()
        while True:
            text = text.lstrip(" \t\r\n,[]" if number else " \t\r\n[")
            if not text and not end:
                text = file.read(_PIECE)
                end = not text
                continue
            if not text:
                return
            try:
                _, length = decoder.raw_decode(text)
            except json.JSONDecodeError as error:
                more = file.read(max(_PIECE, len(text)))  # twice as much each time, for an object that is large
                if not more:
                    raise ValueError(f"data: {source}, row {number + 1}: no whole JSON object ({error.msg})") from error
                text += more
                continue
            number += 1
            yield f"row {number}", _row(text[:length], source, f"row {number}")
            text = text[length:]


def _row(text: str, source: str, place: str) -> Row:
    try:
        row = json.loads(text, object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"data: {source}, {place}: no JSON object ({error}): {text.strip()[:60]!r}") from error
    if not isinstance(row, dict):
        raise ValueError(f"data: {source}, {place}: no JSON object but {type(row).__name__}: {text.strip()[:60]!r}")
    bare = [key for key, value in row.items() if isinstance(value, (bool, int, float))]
    if bare:
        as_written = json.loads(text, parse_float=Written, parse_int=Written, parse_constant=Written)
        row |= {key: Written(json.dumps(row[key])) if isinstance(row[key], bool) else as_written[key] for key in bare}
    return row


def _distinct(pairs: list[tuple[str, Any]]) -> Row:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, _ in pairs if [k for k, _ in pairs].count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice")
    return found


def _cells(source: str) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(1 << 30)
    with _open(source) as file:
        header = file.readline()
        # A comma is what the name promises; where the header has none, one of the others that people's programs write.
        between = "\t" if _kind(source) == ".tsv" else next((sign for sign in ",;\t|" if sign in header), ",")
        names = next(csv.reader([header], delimiter=between, strict=True), [])
        if len(set(names)) < len(names):
            raise ValueError(f"data: {source}: a column name stands twice in the header: {', '.join(names)}")
        for number, cells in enumerate(csv.reader(file, delimiter=between, strict=True), start=1):
            if cells and len(cells) != len(names):
                raise ValueError(f"data: {source}, row {number}: {len(cells)} cells under {len(names)} column names")
            if cells:
                yield f"row {number}", {name: cell or None for name, cell in zip(names, cells, strict=True)}


def _paragraphs(source: str) -> Iterator[tuple[str, Row]]:
    number, lines = 0, []
    with _open(source) as file:
        for line in (*file, ""):
            if line.strip():
                lines.append(line)
            elif lines:
                number += 1
                yield f"row {number}", {"text": "".join(lines).rstrip("\r\n")}
                lines = []


def _columns(source: str) -> Iterator[tuple[str, Row]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(source) as file:
            number = 0
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", {key: _without_nulls(value) for key, value in row.items()}
    except pyarrow.ArrowException as error:
        raise ValueError(f"data: {source} cannot be read as Parquet ({error})") from error


def _without_nulls(value: Any) -> Any:
    """Nested values less what is null: a column of structs has every key of any row in all of them."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


READERS: dict[str, Callable[[str], Iterator[tuple[str, Row]]]] = {
    ".jsonl": _lines,
    ".json": _json,
    ".csv": _cells,
    ".tsv": _cells,
    ".txt": _paragraphs,
    ".parquet": _columns,
}
