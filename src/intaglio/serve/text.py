"""Text of an answer that grows: tokens decoded piece by piece, and the strings that end it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["Detokenizer", "Piece", "StopStrings"]

_UNKNOWN = "\ufffd"  # how a decoder shows bytes that are no character, or not yet
_HELD = 3  # a character of four bytes shows as at most three of those before its last byte comes
_LONGEST = 64  # tokens; a window longer than that is bytes that never make a character


@dataclass(frozen=True)
class Piece:
    """A part of an answer.

    Attributes:
        text: new text, maybe empty.
        prompt_tokens: of the whole prompt.
        completion_tokens: generated so far.
        finish: on the last piece, why it ended: "stop" or "length".
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    finish: Literal["stop", "length"] | None = None


class Detokenizer:
    """A decoder that gives text piece by piece; all pieces together are what decoding all tokens at once gives.

    A token may end in the middle of a character, and the first token of a text may decode differently from the same token
    later on. So each step decodes a few earlier tokens again and gives out what is new, less a tail that the next token
    may still change.

    Args:
        tokenizer: of transformers.
        context: tokens before the first one (the end of the prompt), where the answer continues a text; default none.
    """

    def __init__(self, tokenizer: Any, context: Sequence[int] = ()) -> None:
        self._tokenizer, self._window = tokenizer, list(context)[-_LONGEST:]
        self._mark = len(self._window)  # tokens up to the last place where a character ended
        self._given = len(self._decode())  # characters of the window that are out already

    def push(self, tokens: Sequence[int]) -> str:
        """The text that `tokens` complete."""
        return "".join(map(self._push, tokens))

    def _push(self, token: int) -> str:
        self._window.append(token)
        text = self._decode()
        fresh = text[self._given :]
        if fresh and not text.endswith(_UNKNOWN):
            del self._window[: self._mark]
            self._mark, self._given = len(self._window), len(self._decode())
            return fresh
        if len(self._window) <= _LONGEST:
            return ""  # a special token; or a character that is not complete, for which all bytes of a run may stand so
        held = min(_HELD, len(fresh) - len(fresh.rstrip(_UNKNOWN)))
        del self._window[: -_LONGEST // 2]
        self._mark, self._given = len(self._window), max(0, len(self._decode()) - held)
        return fresh[: len(fresh) - held]

    def flush(self) -> str:
        """What was held back, at the end of the answer."""
        return self._decode()[self._given :]

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=True)


class StopStrings:
    """A filter that ends a text before the first of several strings, wherever pieces happen to be cut.

    The first is the one that ends first, and of those the longest. Text that may be the beginning of one is held back.

    Args:
        stops: the strings; none: everything passes.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops, self._held, self.hit = stops, "", False

    def push(self, piece: str) -> str:
        """What may be given out; `hit` says whether a stop string has come."""
        text, self._held = self._held + piece, ""
        found = [(text.index(stop) + len(stop), -len(stop)) for stop in self._stops if stop in text]
        if found:
            end, minus_length = min(found)
            self.hit = True
            return text[: end + minus_length]
        keep = max((n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, at the end of the answer."""
        return self._held
