"""Tokens of a request, from messages or a prompt, and the text they become again: all that needs the tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from .errors import ApiError
from .protocol import ChatRequest, CompletionRequest, Message
from .text import Detokenizer

__all__ = ["Prompter"]


class Prompter:
    """The tokenizer's side of requests to one model: it gives their tokens, and refuses what the model cannot take.

    Args:
        tokenizer: of transformers, with or without a chat template.
        vocabulary: number of tokens the model has embeddings for.
        templates: model → chat template, of those that do not use the tokenizer's.
        max_context: tokens of prompt and answer together.
        max_tokens: longest answer; None: what the context leaves.
    """

    def __init__(
        self,
        tokenizer: Any,
        vocabulary: int,
        max_context: int,
        max_tokens: int | None = None,
        templates: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._tokenizer, self._vocabulary, self._templates = tokenizer, vocabulary, templates
        self._max_context, self._max_tokens = max_context, max_tokens

    def tokens(self, request: ChatRequest | CompletionRequest) -> list[int]:
        """The prompt's tokens.

        Raises:
            ApiError: 400 where there is no chat template or it refuses, or the prompt is empty or foreign to the vocabulary.
        """
        if isinstance(request, ChatRequest):
            tokens, param = self._chat(request.messages, self._templates.get(request.model)), "messages"
        else:
            tokens, param = (
                self._tokenizer.encode(request.prompt) if isinstance(request.prompt, str) else request.prompt,
                "prompt",
            )
        if not tokens:
            raise ApiError(400, f"{param}: holds no token", param=param)
        if min(tokens) < 0 or max(tokens) >= self._vocabulary:
            raise ApiError(400, f"{param}: tokens must lie in [0, {self._vocabulary})", param=param)
        return tokens

    def room(self, prompt: Sequence[int], request: ChatRequest | CompletionRequest) -> int:
        """How many tokens the answer may have.

        Raises:
            ApiError: 400 where prompt and answer do not fit the context, or the answer is longer than this server gives.
        """
        param = "max_completion_tokens" if isinstance(request, ChatRequest) and request.max_completion_tokens else "max_tokens"
        left, asked = self._max_context - len(prompt), request.longest
        if left < (asked or 1):
            wanted = "" if asked is None else f" and {asked} of the answer"
            message = f"the context is {self._max_context} tokens; {len(prompt)} of the prompt{wanted} do not fit"
            raise ApiError(400, message, param=param if len(prompt) < self._max_context else None, code="context_length_exceeded")
        longest = left if self._max_tokens is None else min(left, self._max_tokens)
        if asked is not None and asked > longest:
            raise ApiError(400, f"{param}: at most {longest} here, {asked} asked for", param=param)
        return asked or min(longest, request.usual or longest)

    def detokenizer(self, prompt: Sequence[int], request: ChatRequest | CompletionRequest) -> Detokenizer:
        """A chat's answer is a text of its own; a completion goes on where the prompt ends."""
        return Detokenizer(self._tokenizer, [] if isinstance(request, ChatRequest) else prompt)

    def _chat(self, messages: Sequence[Message], template: str | None) -> list[int]:
        from jinja2 import TemplateError

        if not (template or self._tokenizer.chat_template):
            raise ApiError(400, "this model has no chat template; use /v1/completions", param="messages")
        turns = [message.turn for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(turns, chat_template=template, add_generation_prompt=True, tokenize=False)
        except (TemplateError, TypeError) as error:
            raise ApiError(400, f"messages: the model's chat template refuses them: {error}", param="messages") from error
        return self._tokenizer.encode(text, add_special_tokens=False)
