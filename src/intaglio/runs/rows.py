"""A row of data, checked down to its turns: understood, or refused by file and row.

prompt / completion     two strings, or two lists of turns
messages                one conversation
text                    plain text
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .reading import Row

__all__ = ["FORMATS", "checked", "form_of", "last_text", "question"]

FORMATS = (("prompt", "completion"), ("messages",), ("text",))
_BESIDE = ("tools", "chat_template_kwargs")  # that TRL hands to the template of a conversation
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "model": "assistant", "assistant": "assistant"}
_ROLES |= {"system": "system", "tool": "tool", "function": "tool", "observation": "tool", "developer": "developer"}
# Columns that TRL gives a meaning of its own, which text rows cannot have.
_ELSEWHERE = dict.fromkeys(("images", "image", "videos", "audio"), "rows of this trainer are text")
_MASKS = ("input_ids", "labels", "attention_mask", "completion_mask", "assistant_masks", "position_ids", "seq_lengths")
_ELSEWHERE |= dict.fromkeys(_MASKS, "rows are tokenized here, with masks of their own")


def form_of(columns: Any, source: str, mapped: Mapping[str, str]) -> tuple[str, ...]:
    """The columns of the format that a data set is in, by the columns of its first row.

    Raises:
        ValueError: where it is none, or has columns that would be dropped although they mean something to the trainer.
    """
    names = [*columns, *mapped]
    if "conversations" in names and "messages" not in names:
        names.append("messages")
    for name in names:
        if name in _ELSEWHERE:
            raise ValueError(f"data: {source} has a column {name!r}; {_ELSEWHERE[name]}: drop it, or train in Python")
    form = next((form for form in FORMATS if set(form) <= set(names)), None)
    if form is None and {"chosen", "rejected"} <= set(names):
        raise ValueError(
            f"data: {source} holds preferences (chosen, rejected): `intaglio train` fine-tunes only; docs/peft.md has DPO"
        )
    if form is None:
        raise ValueError(
            f"data: {source} has the columns {', '.join(columns)}; wanted are prompt and completion, messages, or text: map "
            "yours with data.columns, e.g. {prompt: question, completion: answer}"
        )
    return form


def checked(row: Row, form: tuple[str, ...], where: str, *, chat: bool) -> Row:
    """The row's columns that are trained on and scored, whole and of one kind.

    Args:
        row: as read, with columns renamed already.
        form: of the data set.
        where: file and row, for errors.
        chat: whether prompt and completion strings become turns.

    Raises:
        ValueError: naming file and row, and what to do.
    """
    if "messages" in form and "messages" not in row:
        row = row | {"messages": row.get("conversations")}
    for key in form:
        if row.get(key) is None or row[key] == []:
            raise ValueError(f"data: {where}: {key} is empty; fill it in or drop the row")
    kept: Row = {key: _value(row[key], key, where) for key in form}
    if len({isinstance(value, list) for value in kept.values()}) > 1:
        raise ValueError(f"data: {where}: prompt and completion must both be text, or both be lists of turns")
    if chat and "completion" in kept and isinstance(kept["prompt"], str):
        kept = {"prompt": [_turn("user", kept["prompt"])], "completion": [_turn("assistant", kept["completion"].strip())]}
    if "messages" in kept and not isinstance(kept["messages"], list):
        raise ValueError(f"data: {where}: messages must be a list of turns")
    for key in _BESIDE:
        if row.get(key):
            if isinstance(kept[form[0]], str):
                raise ValueError(
                    f"data: {where}: {key} has no effect on rows of plain text; give lists of turns, or set data.chat"
                )
            kept[key] = _parsed(row[key], key, where)
    return kept if row.get("answer") is None else kept | {"answer": _text(row["answer"])}


def question(row: Row) -> str:
    """The key of a row: its prompt, or all of it where there is none."""
    if "messages" in row:
        turns = row["messages"]
        return repr(turns[:-1] if turns[-1]["role"] == "assistant" else turns)
    return repr(row.get("prompt", row.get("text")))


def last_text(turns: list[Row]) -> str:
    """The text of the last turn, which is the answer.

    Raises:
        ValueError: where it is not an assistant's.
    """
    if turns[-1]["role"] != "assistant":
        raise ValueError("data: a held-out conversation must end with an assistant turn, which is the answer")
    return turns[-1]["content"]


def _value(value: Any, key: str, where: str) -> str | list[Row]:
    if key == "text" or (isinstance(value, str) and key != "messages"):
        if isinstance(value, (list, dict)):
            raise ValueError(f"data: {where}: text must be a string, not {type(value).__name__}")
        return _text(value)
    if isinstance(value, str):
        value = _parsed(value, key, where)
    if isinstance(value, dict):
        raise ValueError(f"data: {where}: {key} is one object; wanted is text, or a list of turns")
    return (
        [_checked_turn(turn, f"{where}, {key}[{i}]") for i, turn in enumerate(value)] if isinstance(value, list) else _text(value)
    )


def _checked_turn(turn: Any, where: str) -> Row:
    if not isinstance(turn, dict):
        raise ValueError(f"data: {where}: a turn must be an object with role and content, not {turn!r}")
    if "role" not in turn and "from" in turn:  # as ShareGPT has it
        turn = {"role": turn["from"], "content": turn.get("value")} | {
            k: v for k, v in turn.items() if k not in ("from", "value")
        }
    role = turn.get("role")
    if not isinstance(role, str) or not role:
        raise ValueError(f"data: {where}: a turn needs a role, such as user or assistant; it has {', '.join(turn)}")
    content = turn.get("content")
    if isinstance(content, list):
        content = _joined(content, where)
    if content is None:
        if not turn.get("tool_calls"):
            raise ValueError(f"data: {where}: content is empty, and there are no tool_calls; fill it in or drop the row")
        content = ""  # no text beside a call, as templates expect it
    if not isinstance(content, str):
        raise ValueError(f"data: {where}: content must be a string, or a list of text parts, not {type(content).__name__}")
    return turn | {"role": _ROLES.get(role, role), "content": content}


def _joined(parts: list[Any], where: str) -> str:
    for part in parts:
        if not isinstance(part, dict) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"data: {where}: content has a part that is no text ({str(part)[:60]}); content must be text here")
    return "".join(part["text"] for part in parts)


def _parsed(value: Any, key: str, where: str) -> Any:
    """JSON that a column holds as a string (a CSV file, say)."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"data: {where}: {key} is a string, and no JSON ({error}); wanted is a list of turns") from error


def _turn(role: str, content: str) -> Row:
    return {"role": role, "content": content}


def _text(value: Any) -> str:
    """A value as text; truth values of typed files as JSON has them."""
    return str(value).lower() if isinstance(value, bool) else str(value)
