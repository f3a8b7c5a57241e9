"""Prometheus metrics of one server, in a registry of its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .text import Piece

__all__ = ["Counted", "Metrics"]

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """Counters that the routes write and gauges that are read when asked.

    Args:
        known: whether a model of this name is there. Any other counts under "", so that callers cannot make new series.
    """

    def __init__(self, known: Callable[[str], bool]) -> None:
        self._known, self.registry = known, CollectorRegistry()
        self._requests = self._counter("intaglio_requests", "Requests under /v1.", "model", "status")
        self._prompt = self._counter("intaglio_prompt_tokens", "Tokens of prompts.", "model")
        self._generated = self._counter("intaglio_generated_tokens", "Tokens of answers.", "model")
        self._first = self._seconds("intaglio_time_to_first_token_seconds", "Arrival to first token.")
        self._whole = self._seconds("intaglio_request_seconds", "Arrival to last token.")

    def progress(self, model: str, arrived: float, before: int, piece: Piece) -> None:
        """Count a piece of an answer.

        Args:
            model: the base or an adapter.
            arrived: `time.perf_counter()` when the request came.
            before: tokens generated before this piece.
            piece: the piece.
        """
        label, seconds = self._label(model), time.perf_counter() - arrived
        self._generated.labels(label).inc(piece.completion_tokens - before)
        if before == 0 < piece.completion_tokens:
            self._prompt.labels(label).inc(piece.prompt_tokens)
            self._first.labels(label).observe(seconds)
        if piece.finish is not None:
            self._whole.labels(label).observe(seconds)

    def answered(self, model: str, status: int) -> None:
        """Count a request that is over."""
        self._requests.labels(self._label(model), str(status)).inc()

    def watch(self, name: str, what: str, value: Callable[[], float], *, total: bool = False) -> None:
        """A gauge, or a counter (`total`) kept elsewhere, that calls `value` when it is read."""
        self.registry.register(_Watched(CounterMetricFamily if total else GaugeMetricFamily, name, what, value))

    def forget(self, model: str) -> None:
        """Drop the series of an adapter that is gone, so that names in and out do not add up."""
        for metric in (self._requests, self._prompt, self._generated, self._first, self._whole):
            metric.remove_by_labels({"model": model})

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)

    def _label(self, model: str) -> str:
        return model if self._known(model) else ""

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(name, what, labels, registry=self.registry)

    def _seconds(self, name: str, what: str) -> Histogram:
        return Histogram(name, what, ["model"], buckets=_SECONDS, registry=self.registry)


@dataclass(frozen=True)
class _Watched(Collector):
    family: type[CounterMetricFamily | GaugeMetricFamily]
    name: str
    what: str
    value: Callable[[], float]

    def collect(self) -> list[Metric]:
        return [self.family(self.name, self.what, value=self.value())]


class Counted:
    """ASGI middleware that counts each request under /v1 by model and status.

    The routes put the model into `request.state.model`; a stream that fails after its headers puts its status there too.
    A caller who left before the answer began counts as 499.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["arrived"], sent = time.perf_counter(), 499

        async def watched(message: Message) -> None:
            nonlocal sent
            if message["type"] == "http.response.start":
                sent = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            self._metrics.answered(state.get("model", ""), state.get("status", sent))
