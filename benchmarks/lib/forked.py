"""Work in a forked child, which has all imports done and may be killed at any moment."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

__all__ = ["killed_at_write", "run"]


def run(work: Callable[[], object], log: Path, *, kill_after: float | None = None, number: int = signal.SIGKILL) -> int:
    """The exit status of a child that does some work; negative where a signal ended it.

    Args:
        work: what to do; an exception is status 1.
        log: gets what the child prints.
        kill_after: seconds after which it gets a signal; default never.
        number: of the signal.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with log.open("a") as stream:
                os.dup2(stream.fileno(), 1)
                os.dup2(stream.fileno(), 2)
                work()
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, number)  # one that is over is a zombie until waited for: nothing else can be hit
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at_write(count: int) -> None:
    """Let this process die when it is about to put a file in place, or to write one of torch's, for the `count`-th time."""
    import torch

    left = [count]

    def dying(function: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*args: object, **kwargs: object) -> object:
            left[0] -= 1
            if left[0] <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapped

    os.replace, torch.save = dying(os.replace), dying(torch.save)
