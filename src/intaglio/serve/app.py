"""The HTTP application: OpenAI's routes, vLLM's for adapters, health, metrics and the page."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import Receive, Scope, Send

from ..runtime.store import AdapterError, AdapterInUse, UnknownAdapter
from . import errors, replies
from .errors import ApiError
from .limits import Gate
from .metrics import Counted
from .page import HEADERS, PAGE
from .protocol import ChatRequest, CompletionRequest, LoadRequest, UnloadRequest
from .service import Service
from .text import Piece

__all__ = ["create_app"]

T = TypeVar("T")


def create_app(service: Service, hosts: Sequence[str] = ()) -> FastAPI:
    """The application that serves `service`, to callers that address it by one of `hosts`, or by any. It has no state."""
    app = FastAPI(title="Intaglio", openapi_url=None, docs_url=None, redoc_url=None)
    errors.install(app)
    app.add_exception_handler(AdapterError, _adapter_refused)
    app.add_exception_handler(_Gone, _nobody)
    app.add_middleware(Gate, service.keys, service.admission, service.limits.max_body)
    app.add_middleware(Counted, service.metrics)
    if hosts:  # else a page elsewhere could call us by a name of its own that leads here (DNS rebinding)
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)
    app.include_router(_texts(service))
    app.include_router(_models(service))
    app.include_router(_operation(service))
    return app


def _texts(service: Service) -> APIRouter:
    router = APIRouter()

    async def answer(http: Request, body: ChatRequest | CompletionRequest) -> Response:
        http.state.model = body.model
        reply = replies.Reply(body)
        pieces = service.answerer.pieces(body, service.adapter(body.model), http.state.arrived)
        if not body.stream:
            return JSONResponse(reply.whole(await _unless_gone(http, _all(pieces))))
        # The first piece decides the status: what is refused has one, not an error inside a stream.
        first = await _unless_gone(http, anext(pieces))
        return _EventStream(reply, first, pieces, lambda status: setattr(http.state, "status", status))

    @router.post("/v1/chat/completions")
    async def chat(http: Request, body: ChatRequest) -> Response:
        return await answer(http, body)

    @router.post("/v1/completions")
    async def complete(http: Request, body: CompletionRequest) -> Response:
        return await answer(http, body)

    return router


def _models(service: Service) -> APIRouter:
    router = APIRouter()

    def listed() -> dict[str, Any]:
        return replies.models(service.name, service.started, service.engine.max_context, service.store.infos())

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        return listed()

    @router.get("/v1/models/{model:path}")
    async def one(model: str) -> dict[str, Any]:
        service.adapter(model)
        return next(entry for entry in listed()["data"] if entry["id"] == model)

    @router.post("/v1/load_lora_adapter")
    async def load(body: LoadRequest) -> Response:
        await service.load(body.lora_name, body.lora_path)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @router.post("/v1/unload_lora_adapter")
    async def unload(body: UnloadRequest) -> Response:
        await service.unload(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    return router


def _operation(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    async def health() -> Response:
        if service.healthy:
            return Response()
        raise ApiError(503, "shutting down" if service.admission.closed else "the engine has failed", code="unhealthy")

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @router.get("/")
    async def page() -> Response:
        return HTMLResponse(PAGE, headers=HEADERS)

    return router


class _EventStream(StreamingResponse):
    """A stream that cancels its request when the caller leaves, even before the first byte is out."""

    def __init__(
        self, reply: replies.Reply, first: Piece, rest: AsyncGenerator[Piece, None], failed: Callable[[int], None]
    ) -> None:
        events = reply.stream(_chain(first, rest), failed)
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._rest):
            await super().__call__(scope, receive, send)


class _Gone(Exception):
    """The caller left before the answer."""


async def _unless_gone(http: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the caller leaves."""
    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(_gone(http))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise _Gone
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _gone(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _all(pieces: AsyncGenerator[Piece, None]) -> list[Piece]:
    async with aclosing(pieces):
        return [piece async for piece in pieces]


async def _chain(first: Piece, rest: AsyncGenerator[Piece, None]) -> AsyncGenerator[Piece, None]:
    yield first
    async for piece in rest:
        yield piece


async def _adapter_refused(http: Request, error: Exception) -> JSONResponse:
    status = 404 if isinstance(error, UnknownAdapter) else 409 if isinstance(error, AdapterInUse) else 400
    return errors.response(ApiError(status, str(error), code="model_not_found" if status == 404 else "adapter_refused"))


async def _nobody(http: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nginx's number for a caller who closed the connection
