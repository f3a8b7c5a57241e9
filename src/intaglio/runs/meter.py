"""Seconds per optimizer step, peak memory and loss of a training run."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, final

import torch
from transformers import TrainerCallback

__all__ = ["StepMeter", "StopWhenAsked", "mean_loss", "peak_memory"]


class StepMeter(TrainerCallback):
    """Times every optimizer step, from the start of its forward to the end of its update."""

    def __init__(self) -> None:
        self._started = 0.0
        self._seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _wait()
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _wait()
        self._seconds.append(time.perf_counter() - self._started)

    def figures(self) -> dict[str, Any]:
        """Median and total seconds, and the process's peak memory in bytes with its kind."""
        median = statistics.median(self._seconds) if self._seconds else None
        size, kind = peak_memory()
        return {"seconds_per_step": median, "seconds": sum(self._seconds), "peak_memory_bytes": size, "peak_memory_kind": kind}


def mean_loss(history: Iterable[Mapping[str, Any]]) -> float | None:
    """Mean loss of a run's updates, from its log; where nothing is logged, the Trainer's own mean, since the last start.

    Args:
        history: `log_history` of the Trainer's state: every loss is the mean since the one before.
    """
    total, last, found = 0.0, 0, None
    for entry in history:
        if "loss" in entry and entry["step"] > last:
            total, last = total + float(entry["loss"]) * (entry["step"] - last), entry["step"]
        found = entry.get("train_loss", found)
    return total / last if last else found


def peak_memory() -> tuple[int, str]:
    """(bytes, kind): the allocator's peak on a GPU, else the process's resident high-water mark."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated(), "GPU memory allocated"
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset, "resident set"
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "resident set"


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@final
class StopWhenAsked(TrainerCallback):
    """A callback that ends training after an update, with a checkpoint, once somebody asks for it."""

    def __init__(self, is_asked: Callable[[], bool]) -> None:
        self._is_asked = is_asked

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._is_asked():
            control.should_save = control.should_training_stop = True
