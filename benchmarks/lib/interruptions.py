"""Interruptions of a run: killed, ended or out of disk at a moment of the clock, or at one of its own writes to a folder.

A process counts what it is about to write (files opened, folders made, renamed or removed) through Python's audit events, which
come before the system is asked. At the chosen one it kills itself, sends itself a signal, or lets the system refuse what is
larger than so many bytes: with the signal that is sent then (SIGXFSZ) at its default the process dies in the middle of the file,
with it ignored, as Python has it, the disk is full.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ACTS = ("kill", "tear", "full", "term")
_WRITES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


@dataclass(frozen=True)
class Interruption:
    """One interruption.

    Attributes:
        act: "kill" (SIGKILL), "term" (SIGTERM), "tear" (killed inside the next larger file) or "full" (the disk, from then on).
        at: number of the write before which it comes; None: by the clock, sent from outside.
        share: of an uninterrupted run's seconds, where it comes by the clock.
        size: bytes that a file may have from then on, for "tear" and "full".
    """

    act: str
    at: int | None = None
    share: float = 0.0
    size: int = 0


def watch(folder: Path, interruption: Interruption | None) -> list[str]:
    """Begin to count this process's writes to `folder`; the list grows by each: "event path"."""
    inside, seen = str(folder), list[str]()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            if not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
                return
        elif event not in _WRITES:
            return
        path = str(arguments[0])
        if path.startswith(inside):
            seen.append(f"{event} {path.removeprefix(inside)}")
            if interruption is not None and interruption.at == len(seen) - 1:
                act(interruption)

    sys.addaudithook(hook)
    return seen


def act(interruption: Interruption) -> None:
    """Interrupt this process."""
    if interruption.act in ("kill", "term"):
        os.kill(os.getpid(), signal.SIGKILL if interruption.act == "kill" else signal.SIGTERM)
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if interruption.act == "tear":
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (interruption.size, interruption.size))


def damage(path: Path, how: str, place: float) -> None:
    """Spoil a file: "flip" a bit, "cut" it, "empty" it, or "remove" it; `place` of 0 to 1 says where."""
    content = bytearray(path.read_bytes())
    path.unlink()
    if how == "remove":
        return
    at = int(place * len(content))
    if how == "flip" and content:
        content[at] ^= 1 << (at % 8)
    path.write_bytes({"flip": content, "cut": content[:at], "empty": b""}[how])
