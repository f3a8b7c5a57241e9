"""The examples of a run: generated tasks, local files and data sets of the hub, to train on and to score.

A row is in one of the formats of `rows`, and may carry `answer`, the string that a generated answer must equal; default the
completion, or the last turn.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import DataBlock
from .reading import READERS, Row, is_local, read_rows
from .row_store import Scored, Stored, digest_of, in_memory, on_disk
from .rows import checked, form_of, last_text, question
from .tasks import Verify, generated

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

__all__ = ["Examples", "Row", "Verify", "load_examples"]


@dataclass(frozen=True)
class Examples:
    """The rows that a data block names, to train on and to score; read from the disk when they are asked for.

    Attributes:
        train: training rows, with the columns TRL reads and no others.
        held_out: held-out rows in the same form, for the loss on them (`train.eval_strategy`); None where there are none.
        test: the same rows as `prompt` and `answer`, for scoring; none of text rows.
        verify: the task's own check of an answer, if it has one.
        unused: column → rows in which it is filled, of columns that are neither trained on nor scored.
    """

    train: Dataset | IterableDataset
    held_out: Dataset | None
    test: Scored
    verify: Verify | None = None
    unused: Mapping[str, int] = field(default_factory=dict)

    @property
    def is_streamed(self) -> bool:
        """Whether the training rows come as a stream, whose length is not known."""
        return not hasattr(self.train, "__len__")

    def datasets(self) -> dict[str, Any]:
        """The rows as SFTTrainer's `train_dataset` and `eval_dataset`."""
        return {"train_dataset": self.train, "eval_dataset": self.held_out}

    def some(self, count: int) -> list[Row]:
        """The first held-out rows, or training rows where there are none."""
        return list(islice(self.held_out if self.held_out is not None else self.train, count))

    def sample(self, size: int | float) -> Dataset:
        """Training rows for calibration, the same ones for the same data; of a stream, the first.

        Args:
            size: a count, or a share in (0, 1], of which at least 8 and at most 256 rows are taken.

        Raises:
            ValueError: for more rows than there are.
        """
        if self.is_streamed:
            return in_memory(islice(self.train, size if isinstance(size, int) else 256)).to_train_on()
        train: Any = self.train
        count = len(train)
        wanted = size if isinstance(size, int) else min(max(round(size * count), 8), 256, count)
        if wanted > count:
            raise ValueError(f"data.calibration={size}: there are only {count} training rows")
        return train.select(random.Random(0).sample(range(count), wanted))


def load_examples(block: DataBlock, *, hold_out: bool = True) -> Examples:
    """Read or generate what a data block names.

    No prompt is in both the training and the held-out rows: where files repeat one, its training rows are dropped.

    Args:
        block: the data block.
        hold_out: whether held-out rows are wanted; without, and without `data.test`, a file's rows all train.

    Raises:
        ValueError: for an unknown task or setting, a missing file, an empty data set, or rows in no known format.
    """
    if block.task is not None:
        train, test, items, verify = generated(block)
        held_out = in_memory(test)
        scored = Scored(held_out, lambda number: {"item": items[number]})
        return Examples(in_memory(train).to_train_on(), held_out.to_train_on(), scored, verify)
    assert block.train is not None  # DataBlock wants one of the two
    test = None if block.test is None else _stored(block.test, block.test_split, block.model_copy(update={"streaming": False}))
    if block.streaming:
        return _streamed(block, test)
    train = _stored(block.train, block.split, block)
    if test is None and hold_out and "text" not in train.data.column_names:
        train, test = _hold_out(train, block)
    prompts = _questions(test)
    if prompts:
        kept = [number for number, row in enumerate(train.rows()) if question(row) not in prompts]
        if not kept:
            raise ValueError(f"data: {block.train}: every prompt is also in the held-out rows; nothing is left to train on")
        train = train if len(kept) == len(train.data) else train.select(kept)
    return Examples(train.to_train_on(), None if test is None else test.to_train_on(), _scored(test), unused=train.unused)


def _stored(source: str, split: str, block: DataBlock) -> Stored:
    """The rows of a file or data set, checked and on the disk."""
    unused: Counter[str] = Counter()
    how = (block.columns, block.chat)
    if is_local(source):
        rows = _checked(read_rows(source), source, block, unused)
        if not Path(source).is_file():
            next(rows)  # says what is missing
        return on_disk(digest_of(Path(source), Path(source).suffixes, *how), rows, unused)
    data = _loaded(source, split, block)
    places = ((f"row {number}", row) for number, row in enumerate(data, start=1))
    return on_disk(f"hub-{data._fingerprint}-{_digest(how)}", _checked(places, source, block, unused), unused)


def _checked(rows: Iterator[tuple[str, Row]], source: str, block: DataBlock, unused: Counter[str]) -> Iterator[Row]:
    """Rows in one format, checked; counts what of them is not used."""
    form, nests, first = (), False, ""
    for place, row in rows:
        if not form:
            form = _form(row, source, block)
        row = _renamed(row, block, source)
        found = checked(row, form, f"{source}, {place}", chat=block.chat)
        if first and isinstance(found[form[0]], list) != nests:
            kinds = ("turns", "text") if nests else ("text", "turns")
            raise ValueError(
                f"data: {source}, {place}: {form[0]} is {kinds[1]}, where that of {first} is {kinds[0]}; give one kind"
            )
        first, nests = first or place, isinstance(found[form[0]], list)
        used = {*found, *form, *block.columns.values(), "conversations"}
        unused.update(key for key, value in row.items() if key not in used and value not in (None, "", [], {}))
        yield found
    if not form:
        raise ValueError(f"data: {source}: holds no rows")


def _form(row: Row, source: str, block: DataBlock) -> tuple[str, ...]:
    missing = [theirs for theirs in block.columns.values() if theirs not in row]
    if missing:
        raise ValueError(f"data.columns: {source} has no column {missing[0]!r}; it has {', '.join(row)}")
    form = form_of(row, source, block.columns)
    if block.chat and "completion" not in form:
        raise ValueError(f"data.chat has no effect: {source} has no prompt and completion; it has {', '.join(row)}")
    return form


def _renamed(row: Row, block: DataBlock, source: str) -> Row:
    return row | {ours: row.get(theirs) for ours, theirs in block.columns.items()}


def _loaded(source: str, split: str, block: DataBlock) -> Any:
    """A data set of the hub, or of a local folder."""
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        return datasets.load_dataset(source, block.subset, split=split, streaming=block.streaming)
    except (OSError, ValueError, RuntimeError, StopIteration, DatasetsError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"data: {source!r} cannot be read ({reason}); give a {', '.join(READERS)} file or a hub data set"
        ) from error


def _streamed(block: DataBlock, test: Stored | None) -> Examples:
    """Training rows that are read from a data set of the hub as training goes on."""
    from datasets import IterableDataset

    assert block.train is not None
    source, prompts = block.train, _questions(test)

    def rows() -> Iterator[Row]:
        data = _loaded(source, block.split, block)
        places = ((f"row {number}", row) for number, row in enumerate(data, start=1))
        for row in _checked(places, source, block, Counter()):
            if question(row) not in prompts:
                yield {key: value for key, value in row.items() if key != "answer"}

    return Examples(IterableDataset.from_generator(rows), None if test is None else test.to_train_on(), _scored(test))


def _questions(test: Stored | None) -> set[str]:
    """The prompts of held-out rows, each of which must have an answer."""
    found = set()
    for row in test.rows() if test is not None else ():
        found.add(question(row))
        if "messages" in row:
            last_text(row["messages"])
    return found


def _scored(test: Stored | None) -> Scored:
    return Scored(None if test is None or "text" in test.data.column_names else test)


def _hold_out(train: Stored, block: DataBlock) -> tuple[Stored, Stored]:
    """Draw the held-out rows from the training rows."""
    count = len(train.data)
    if count <= block.test_size:
        raise ValueError(
            f"data: {block.train} has {count} rows, too few to hold out test_size={block.test_size}; set data.test "
            "or a smaller test_size"
        )
    chosen = set(random.Random(block.seed).sample(range(count), block.test_size))
    return train.select(i for i in range(count) if i not in chosen), train.select(sorted(chosen))


def _digest(how: Any) -> str:
    import hashlib
    import json

    return hashlib.sha256(json.dumps(how).encode()).hexdigest()[:16]
