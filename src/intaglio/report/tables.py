"""Results as tables for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["show"]


def show(kind: str, result: dict[str, Any]) -> None:
    """Print a command's result; `kind` is one of run, score, verify, methods."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for label, text in _ROWS[kind](result):
        table.add_row(label, text, style="bold" if label.isupper() else None)
    # Wide enough for one row a line in a file or a log, where there is no terminal to fit.
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table)


def _run(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    trainable, training, adapter = result["trainable"], result["training"], result["adapter"]
    before, after = result["before"], result["after"]
    yield "trainable", f"{trainable['entries']:,} of {trainable['of']:,} weights = {trainable['share']:.2%}"
    yield "steps", f"{training['steps']} ({training['seconds_per_step'] or 0:.2f} s each, median)"
    yield "peak memory", f"{training['peak_memory_bytes'] / 1e9:.2f} GB ({training['peak_memory_kind']})"
    yield "adapter", f"{adapter['path']}, {adapter['bytes'] / 1e6:.2f} MB"
    if before is not None:
        yield "before", _score_text(before)
    if after is not None:
        yield "after", _score_text(after)
    if before is not None and after is not None:
        yield from _gain(before, after)
    pictures = "loss.png" + ("" if after is None else ", accuracy.png, answers.jsonl")
    yield "written", f"{result['output']}: run.json, adapter, {pictures}"


def _gain(before: dict[str, Any], after: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Split the gain: what the base answered right in another format, and what it could not answer."""
    total = after["total"]
    gain, form = after["correct"] - before["correct"], before["lenient"] - before["correct"]
    yield "gain", f"{100 * gain / total:+.1f} points"
    yield "  of it format", f"{100 * form / total:+.1f} points: the base has the right answer somewhere in its output"
    yield (
        "  of it skill",
        f"{100 * (gain - form) / total:+.1f} points: right where the base is wrong even by that lenient reading",
    )


def _score_text(score: dict[str, Any]) -> str:
    interval = f"95 % interval {score['low']:.1%} … {score['high']:.1%}"
    lenient = f"lenient {score['lenient'] / score['total']:.1%}"
    return f"{score['correct']}/{score['total']} = {score['accuracy']:.1%} right ({interval}; {lenient})"


def _score(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "model", f"{result['model']}{'' if result['adapter'] is None else ' + ' + result['adapter']}"
    yield "score", _score_text(result)
    yield "exact", f"{result['exact']}/{result['total']}"


def _verify(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "adapter", f"{result['adapter']} on a fresh base"
    equal = "equal bit for bit" if result["equal"] else "DIFFERENT"
    yield "logits", f"{equal} (greatest difference {result['max_difference']:.1e} over {result['prompts']} prompts)"


def _methods(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name, method in result.items():
        fields = ", ".join(f"{k}={v!r}" for k, v in method["fields"].items() if k != "name")
        yield name, f"{method['summary']}\n{fields}\n"
    yield "lora", "PEFT's LoRA, for comparison; fields are LoraConfig's"


_ROWS: dict[str, Callable[[dict[str, Any]], Iterator[tuple[str, str]]]] = {
    "run": _run,
    "score": _score,
    "verify": _verify,
    "methods": _methods,
}
