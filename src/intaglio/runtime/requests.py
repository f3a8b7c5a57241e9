"""The requests an engine has: where their tokens go, how they are chosen, and that each ends once, whatever happens."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, final

from torch import Tensor

from .changes import Adapter
from .mixing import Mixer
from .sampling import Sampler, Sampling
from .store import AdapterStore

if TYPE_CHECKING:
    from transformers.generation.continuous_batching.requests import GenerationOutput

__all__ = ["Event", "Requests"]


@final
@dataclass(frozen=True)
class Event:
    """News of a request, in order.

    Attributes:
        tokens: new tokens since the last event; may be empty at the end.
        finish: why the request is over; the last event has it, and no other.
        error: what went wrong, with finish "error".
    """

    tokens: list[int]
    finish: Literal["stop", "length", "cancelled", "error"] | None = None
    error: str | None = None


@dataclass(eq=False)
class _Request:
    id: str
    name: str | None
    sampler: Sampler
    tell: Callable[[Event], None]
    adapter: Adapter | None = None
    told: int = 0
    error: str | None = None


@final
class Requests:
    """The requests of an engine, from `add` to their last event.

    `add` and `cancel` are for any thread; the rest is the loop's (`batching.Desk`).

    Args:
        store: the adapters.
        mixer: of the model.
        eos: tokens that end an answer.
        drop: takes a request out of the loop, by id; its end is not told to the loop.
    """

    def __init__(self, store: AdapterStore, mixer: Mixer, eos: Collection[int], drop: Callable[[str], None]) -> None:
        self._store, self._mixer, self._eos, self._drop = store, mixer, eos, drop
        self._lock, self._numbers = threading.RLock(), itertools.count()
        self._live: dict[str, _Request] = {}
        self._leaving: set[str] = set()
        self._open = True

    def __len__(self) -> int:
        return len(self._live)

    def add(
        self, sampling: Sampling, tell: Callable[[Event], None], adapter: str | None, queue: Callable[[str], None]
    ) -> str | None:
        """Take a request and call `queue` with its id; None where no more are taken.

        Raises:
            UnknownAdapter: where no such adapter is loaded.
        """
        request = _Request(str(next(self._numbers)), adapter, Sampler(sampling), tell)
        if adapter is not None:
            self._store.acquire(adapter)
        with self._lock:
            if self._open:
                self._live[request.id] = request
                queue(request.id)
                return request.id
        if adapter is not None:
            self._store.release(adapter)
        return None

    def cancel(self, id_: str) -> None:
        """End a request at the next step; one that is over already is left alone."""
        with self._lock:
            if id_ in self._live:
                self._leaving.add(id_)
                self._drop(id_)

    def close(self) -> None:
        """Take no more requests."""
        with self._lock:
            self._open = False

    def before_step(self) -> None:
        with self._lock:
            leaving, self._leaving = [self._live.get(id_) for id_ in self._leaving], set()
        for request in leaving:
            if request is not None:
                self._end(request, Event([], "cancelled" if request.error is None else "error", request.error))

    def run(self, batch: Sequence[tuple[str, int]], step: Callable[[], None]) -> None:
        with self._mixer.using([self._adapter(id_) for id_, _ in batch], [rows for _, rows in batch]):
            step()

    def choose(self, id_: str, logits_V: Tensor) -> int:
        request = self._live.get(id_)
        if request is None or request.error is not None:
            return 0
        try:
            return request.sampler(logits_V)
        except (FloatingPointError, RuntimeError) as error:
            self._fail(request, str(error))
            return 0

    def deliver(self, output: GenerationOutput) -> None:
        request = self._live.get(output.request_id)
        if request is None:
            return
        error = request.error or output.error
        if error is not None:
            self._end(request, Event([], "error", error))
            return
        new = output.generated_tokens[request.told :]
        request.told += len(new)
        if output.is_finished():
            self._end(request, Event(new, "stop" if new and new[-1] in self._eos else "length"))
        else:
            self._tell(request, Event(new))

    def ended(self) -> None:
        self.close()
        self.before_step()
        for request in list(self._live.values()):
            self._end(request, Event([], "error", request.error or "the engine has stopped"))

    def _adapter(self, id_: str) -> Adapter | None:
        """The adapter of a request, fetched when it first runs, so that waiting requests take no memory."""
        request = self._live.get(id_)
        if request is None or request.name is None or request.error is not None:
            return None
        if request.adapter is None:
            try:
                request.adapter = self._store.fetch(request.name)
            except Exception as error:  # whatever its files hold by now, the others go on
                self._fail(request, str(error) or type(error).__name__)
        return request.adapter

    def _fail(self, request: _Request, error: str) -> None:
        """End one request with an error; the others go on."""
        request.error = error
        self.cancel(request.id)

    def _tell(self, request: _Request, event: Event) -> None:
        try:
            request.tell(event)
        except Exception:  # whoever asked is gone, which the other requests may not suffer from
            self.cancel(request.id)

    def _end(self, request: _Request, event: Event) -> None:
        with self._lock:
            if self._live.pop(request.id, None) is None:
                return
            if not self._live:
                self._mixer.forget()
        if request.name is not None:
            self._store.release(request.name)
        self._tell(request, event)
