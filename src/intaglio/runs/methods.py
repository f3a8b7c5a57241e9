"""The methods that a run file may name: ours, and those that PEFT runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..method_kinds.layer_method import LayerMethod
from ..method_kinds.method import Method
from ..methods import METHODS, build, nearest
from .peft_methods import PEFT_METHODS, peft_fields, peft_problems

__all__ = ["build_blocks", "list_methods"]


def list_methods() -> dict[str, dict[str, Any]]:
    """Every method a run file may name: name → {"summary": …, "fields": {"name": name, field: default, …}}."""
    ours = {name: {"summary": cls.summary, "fields": cls().to_dict()} for name, cls in METHODS.items()}
    peft = {name: {"summary": line, "fields": {"name": name} | peft_fields(name)} for name, line in PEFT_METHODS.items()}
    return ours | peft


def build_blocks(method: Any, schedule: Any, allow: Sequence[str] = ()) -> tuple[Method | None, list[str]]:
    """The method to attach, and what is wrong with the two blocks of a run file that describe it.

    Args:
        method: the method block: name and fields.
        schedule: the schedule block: name and fields of a method that trains layers in turn; None for none.
        allow: packages whose methods may be named, as `package.module:Class`.

    Returns:
        (method, layers in turn included, or None where PEFT trains by itself; problems, a line each).
    """
    of, problems = _build_method(method, allow)
    if not isinstance(schedule, dict):
        return of, problems  # there is none, or pydantic has said so
    in_turn = [name for name, cls in METHODS.items() if issubclass(cls, LayerMethod)]
    if schedule.get("name") not in in_turn:
        name = schedule.get("name")
        return None, [*problems, f"schedule.name={name!r}: unknown; {nearest(str(name), in_turn)}"]
    if "of" in schedule:
        return None, [*problems, "schedule.of: what is trained in a layer is the method block's; leave it out"]
    try:
        return build(schedule | ({} if of is None else {"of": of}), "schedule"), problems
    except ValueError as error:
        return None, [*problems, str(error)]


def _build_method(method: Any, allow: Sequence[str]) -> tuple[Method | None, list[str]]:
    if not isinstance(method, dict):
        return None, []  # pydantic has said so
    name = method.get("name")
    if isinstance(name, str) and name in PEFT_METHODS:
        return None, peft_problems("method", name, {key: value for key, value in method.items() if key != "name"})
    if not isinstance(name, str) or (name not in METHODS and ":" not in name):
        return None, [f"method.name={name!r}: unknown; {nearest(str(name), [*METHODS, *PEFT_METHODS])}"]
    try:
        return build(method, allowed=allow), []
    except ValueError as error:
        return None, [str(error)]
