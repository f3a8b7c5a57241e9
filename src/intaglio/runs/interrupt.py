"""A run that is asked to stop by a signal: it ends its update, saves a checkpoint and says how to go on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

__all__ = ["Interrupted", "Stop", "stoppable"]

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Interrupted(Exception):
    """A run that a signal has stopped.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


@final
class Stop:
    """A request to stop.

    Attributes:
        number: of the signal that came; None where none did.
        waits: whether somebody looks for it after every update, so that a signal need not end everything at once.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.waits = False

    def arrived(self, number: int, frame: Any) -> None:
        """Handle a signal; a second one ends the work at once."""
        at_once = self.number is not None or not self.waits
        self.number = number
        if at_once:
            raise KeyboardInterrupt


@contextmanager
def stoppable() -> Iterator[Stop]:
    """A block in which SIGINT, SIGTERM and SIGHUP are requests to stop; outside the main thread no signal can be taken."""
    stop, before = Stop(), {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, stop.arrived) for number in _SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
