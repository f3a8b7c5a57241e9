"""Examples from generated tasks, files and hub data sets, in the three formats TRL trains on.

    prompt / completion     two strings, or two lists of messages; the loss is on the completion
    messages                one conversation per row; the last assistant turn is what is scored
    text                    plain text; trained on whole, not scored

A row may carry `answer`, the string that a generated answer must equal; default the completion.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..methods import nearest
from .config import DataBlock

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["Examples", "Verify", "check_tokenizer", "load_examples"]

Row = dict[str, Any]
Verify = Callable[[str, Row], float]  # generated answer and held-out row → 1.0 where right

_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
# reasoning_gym makes item i from seed + i: neighbouring seeds share nearly all items, so held-out seeds start far away.
_HELD_OUT = 1_000_000_000


@dataclass(frozen=True)
class Examples:
    """The rows that a data block names, to train on and to score.

    Attributes:
        train: training rows, with the columns TRL reads and no others.
        held_out: held-out rows in the same form, for the loss on them (`train.eval_strategy`).
        test: the same rows as `prompt` and `answer`, for scoring; none of text rows.
        verify: the task's own check of an answer, if it has one.
    """

    train: list[Row]
    held_out: list[Row]
    test: list[Row]
    verify: Verify | None = None

    def datasets(self) -> dict[str, Dataset | None]:
        """The rows as SFTTrainer's `train_dataset` and `eval_dataset`."""
        from datasets import Dataset

        held_out = Dataset.from_list(self.held_out) if self.held_out else None
        return {"train_dataset": Dataset.from_list(self.train), "eval_dataset": held_out}

    def sample(self, size: int | float) -> list[Row]:
        """Training rows for calibration, the same ones for the same data.

        Args:
            size: a count, or a share in (0, 1], of which at least 8 and at most 256 rows are taken.

        Raises:
            ValueError: for more rows than there are.
        """
        wanted = size if isinstance(size, int) else min(max(round(size * len(self.train)), 8), 256, len(self.train))
        if wanted > len(self.train):
            raise ValueError(f"data.calibration={size}: there are only {len(self.train)} training rows")
        return random.Random(0).sample(self.train, wanted)


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
        return _generate(block)
    assert block.train is not None  # DataBlock wants one of the two
    rows = _read(block.train, block.split, block)
    if block.test is not None:
        train, test = rows, _read(block.test, block.test_split, block)
    else:
        train, test = _hold_out(rows, block) if hold_out and "text" not in rows[0] else (rows, [])
    prompts = {_question(row) for row in test}
    train = [row for row in train if _question(row) not in prompts]
    if not train:
        raise ValueError(f"data: {block.train}: every prompt is also in the held-out rows; nothing is left to train on")
    scored = [_test_row(row) for row in test if "text" not in row]
    return Examples([_training_row(row) for row in train], [_training_row(row) for row in test], scored)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, examples: Examples) -> None:
    """Refuse conversations for a tokenizer that has no chat template.

    Raises:
        ValueError: naming what to do.
    """
    row = examples.train[0]
    if (not isinstance(row.get("prompt", ""), str) or "messages" in row) and not tokenizer.chat_template:
        raise ValueError(
            "data: the rows are conversations, and the model's tokenizer has no chat template; use an instruction-tuned "
            "model, set train.chat_template_path, or give prompt and completion as strings with data.chat=false"
        )


# Generated tasks


def _generate(block: DataBlock) -> Examples:
    gym, name = _gym(block.task or "")
    held_out = _distinct(_items(gym, name, block, block.seed + _HELD_OUT), block.test_size, frozenset())
    seen = {row["question"] for row in held_out}
    train = _distinct(_items(gym, name, block, block.seed), block.train_size, seen, repeat=True)
    if len(held_out) < block.test_size or len(train) < block.train_size:
        raise ValueError(
            f"data: {block.task} with these settings has too few different questions for test_size={block.test_size} "
            f"beside train_size={block.train_size}; widen data.settings or ask for less"
        )
    scorer = gym.create_dataset(name, size=1, seed=block.seed, **block.settings)
    rows, test = ([_task_row(item, block.chat) for item in items] for items in (train, held_out))
    scored = [_test_row(row) | {"item": item} for row, item in zip(test, held_out, strict=True)]
    return Examples(rows, test, scored, lambda answer, row: float(scorer.score_answer(answer, row["item"])))


def _gym(task: str) -> tuple[Any, str]:
    family, _, name = task.partition("/")
    if family != "reasoning_gym" or not name:
        raise ValueError(f"data.task={task!r}: write reasoning_gym/NAME")
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ModuleNotFoundError as error:
        raise ValueError("data.task needs the package reasoning-gym: pip install 'intaglio[tasks]'") from error
    if name not in DATASETS:
        raise ValueError(f"data.task={task!r}: unknown; {nearest(name, sorted(DATASETS))}")
    return reasoning_gym, name


def _items(gym: Any, name: str, block: DataBlock, seed: int) -> Iterator[Mapping[str, Any]]:
    """Items from `seed` on, without end: at most ten times as many as asked for are ever looked at."""
    try:
        source = gym.create_dataset(name, size=10 * (block.train_size + block.test_size), seed=seed, **block.settings)
    except (TypeError, AssertionError, ValueError) as error:
        raise ValueError(f"data.settings: {name} refuses {block.settings}: {error}") from error
    return (source[i] for i in range(len(source)))


def _distinct(items: Iterator[Mapping[str, Any]], size: int, excluded: Any, *, repeat: bool = False) -> list[Mapping[str, Any]]:
    """The first `size` items whose question is not excluded, each question once unless `repeat`."""
    seen, kept = set(excluded), []
    for item in items:
        if item["question"] not in seen:
            kept.append(item)
            if not repeat:
                seen.add(item["question"])
        if len(kept) == size:
            break
    return kept


def _task_row(item: Mapping[str, Any], chat: bool) -> Row:
    row = {"prompt": item["question"], "completion": f" {item['answer']}"}
    return _as_chat(row) if chat else row


# Files and hub data sets


def _read(source: str, split: str, block: DataBlock) -> list[Row]:
    import datasets
    from datasets.exceptions import DatasetsError

    reader = _READERS.get(Path(source).suffix)
    if reader is not None and not Path(source).is_file():
        raise ValueError(f"data: {source}: no such file")
    if reader is not None and Path(source).stat().st_size == 0:
        raise ValueError(f"data: {source}: holds no rows")
    try:
        if reader is not None:
            data = datasets.load_dataset(reader, data_files=source, split="train")
        else:
            data = datasets.load_dataset(source, block.subset, split=split)
    except (OSError, ValueError, RuntimeError, StopIteration, DatasetsError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "corresponds to no data" in reason:  # how datasets reports a CSV file with a header alone
            raise ValueError(f"data: {source}: holds no rows") from error
        raise ValueError(
            f"data: {source!r} cannot be read ({reason}); give a {', '.join(_READERS)} file or a hub data set"
        ) from error
    if block.chat and reader is not None and "completion" not in {*data.column_names, *block.columns}:
        raise ValueError(f"data.chat has no effect: {source} has no prompt and completion; it has {', '.join(data.column_names)}")
    rows = [_clean(i, _rename(dict(row), block.columns, source), source) for i, row in enumerate(data, start=1)]
    if not rows:
        raise ValueError(f"data: {source}: holds no rows")
    return [_as_chat(row) if block.chat else row for row in rows]


def _rename(row: Row, columns: Mapping[str, str], source: str) -> Row:
    for ours, theirs in columns.items():
        if theirs not in row:
            raise ValueError(f"data.columns: {source} has no column {theirs!r}; it has {', '.join(row)}")
        row[ours] = row[theirs]
    return row


def _clean(number: int, row: Row, source: str) -> Row:
    """The columns of a row's format, numbers (of a CSV file, say) as text.

    Raises:
        ValueError: naming the row, where a column is missing or empty.
    """
    keys = next((keys for keys in _FORMATS if set(keys) <= row.keys()), None)
    if keys is None:
        raise ValueError(
            f"data: {source} has the columns {', '.join(row)}; wanted are prompt and completion, messages, or text: map "
            "yours with data.columns, e.g. {prompt: question, completion: answer}"
        )
    empty = [key for key in keys if row[key] is None or (isinstance(row[key], list) and not row[key])]
    if empty:
        raise ValueError(f"data: {source}, row {number}: {empty[0]} is empty; fill it in or drop the row")
    kept = {key: row[key] if isinstance(row[key], list) else str(row[key]) for key in keys}
    return kept if row.get("answer") is None else kept | {"answer": str(row["answer"])}


_FORMATS = (("prompt", "completion"), ("messages",), ("text",))


def _question(row: Row) -> str:
    """The key of a row: its prompt, or all of it where there is none."""
    if "messages" in row:
        turns = row["messages"]
        return repr(turns[:-1] if turns[-1].get("role") == "assistant" else turns)
    return repr(row.get("prompt", row.get("text")))


def _as_chat(row: Row) -> Row:
    if not isinstance(row.get("prompt"), str):
        return row
    prompt, completion = row["prompt"], row["completion"].strip()
    chat = {"prompt": [{"role": "user", "content": prompt}], "completion": [{"role": "assistant", "content": completion}]}
    return row | chat


def _hold_out(rows: list[Row], block: DataBlock) -> tuple[list[Row], list[Row]]:
    """Draw the held-out rows from the training rows."""
    if len(rows) <= block.test_size:
        raise ValueError(
            f"data: {block.train} has {len(rows)} rows, too few to hold out test_size={block.test_size}; set data.test "
            "or a smaller test_size"
        )
    chosen = set(random.Random(block.seed).sample(range(len(rows)), block.test_size))
    return [r for i, r in enumerate(rows) if i not in chosen], [r for i, r in enumerate(rows) if i in chosen]


def _training_row(row: Row) -> Row:
    """The columns that TRL reads: one with answers would change how it sees the rows."""
    return {key: value for key, value in row.items() if key != "answer"}


def _test_row(row: Row) -> Row:
    """Prompt and expected answer of a held-out row."""
    if "prompt" in row:
        prompt, completion = row["prompt"], row["completion"]
        text = completion if isinstance(completion, str) else completion[-1]["content"]
    else:
        *prompt, last = row["messages"]
        if last["role"] != "assistant":
            raise ValueError("data: a held-out conversation must end with an assistant turn, which is the answer")
        text = last["content"]
    return {"prompt": prompt, "answer": row.get("answer", text).strip()}
