"""Checked rows on disk, read as they are needed: memory does not grow with the data.

Text columns are Arrow strings. Conversations are kept as JSON text in one column and read back row by row, since Arrow would
give every turn the keys of all others, and datasets' own JSON type rounds numbers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, final

from datasets import Dataset, Features, Value, config
from datasets.arrow_writer import ArrowWriter

from ..core.files import folder_beside, publish, read_mapping
from .reading import Row
from .rows import last_text

__all__ = ["Conversations", "Scored", "Stored", "digest_of", "in_memory", "on_disk"]

_ROW, _ANSWER = "row", "answer"
_FILE, _COUNTS = "rows.arrow", "unused.json"


@final
class Conversations(Dataset):
    """A data set of rows whose values nest: each row is decoded as it is read."""

    _stored: Dataset

    @classmethod
    def of(cls, stored: Dataset) -> Conversations:
        """The rows of a data set whose column `row` is JSON."""
        rows = cls(stored._data, info=stored._info, split=stored._split, indices_table=stored._indices)
        rows._stored = stored
        return rows

    @property
    def column_names(self) -> list[str]:
        return list(self[0])

    def __iter__(self) -> Generator[Row, None, None]:
        yield from (json.loads(row[_ROW]) for row in self._stored)  # type: ignore[call-overload]  # rows are mappings

    def __getitem__(self, key: Any) -> Any:
        found: Any = self._stored[key][_ROW]
        return json.loads(found) if isinstance(found, str) else [json.loads(text) for text in found]

    def select(self, *args: Any, **kwargs: Any) -> Conversations:
        """As a data set's."""
        return Conversations.of(self._stored.select(*args, **kwargs))

    def map(self, function: Callable[..., Any], **kwargs: Any) -> Dataset:  # type: ignore[override]
        """As a data set's, with decoded rows; the result is an ordinary one, of the columns that the function returns."""
        options: dict[str, Any] = kwargs | {"remove_columns": [_ROW]}
        options["fn_kwargs"] = {"function": function} | (kwargs.get("fn_kwargs") or {})
        return self._stored.map(_on_row, **options)


def _on_row(stored: Row, function: Callable[..., Any], **kwargs: Any) -> Any:
    return function(json.loads(stored[_ROW]), **kwargs)


@final
class Scored(Sequence[Row]):
    """Held-out rows as `prompt` and `answer`, each made when it is asked for.

    Args:
        stored: the rows.
        more: what else the row of a number holds.
    """

    def __init__(self, stored: Stored | None, more: Callable[[int], Row] = lambda number: {}) -> None:
        self._stored, self._more = stored, more

    def __len__(self) -> int:
        return 0 if self._stored is None else len(self._stored.data)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            return [self[number] for number in range(*key.indices(len(self)))]
        assert self._stored is not None
        row = self._stored.row(range(len(self))[key])
        prompt, completion = (row["prompt"], row["completion"]) if "prompt" in row else (row["messages"][:-1], row["messages"])
        answer = row.get(_ANSWER)
        if answer is None:
            answer = completion if isinstance(completion, str) else last_text(completion)
        return {"prompt": prompt, "answer": answer.strip()} | self._more(range(len(self))[key])


@dataclass(frozen=True)
class Stored:
    """Rows of one data set, with their answers.

    Attributes:
        data: the rows as they are kept.
        unused: column → rows in which it is filled, of columns that are neither trained on nor scored.
    """

    data: Dataset
    unused: Mapping[str, int] = field(default_factory=dict)

    def row(self, number: int) -> Row:
        """A row as it was checked."""
        return _whole(self.data[number])

    def rows(self) -> Iterator[Row]:
        """All rows, as they were checked."""
        return (_whole(kept) for kept in self.data)  # type: ignore[arg-type]  # rows are mappings

    def select(self, numbers: Iterable[int]) -> Stored:
        """Some of the rows."""
        return Stored(self.data.select(numbers), self.unused)

    def to_train_on(self) -> Dataset:
        """The rows as a trainer reads them, without answers."""
        data = self.data.remove_columns([_ANSWER]) if _ANSWER in self.data.column_names else self.data
        return Conversations.of(data) if _ROW in data.column_names else data


def _whole(kept: Mapping[str, Any]) -> Row:
    row = json.loads(kept[_ROW]) if _ROW in kept else {key: value for key, value in kept.items() if key != _ANSWER}
    return row if kept.get(_ANSWER) is None else row | {_ANSWER: kept[_ANSWER]}


def in_memory(rows: Iterable[Row]) -> Stored:
    """A few rows, kept in memory."""
    kept = [_kept(row) for row in rows]
    return Stored(Dataset.from_list(kept, features=_features(kept[0])))


def on_disk(digest: str, rows: Iterator[Row], unused: Mapping[str, int]) -> Stored:
    """Rows written once into the cache of data sets, by the digest of what they are made from.

    Args:
        digest: of the content and of how it is read.
        rows: checked; only run through where the cache has none.
        unused: counts that grow while `rows` are run through.
    """
    target = Path(config.HF_DATASETS_CACHE) / "intaglio" / digest
    if not target.exists():
        with folder_beside(target) as folder:
            first = next(rows)
            with ArrowWriter(path=str(folder / _FILE), features=_features(_kept(first))) as writer:
                for row in chain([first], rows):
                    writer.write(_kept(row))
                writer.finalize()
            (folder / _COUNTS).write_text(json.dumps(dict(unused)), encoding="utf-8")
            with suppress(OSError):  # another process was faster
                publish(folder, target)
    return Stored(Dataset.from_file(str(target / _FILE)), read_mapping(target / _COUNTS))


def digest_of(path: Path, *how: Any) -> str:
    """Hash of a file's content, and of how it is read."""
    digest = hashlib.sha256(json.dumps([version("intaglio"), *how], default=str).encode())
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()[:32]


def _kept(row: Row) -> Row:
    answer = row.get(_ANSWER)
    trained = {key: value for key, value in row.items() if key != _ANSWER}
    nests = any(not isinstance(value, str) for value in trained.values())
    return ({_ROW: json.dumps(trained, ensure_ascii=False)} if nests else trained) | {_ANSWER: answer}


def _features(kept: Row) -> Features:
    return Features({key: Value("string") for key in kept})
