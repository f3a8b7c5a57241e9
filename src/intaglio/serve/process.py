"""The server's process: an address, the base and its adapters, requests until a signal, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING

import uvicorn

from .connections import impatient

if TYPE_CHECKING:
    from .run import Options
    from .service import Service

__all__ = ["run"]

_LAST_BYTES = 5  # seconds for answers that are complete to reach their callers
_LISTED = 8  # adapters that the first line names


def run(options: Options, start: Callable[[], Service]) -> None:
    """Serve until SIGTERM or SIGINT, then finish what runs and return.

    Args:
        options: checked ones.
        start: reads the base and its adapters, once the address is taken.
    """
    from ..hf.models import check_available

    check_available(options.base)
    with _bound(options.host, options.port) as listening:
        service = start()
        try:
            asyncio.run(_listen(service, listening, options))
        finally:
            service.engine.stop(timeout=_LAST_BYTES)


@contextlib.contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket at the address, not listening yet: whoever connects while the model is read is refused, not left waiting."""
    wrong = "--host {host} --port {port}: cannot listen there ({error})"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise ValueError(wrong.format(host=host, port=port, error=error)) from error
    with socket.socket(family, kind, protocol) as found:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind(address)
        except OSError as error:
            raise ValueError(wrong.format(host=host, port=port, error=error)) from error
        yield found


async def _listen(service: Service, listening: socket.socket, options: Options) -> None:
    from .app import create_app

    host, port = listening.getsockname()[:2]
    names = [info.name for info in service.store.infos()]
    listed = ", ".join(names) if len(names) <= _LISTED else f"{len(names)} adapters"
    where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    print(f"{service.name} with {listed or 'no adapters'} at {where} (process {os.getpid()})", flush=True)
    if not service.keys.needed and not ipaddress.ip_address(host).is_loopback:
        print("warning: everyone who reaches this address can use it; give --api-key or INTAGLIO_API_KEY", flush=True)
    config = uvicorn.Config(
        create_app(service, options.hosts),
        http=impatient(options.max_connections, options.header_timeout),
        log_level="info",
        timeout_graceful_shutdown=_LAST_BYTES,
        server_header=False,
    )
    await _Draining(config, lambda: service.drain(options.shutdown_timeout)).serve([listening])


class _Draining(uvicorn.Server):
    """Uvicorn's server, which drains before it stops listening, and then returns instead of raising the signal again."""

    def __init__(self, config: uvicorn.Config, drain: Callable[[], Awaitable[None]]) -> None:
        super().__init__(config)
        self._drain = drain
        self._ending: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()

        def asked(*_: object) -> None:
            loop.call_soon_threadsafe(self._asked)

        before = {number: signal.signal(number, asked) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _asked(self) -> None:
        if self._ending is None:
            self._ending = asyncio.ensure_future(self._end())
        else:  # asked twice: now
            self.should_exit = self.force_exit = True

    async def _end(self) -> None:
        await self._drain()
        self.should_exit = True
