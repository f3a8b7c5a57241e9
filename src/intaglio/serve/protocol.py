"""Bodies that callers send: OpenAI's for chat and completions, vLLM's for loading and unloading adapters.

A field that would change the answer and is not offered is refused, never ignored; `null` means not given.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator
from pydantic_core import PydanticCustomError

from .errors import NOT_OFFERED

__all__ = ["ChatRequest", "CompletionRequest", "LoadRequest", "Message", "TextRequest", "UnloadRequest"]

# fields of OpenAI's that are taken only where they ask for nothing
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
}
_FOR_THE_RECORD = ("user", "metadata", "safety_identifier", "prompt_cache_key", "service_tier")  # change no answer
_MOST_STOPS = 16
_SEED = 2**63


def _whole_characters(text: str) -> str:
    """JSON can write half a surrogate pair, which is no text to a tokenizer."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"holds half a surrogate pair at {error.start}") from None
    return text


Text = Annotated[str, AfterValidator(_whole_characters)]
Name = Annotated[Text, StringConstraints(min_length=1, max_length=512)]
Stop = Annotated[Text, StringConstraints(min_length=1, max_length=256)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_what_is_not_given(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data


class _Part(_Body):
    """A piece of a message's content; only text is understood."""

    type: Literal["text"]
    text: Text


class Message(_Body):
    """One turn of a conversation.

    Attributes:
        role: who speaks; `developer` is OpenAI's newer name for `system`.
        content: a text, or parts of type `text`.
        name: of the speaker; not used.
    """

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[_Part]
    name: str | None = None

    @property
    def turn(self) -> dict[str, str]:
        """As chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class _StreamOptions(_Body):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class TextRequest(_Body):
    """The fields that chat and completions have in common.

    Attributes:
        model: the base's name or an adapter's.
        max_tokens: longest answer in tokens.
        temperature: 0 (greedy) or 0.01 to 2; default 1.
        top_p: share of probability to draw from, 0 < top_p ≤ 1; default 1.
        top_k: number of tokens to draw from; default (also 0 and −1) all. Not OpenAI's but vLLM's.
        seed: makes drawing repeatable; default none.
        stop: texts that end the answer; up to 16, and not part of it.
        stream: send the answer as it grows (SSE); default no.
        stream_options: `include_usage` adds a last chunk with the counts.
    """

    model: Name
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    seed: int | None = Field(None, ge=-_SEED, lt=_SEED)
    stop: list[Stop] = Field([], max_length=_MOST_STOPS)
    stream: bool = False
    stream_options: _StreamOptions = _StreamOptions()

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_offered(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name, neutral in _NEUTRAL.items():
            given = data.get(name)
            if given is not None and not any(given == n and isinstance(given, bool) == isinstance(n, bool) for n in neutral):
                wanted = {"field": name, "neutral": repr(neutral[0])}
                raise PydanticCustomError(NOT_OFFERED, "{field}: not offered; leave it out or give {neutral}", wanted)
        return {k: v for k, v in data.items() if k not in _NEUTRAL and k not in _FOR_THE_RECORD and not (k == "store" and not v)}

    @field_validator("temperature")
    @classmethod
    def _not_almost_zero(cls, value: float) -> float:
        if 0 < value < 0.01:
            raise ValueError("give 0 (greedy) or at least 0.01; less overflows")
        return value

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class ChatRequest(TextRequest):
    """Body of `/v1/chat/completions`.

    Attributes:
        messages: the conversation so far.
        max_completion_tokens: OpenAI's newer name for `max_tokens`; it goes before.
    """

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @property
    def longest(self) -> int | None:
        """The longest answer that is asked for; None: as long as the server allows."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def usual(self) -> int | None:
        """The longest answer where none is asked for; None: as long as the server allows."""
        return None


class CompletionRequest(TextRequest):
    """Body of `/v1/completions`.

    Attributes:
        prompt: a text or its tokens; one prompt per request (a list with one text or one list of tokens is taken too).
    """

    prompt: Text | list[int]

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_prompt(cls, value: Any) -> Any:
        if isinstance(value, list) and value and isinstance(value[0], str | list):
            if len(value) > 1:
                raise ValueError(f"{len(value)} prompts; send one per request, they run in one batch all the same")
            return value[0]
        return value

    @property
    def longest(self) -> int | None:
        """The longest answer that is asked for."""
        return self.max_tokens

    @property
    def usual(self) -> int | None:
        """The longest answer where none is asked for: 16 tokens, as at OpenAI."""
        return 16


class LoadRequest(_Body):
    """Body of `/v1/load_lora_adapter`, as vLLM's.

    Attributes:
        lora_name: what callers will give as `model`.
        lora_path: an adapter folder inside the server's adapter root; relative to it, or absolute.
        load_inplace: only false; unload a name before it is used again.
    """

    lora_name: Name
    lora_path: Annotated[Text, StringConstraints(min_length=1, max_length=4096)]
    load_inplace: Literal[False] = False


class UnloadRequest(_Body):
    """Body of `/v1/unload_lora_adapter`, as vLLM's.

    Attributes:
        lora_name: the adapter's name.
        lora_int_id: vLLM's number for it; not used.
    """

    lora_name: Name
    lora_int_id: int | None = None
