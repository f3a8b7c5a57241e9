"""Connections that must send a request in time, and of which there are only so many."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

try:
    import resource
except ImportError:  # Windows counts no files
    resource = None

__all__ = ["impatient"]

_OTHER_FILES = 64  # that the process has open beside its connections


def impatient(most: int, seconds: float) -> type[H11Protocol]:
    """Uvicorn's protocol, which closes connections beyond a number, and those whose request's head does not come in time.

    Uvicorn itself waits for ever for the first request, and its limit on connections counts none that has sent nothing.

    Args:
        most: connections at once; fewer where the process may not have as many files open.
        seconds: from the connection, or from the end of the last answer, to the end of the next request's head.
    """
    if resource is not None:
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        most = most if files == resource.RLIM_INFINITY else max(1, min(most, files - _OTHER_FILES))

    class Impatient(H11Protocol):
        _patience: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > most:
                transport.abort()
            else:
                self._wait()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._patience is not None and self.cycle is not None and not self.cycle.response_complete:
                self._patience.cancel()
                self._patience = None

        def on_response_complete(self) -> None:
            self._wait()
            super().on_response_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            if self._patience is not None:
                self._patience.cancel()
            super().connection_lost(exc)

        def _wait(self) -> None:
            if self._patience is not None:
                self._patience.cancel()
            self._patience = self.loop.call_later(seconds, self._give_up)

        def _give_up(self) -> None:
            if self.cycle is None or self.cycle.response_complete:
                self.transport.abort()

    return Impatient
