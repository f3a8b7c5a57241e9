"""Work in a forked process: libraries are loaded once, and what is killed there, hangs or meets its limits leaves no trace here.

Forking is safe where one thread runs: a program imports this before torch, which then makes no others.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass

for _name, _value in {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}.items():
    os.environ.setdefault(_name, _value)

import torch  # noqa: E402 - after the lines above

KEPT = 1 << 24  # bytes of output


@dataclass(frozen=True)
class Ended:
    """The end of a process.

    Attributes:
        code: of its exit; negative: the signal that ended it.
        seconds: from start to end.
        output: what it wrote to its standard streams, the last of it.
    """

    code: int
    seconds: float
    output: str


def run(work: Callable[[], object], *, timeout: float = 300.0, after: float | None = None, sent: int = signal.SIGKILL) -> Ended:
    """Do `work` in a process of its own and wait for it.

    Args:
        work: what it does; an exception ends it with a traceback and 70, `SystemExit` with its code.
        timeout: seconds until it is killed.
        after: seconds until the signal `sent` goes there; default None, none does.
        sent: the signal.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    reading, writing = os.pipe()
    start, child = time.perf_counter(), os.fork()
    if child == 0:
        os.close(reading)
        _work(work, writing)
    os.close(writing)
    pieces: list[bytes] = []
    while True:
        waited = time.perf_counter() - start
        if waited > timeout:
            os.kill(child, signal.SIGKILL)
        elif after is not None and waited >= after:
            os.kill(child, sent)
            after = None
        if select.select([reading], [], [], max(0.0, (timeout if after is None else after) - waited) + 0.001)[0]:
            piece = os.read(reading, 1 << 16)
            if not piece:
                break
            pieces.append(piece)
    os.close(reading)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return Ended(code, time.perf_counter() - start, b"".join(pieces)[-KEPT:].decode(errors="replace"))


def _work(work: Callable[[], object], stream: int) -> None:
    """The child's life; it never returns."""
    code = 70
    try:
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        warnings.simplefilter("default")  # as in a process of one's own, whatever the parent makes of warnings
        torch.set_num_threads(1)  # it makes its pool of threads anew after a fork, which two threads at once must not do
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115 - to the end
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
