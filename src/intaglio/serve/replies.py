"""Objects that callers get, OpenAI's: for whole answers, chunks of a stream, and models."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..runtime.store import AdapterInfo
from .errors import ApiError
from .protocol import ChatRequest, CompletionRequest
from .text import Piece

__all__ = ["Reply", "models"]

_DONE = "data: [DONE]\n\n"


@dataclass(frozen=True)
class Reply:
    """The answer to one request, in OpenAI's shape.

    Attributes:
        request: what was asked.
        id: unguessable.
        created: Unix seconds.
    """

    request: ChatRequest | CompletionRequest
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """The object of an answer that is not streamed."""
        text, last = "".join(piece.text for piece in pieces), pieces[-1]
        said = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": last.finish}
        return {**self._head("chat.completion"), "choices": [choice], "usage": _usage(last)}

    async def stream(self, pieces: AsyncIterator[Piece], failed: Callable[[int], None]) -> AsyncIterator[str]:
        """Server-sent events, one per piece that says something.

        An error becomes the last event, and `failed` is told its status: the status line is long gone.
        """
        wanted, last = self.request.stream_options.include_usage, None
        if self._chat:
            yield self._chunk({"role": "assistant", "content": ""}, None, wanted)
        try:
            async for piece in pieces:
                last = piece
                if piece.text or piece.finish:
                    said = {"content": piece.text} if piece.text else {}
                    yield self._chunk(said, piece.finish, wanted)
        except ApiError as error:
            failed(error.status)
            yield _event(error.body)
            return
        if wanted and last is not None:
            yield _event({**self._head("chat.completion.chunk"), "choices": [], "usage": _usage(last)})
        yield _DONE

    @property
    def _chat(self) -> bool:
        return isinstance(self.request, ChatRequest)

    def _head(self, kind: str) -> dict[str, Any]:
        kind, prefix = (kind, "chatcmpl") if self._chat else ("text_completion", "cmpl")
        return {"id": f"{prefix}-{self.id}", "object": kind, "created": self.created, "model": self.request.model}

    def _chunk(self, said: dict[str, str], finish: str | None, with_usage: bool) -> str:
        content = {"delta": said} if self._chat else {"text": said.get("content", "")}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": finish}
        usage = {"usage": None} if with_usage else {}
        return _event({**self._head("chat.completion.chunk"), "choices": [choice], **usage})


def models(base: str, started: int, max_context: int, adapters: Sequence[AdapterInfo]) -> dict[str, Any]:
    """The list of `/v1/models`: the base first, then its adapters, each with the base as `parent`."""
    head = {"object": "model", "owned_by": "intaglio", "max_model_len": max_context}
    own = {"id": base, "created": started, "root": base, "parent": None, **head}
    return {
        "object": "list",
        "data": [own, *({"id": a.name, "created": int(a.created), "root": a.name, "parent": base, **head} for a in adapters)],
    }


def _usage(last: Piece) -> dict[str, int]:
    prompt, completion = last.prompt_tokens, last.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
