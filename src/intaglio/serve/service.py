"""The service behind the routes: the engine and its adapters, keys, limits, metrics, and the way to an orderly end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from anyio import CapacityLimiter, to_thread

from ..adapter.folder import own_template
from ..runtime.engine import Engine
from .answering import Answerer
from .chat import Prompter
from .errors import ApiError
from .limits import Admission, Keys, Limits, confined
from .metrics import Metrics

__all__ = ["Service"]


class Service:
    """One base, its adapters, and everything a request needs.

    Args:
        engine: started; its store holds the adapters.
        tokenizer: the base's.
        name: what callers give as `model` for the base.
        vocabulary: number of tokens the base has embeddings for.
        limits: bounds on requests.
        keys: bearer keys; none: everyone may call.
        adapter_root: the folder that callers may load adapters from; None: they may load and unload nothing.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        name: str,
        *,
        vocabulary: int,
        limits: Limits,
        keys: Collection[str] = (),
        adapter_root: Path | None = None,
    ) -> None:
        self.engine, self.store, self.name, self.limits = engine, engine.store, name, limits
        self.keys, self.started, self._root = Keys(keys), int(time.time()), adapter_root
        self.admission = Admission(limits.max_running + limits.max_queue)
        self.metrics = Metrics(known=self.serves)
        self.templates: dict[str, str] = {}
        prompter = Prompter(tokenizer, vocabulary, engine.max_context, limits.max_tokens, self.templates)
        self.answerer = Answerer(engine, prompter, self.admission, self.metrics)
        self._loading = CapacityLimiter(4)  # threads that read adapters, or wait for one to come free
        self._watch()

    @property
    def healthy(self) -> bool:
        """Whether it takes requests: the engine's thread lives, and no shutdown is under way."""
        return self.engine.alive and not self.admission.closed

    def serves(self, model: str) -> bool:
        """Whether `model` is the base or a loaded adapter."""
        return model == self.name or model in self.store

    def adapter(self, model: str) -> str | None:
        """The adapter that `model` means; None for the base.

        Raises:
            ApiError: 404 for neither.
        """
        if not self.serves(model):
            raise ApiError(404, f"the model {model[:100]!r} does not exist", param="model", code="model_not_found")
        return None if model == self.name else model

    def add(self, name: str, folder: Path, template: str | None) -> None:
        """Load an adapter that is asked by a chat template of its own, or by the base's.

        Raises:
            AdapterError: for one that is damaged, of another base, too large, or there already.
        """
        self.store.load(name, folder)
        if template is not None:
            self.templates[name] = template

    async def load(self, name: str, path: str) -> None:
        """Load an adapter that a caller names.

        Raises:
            ApiError: 403, or 400 for a path out of bounds or the base's own name.
            AdapterError: for one that is damaged, of another base, too large, or there already.
        """
        folder = confined(self._loading_root(), path)
        if name == self.name:
            raise ApiError(400, f"lora_name: {name!r} is the base model's name", param="lora_name")
        try:
            await to_thread.run_sync(self.add, name, folder, own_template(folder), limiter=self._loading)
        except ValueError as error:  # in terms of the caller's path, not of this machine's
            raise type(error)(str(error).replace(str(folder), path)) from error

    async def unload(self, name: str) -> None:
        """Unload an adapter; requests that use it may finish first, for a while.

        Raises:
            ApiError: 403.
            AdapterError: for one that is not there, or still in use.
        """
        self._loading_root()
        wait = self.limits.unload_wait
        await to_thread.run_sync(lambda: self.store.unload(name, wait=wait), limiter=self._loading)
        self.templates.pop(name, None)
        self.metrics.forget(name)

    def _loading_root(self) -> Path:
        if self._root is None:
            raise ApiError(403, "loading and unloading are off; start the server with --adapter-root DIR", code="loading_off")
        return self._root

    async def drain(self, timeout: float) -> None:
        """Refuse new requests, let those at work finish for up to `timeout` seconds, then end what is left."""
        self.admission.closed = True
        deadline = time.monotonic() + timeout
        while self.admission.taken and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        self.answerer.end_all()

    def _watch(self) -> None:
        watch, store, engine = self.metrics.watch, self.store, self.engine
        watch("intaglio_requests_running", "Requests in the batch.", lambda: engine.running)
        watch("intaglio_requests_waiting", "Requests that wait for a place in the batch.", lambda: engine.waiting)
        watch("intaglio_requests_open", "Requests taken and not yet answered.", lambda: self.admission.taken)
        watch("intaglio_healthy", "1 while /health says so.", lambda: float(self.healthy))
        watch("intaglio_adapters", "Adapters that may be asked for.", lambda: len(store.infos()))
        watch("intaglio_adapter_bytes", "Bytes of adapters in memory.", lambda: store.resident_bytes)
        watch("intaglio_adapter_loads", "Adapters read from disk.", lambda: store.loads, total=True)
        watch("intaglio_adapter_evictions", "Adapters dropped from memory.", lambda: store.evictions, total=True)
