"""Contestants in processes of their own that take turns: the harness of the benchmarks of a training step.

A program calls `parse` for its arguments and `measure` for its table; `measure` starts the same program again with `--child`
for each contestant, which then gets no further than `parse`. What a contestant is, the program says.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

OOM: dict[str, Any] = {"oom": True}
Started = tuple[dict[str, Any], Callable[[], dict[str, Any]]]  # a contestant's first answer, and what takes a turn and answers
Start = Callable[[dict[str, Any]], Started]


def parse(parser: argparse.ArgumentParser, start: Start) -> argparse.Namespace:
    """The program's arguments; in the process of a contestant, its turns are taken here and the process ends."""
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is None:
        return arguments
    child(start, arguments.child)
    sys.exit()


def child(start: Start, task: dict[str, Any]) -> None:
    """Build one contestant, then take a turn for every line on standard input.

    Args:
        start: what the program has for `parse`.
        task: what the parent asked for.
    """
    answers, sys.stdout = sys.stdout, sys.stderr  # the libraries may print

    def tell(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    try:
        first, turn = start(task)
        tell(first)
        for _ in sys.stdin:
            tell(turn())
    except torch.OutOfMemoryError:
        tell(OOM)


class Contestant:
    """The parent's end of a child."""

    def __init__(self, label: str, task: dict[str, Any], variables: Mapping[str, str]) -> None:
        command = [sys.executable, sys.argv[0], "--child", json.dumps(task)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | dict(variables)
        )
        self.result: dict[str, Any] = {"label": label, "times": []} | self._answer()

    def turn(self) -> None:
        if "oom" in self.result:
            return
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        answer = self._answer()
        self.result["times"] += answer.pop("times", [])
        self.result |= answer

    def close(self) -> dict[str, Any]:
        self.process.communicate()
        return self.result

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        if self.process.wait() == -signal.SIGKILL:  # by the kernel: the machine, not a GPU, is out of memory
            return OOM
        raise SystemExit(f"a contestant died, see above: {self.process.args}")


def measure(
    labels: Mapping[str, str],
    task: dict[str, Any],
    rounds: int,
    *,
    one_by_one: bool,
    variables: Mapping[str, str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Rounds of turns of the contestants that `labels` names, with environment variables of theirs."""
    groups = [[name] for name in labels] if one_by_one else [list(labels)]
    results = {}
    for group in groups:
        running = {name: Contestant(labels[name], task | {"contestant": name}, variables or {}) for name in group}
        for turn in range(rounds):
            print(f"round {turn + 1} of {rounds}: {', '.join(group)}", file=sys.stderr)
            for contestant in running.values():
                contestant.turn()
        results |= {name: summary(contestant.close()) for name, contestant in running.items()}
    return results


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """Medians, and the fastest step and parts, to which other work on the machine has added least."""
    times = result.pop("times")
    if "oom" in result or not times:
        return result
    medians = {part: statistics.median(t[part] for t in times) for part in times[0]}
    least = {part: min(t[part] for t in times) for part in times[0]}
    return result | {"seconds": medians, "least": least, "fastest": least["total"], "steps": len(times)}
