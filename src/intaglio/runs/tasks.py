"""Generated tasks, whose answers can be verified, with held-out questions that no training row has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..methods import nearest
from .config import DataBlock
from .reading import Row
from .rows import checked

__all__ = ["Verify", "generated"]

Item = Mapping[str, Any]
Verify = Callable[[str, Row], float]  # generated answer and held-out row → 1.0 where right

# reasoning_gym makes item i from seed + i: neighbouring seeds share nearly all items, so held-out seeds start far away.
_HELD_OUT = 1_000_000_000


def generated(block: DataBlock) -> tuple[list[Row], list[Row], list[Item], Verify]:
    """Training rows, held-out rows, the items of these, and the task's own check of an answer.

    Raises:
        ValueError: for an unknown task or setting, or one with too few different questions.
    """
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
    return rows, test, held_out, lambda answer, row: float(scorer.score_answer(answer, row["item"]))


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


def _items(gym: Any, name: str, block: DataBlock, seed: int) -> Iterator[Item]:
    """Items from `seed` on, without end: at most ten times as many as asked for are ever looked at."""
    try:
        source = gym.create_dataset(name, size=10 * (block.train_size + block.test_size), seed=seed, **block.settings)
    except (TypeError, AssertionError, ValueError) as error:
        raise ValueError(f"data.settings: {name} refuses {block.settings}: {error}") from error
    return (source[i] for i in range(len(source)))


def _distinct(items: Iterator[Item], size: int, excluded: Any, *, repeat: bool = False) -> list[Item]:
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


def _task_row(item: Item, chat: bool) -> Row:
    row = {"prompt": item["question"], "completion": f" {item['answer']}"}
    return checked(row, ("prompt", "completion"), "generated", chat=chat)
