"""One request from text to text: a place in the queue, tokens, the engine's events, text, and its end whatever happens."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import suppress

from anyio import CapacityLimiter, to_thread

from ..runtime.engine import Engine, Event, Sampling
from .chat import Prompter
from .errors import ApiError, shutting_down
from .limits import Admission
from .metrics import Metrics
from .protocol import ChatRequest, CompletionRequest
from .text import Piece, StopStrings

__all__ = ["Answerer"]

_LOG = logging.getLogger(__name__)


class _Order:
    """A request at the engine, and its events on their way from the engine's thread to this loop."""

    def __init__(self, engine: Engine, prompt: list[int], sampling: Sampling, adapter: str | None) -> None:
        self._engine, self._loop = engine, asyncio.get_running_loop()
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        try:
            self._request = engine.submit(prompt, sampling, self._deliver, adapter)
        except RuntimeError as error:
            raise ApiError(503, "the engine has failed; restart the server", code="engine_dead") from error

    def end(self) -> None:
        """Cancel what is not over yet."""
        self._engine.cancel(self._request)

    def _deliver(self, event: Event) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)


class Answerer:
    """The way from requests to their answers, over one engine.

    Args:
        engine: started.
        prompter: for its model.
        admission: places for requests.
        metrics: what is counted.
    """

    def __init__(self, engine: Engine, prompter: Prompter, admission: Admission, metrics: Metrics) -> None:
        self.engine, self._prompter, self._admission, self._metrics = engine, prompter, admission, metrics
        self._open: set[_Order] = set()
        self._tokenizing = CapacityLimiter(1)  # a tokenizer is not thread-safe

    def end_all(self) -> None:
        """End everything that still runs; its callers get a 503."""
        for order in list(self._open):
            order.end()

    async def pieces(
        self, request: ChatRequest | CompletionRequest, adapter: str | None, arrived: float
    ) -> AsyncGenerator[Piece, None]:
        """The answer in pieces, the last one with `finish`. Closing the iterator early cancels the request.

        Args:
            request: a checked body.
            adapter: a loaded adapter, or None for the base.
            arrived: `time.perf_counter()` when the request came.

        Raises:
            ApiError: 400 for what the model cannot take, 429, 503, and 500 where the engine failed.
            AdapterError: where the adapter is gone or damaged by now.
        """
        with self._admission.place():
            prompt = await self._tokens(request)
            sampling = Sampling(
                max_tokens=self._prompter.room(prompt, request),
                temperature=request.temperature,
                top_p=request.top_p,
                top_k=request.top_k if request.top_k and request.top_k > 0 else None,
                seed=request.seed,
            )
            order, before = _Order(self.engine, prompt, sampling, adapter), 0
            self._open.add(order)
            try:
                async for piece in self._follow(order, request, prompt):
                    self._metrics.progress(request.model, arrived, before, piece)
                    before = piece.completion_tokens
                    yield piece
            finally:
                self._open.discard(order)
                order.end()

    async def _tokens(self, request: ChatRequest | CompletionRequest) -> list[int]:
        """The prompt's tokens. A caller who leaves keeps the place until the thread is done, so that there is one at a time."""
        work = asyncio.ensure_future(to_thread.run_sync(self._prompter.tokens, request, limiter=self._tokenizing))
        try:
            return await asyncio.shield(work)
        finally:
            if not work.done():
                await asyncio.wait([work])
                with suppress(Exception):
                    work.result()

    async def _follow(
        self, order: _Order, request: ChatRequest | CompletionRequest, prompt: list[int]
    ) -> AsyncGenerator[Piece, None]:
        text, stops, count = self._prompter.detokenizer(prompt, request), StopStrings(request.stop), 0
        while True:
            event = await order.events.get()
            if event.finish in ("cancelled", "error"):
                raise _failure(event)
            count += len(event.tokens)
            said = event.tokens[:-1] if event.finish == "stop" else event.tokens  # without the one that ends the answer
            fresh = stops.push(text.push(said))
            if event.finish is not None and not stops.hit:
                fresh += stops.push(text.flush())
                fresh += "" if stops.hit else stops.flush()
            finish = "stop" if stops.hit else event.finish
            yield Piece(fresh, len(prompt), count, finish)
            if finish is not None:
                return


def _failure(event: Event) -> ApiError:
    if event.finish == "cancelled":
        return shutting_down()
    _LOG.error("a request failed: %s", event.error)  # which may name folders of this machine
    return ApiError(500, "the engine failed on this request; the server's log says why", code="engine_error")
