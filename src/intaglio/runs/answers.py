"""Scores of generated answers: right by the task's own check, equal to the expected string, or leniently read."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .config import EvaluateBlock
from .data import Row, Verify
from .generate import Output, generate_answers

__all__ = ["Score", "evaluate", "is_lenient_match", "wilson"]


@dataclass(frozen=True)
class Score:
    """Counts of one evaluation.

    Attributes:
        total: held-out examples.
        correct: right answers: by the task's own check where there is one (and `match: task`), else `exact`.
        exact: answers equal to the expected string, character by character.
        lenient: outputs that contain the expected answer anywhere as a word or number of its own. It forgives every
            format, so lenient − exact is what a better format alone could gain.
        cut: outputs that had not ended when they had as many tokens as `max_new_tokens`.
        low, high: 95 % Wilson interval of correct / total.
    """

    total: int
    correct: int
    exact: int
    lenient: int
    low: float
    high: float
    cut: int = 0

    @property
    def accuracy(self) -> float:
        """correct / total."""
        return self.correct / self.total

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"accuracy": self.accuracy}

    def __str__(self) -> str:
        return f"{self.correct}/{self.total} = {self.accuracy:.1%} (95 % interval {self.low:.1%} … {self.high:.1%})"


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    block: EvaluateBlock,
    verify: Verify | None = None,
    *,
    title: str = "evaluate",
) -> tuple[Score, list[Row]]:
    """Generate an answer for each held-out row and score it.

    Args:
        rows: with `prompt` and `answer`.
        block: how to generate, and what of the output is the answer.
        verify: the task's own check; an answer is right where it returns 1.
        title: of the progress bar.

    Returns:
        The score, and a record per row: prompt, answer, output, correct, exact, lenient, cut.

    Raises:
        ValueError: where there is nothing to score.
    """
    rows = rows[: block.limit]
    if not rows:
        raise ValueError("evaluate: no held-out rows to score (text rows are trained on, not scored); drop the block")
    outputs = generate_answers(
        model,
        tokenizer,
        [r["prompt"] for r in rows],
        batch_size=block.batch_size,
        max_new_tokens=block.max_new_tokens,
        title=title,
    )
    check = verify if block.match == "task" else None
    if block.extract is not None and verify is None:
        rows = [row | {"answer": _extract(block.extract, row["answer"]) or row["answer"]} for row in rows]
    records = [_record(row, output, block.extract, check) for row, output in zip(rows, outputs, strict=True)]
    counts = {key: sum(record[key] for record in records) for key in ("correct", "exact", "lenient", "cut")}
    low, high = wilson(counts["correct"], len(records))
    return Score(total=len(records), low=low, high=high, **counts), records


def is_lenient_match(answer: str, output: str) -> bool:
    """Whether `answer` occurs in `output` as a word or number of its own, in any case.

    >>> is_lenient_match("5", "The answer is 5."), is_lenient_match("5", "-5 or 15 or 5.2")
    (True, False)
    """
    return re.search(rf"(?<![\w.\-]){re.escape(answer)}(?!\w|[.,]\d)", output, re.IGNORECASE) is not None


def wilson(hits: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a proportion; z = 1.96 for 95 %."""
    share, spread = hits / total, z * z / total
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    # Exact at the ends, where rounding would put the interval beside the proportion.
    return 0.0 if hits == 0 else centre - half, 1.0 if hits == total else centre + half


def _record(row: Row, generated: Output, extract: str | None, verify: Verify | None) -> Row:
    output = generated.text
    answer = output if extract is None else _extract(extract, output)
    exact = answer == row["answer"]
    correct = exact if verify is None else verify(answer, row) >= 1.0 - 1e-9
    lenient = is_lenient_match(row["answer"], output) or correct
    return {
        "prompt": row["prompt"],
        "answer": row["answer"],
        "output": output,
        "correct": correct,
        "exact": exact,
        "lenient": lenient,
        "cut": generated.is_cut,
    }


def _extract(pattern: str, output: str) -> str:
    matches = list(re.finditer(pattern, output))
    if not matches:
        return ""
    return ((matches[-1].group(1) or "") if matches[-1].re.groups else matches[-1].group(0)).strip()
