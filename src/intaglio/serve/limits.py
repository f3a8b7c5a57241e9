"""Limits that keep one caller from harming the rest: keys, the size of a body, places in the queue, one folder."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, response, shutting_down

__all__ = ["Admission", "Gate", "Keys", "Limits", "confined"]

_BODY_SECONDS = 30  # between two parts of a body
_DISCARDED = 16 << 20  # most bytes of a refused body that are read


@dataclass(frozen=True)
class Limits:
    """Bounds on one request and on all together.

    Attributes:
        max_tokens: longest answer; default None, what is left of the context.
        max_running: requests at work at once.
        max_queue: requests that may wait beyond those; one more is refused with 429.
        max_body: bytes of a request.
        unload_wait: seconds that an unload waits for requests that still use the adapter.
    """

    max_tokens: int | None = None
    max_running: int = 64
    max_queue: int = 64
    max_body: int = 1 << 20
    unload_wait: float = 5.0


class Keys:
    """Bearer keys, compared in constant time.

    Args:
        keys: those that open the server; none: it is open to everyone.

    Raises:
        ValueError: for an empty key, or one that no header can hold.
    """

    def __init__(self, keys: Collection[str] = ()) -> None:
        if not all(key.strip() for key in keys):
            raise ValueError("--api-key: an empty key; leave the option out to serve without keys")
        if not all(key == key.strip() and key.isascii() and key.isprintable() for key in keys):
            raise ValueError("--api-key: a key with blanks around it or letters outside ASCII, which no caller could send")
        self._digests = [_digest(key) for key in keys]

    @property
    def needed(self) -> bool:
        """Whether a caller must give one."""
        return bool(self._digests)

    def open(self, authorization: str) -> bool:
        """Whether a request with this Authorization header may pass. Every key is compared, whichever fits."""
        scheme, _, token = authorization.partition(" ")
        given = _digest(token.strip())
        fits = [hmac.compare_digest(given, digest) for digest in self._digests]
        return not self.needed or (scheme.lower() == "bearer" and any(fits))


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


class Admission:
    """Places for requests, running or waiting; there are no more than that.

    Args:
        places: how many.
    """

    def __init__(self, places: int) -> None:
        self._places, self.taken, self.closed = places, 0, False

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold a place for the length of the block.

        Raises:
            ApiError: 429 where all are taken, 503 after `close`.
        """
        if self.closed:
            raise shutting_down()
        if self.taken >= self._places:
            raise ApiError(429, "too many requests at once; try again", code="queue_full", retry_after=1)
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1


class Gate:
    """ASGI middleware in front of everything under /v1: shutting down (503), the key (401), the size of the body (413).

    It looks at headers before a body is kept or parsed.
    """

    def __init__(self, app: ASGIApp, keys: Keys, admission: Admission, max_body: int) -> None:
        self._app, self._keys, self._admission, self._max_body = app, keys, admission, max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        error = self._refusal(Headers(scope=scope))
        if error is not None:
            await _discard(receive)
            await response(error)(scope, receive, send)
        else:
            await self._app(scope, self._counted(receive), send)

    def _refusal(self, headers: Headers) -> ApiError | None:
        if self._admission.closed:
            return shutting_down()
        if not self._keys.open(headers.get("authorization", "")):
            return ApiError(401, "give a valid key: Authorization: Bearer KEY", code="invalid_api_key")
        declared = headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > self._max_body:
            return ApiError(413, self._too_large, code="body_too_large")
        return None

    @property
    def _too_large(self) -> str:
        return f"the body is larger than this server takes, {self._max_body} bytes"

    def _counted(self, receive: Receive) -> Receive:
        """Count a body while it comes in (chunked, it declares no length), and wait for each part only so long.

        Starlette's own limit answers in plain text.
        """
        size, whole = 0, False

        async def counted() -> Message:
            nonlocal size, whole
            message = await (receive() if whole else _part(receive))
            size += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if size > self._max_body:
                if not whole:
                    await _discard(receive)
                raise HTTPException(413, self._too_large)
            return message

        return counted


async def _part(receive: Receive) -> Message:
    try:
        return await asyncio.wait_for(receive(), _BODY_SECONDS)
    except asyncio.TimeoutError:
        raise HTTPException(408, f"no more of the body for {_BODY_SECONDS} seconds") from None


async def _discard(receive: Receive) -> None:
    """Read what is left of a refused body, up to a point: a connection closed in the middle of it may lose the answer."""
    left, more = _DISCARDED, True
    with suppress(HTTPException):  # no more comes
        while more and left > 0:
            message = await _part(receive)
            left, more = left - len(message.get("body", b"")), message.get("more_body", False)


def confined(root: Path, path: str) -> Path:
    """The adapter folder that a caller means, symlinks resolved, which must lie in `root` with all its files.

    The answer to a path outside is the same whether something is there or not.

    Args:
        root: the server's adapter folder.
        path: relative to `root`, or absolute.

    Raises:
        ApiError: 400 for a path that leaves it or is no folder.
    """
    outside = ApiError(400, "lora_path: must be an adapter folder inside the server's adapter root", param="lora_path")
    try:
        home, folder = root.resolve(strict=True), (root / path).resolve(strict=True)
        files = [file.resolve(strict=True) for file in folder.iterdir()] if folder.is_relative_to(home) else [home.parent]
    except (OSError, ValueError, RuntimeError) as error:  # missing, no folder, too long, a NUL byte, a circle of links
        raise outside from error
    if not all(file.is_relative_to(home) for file in files):
        raise outside
    return folder
