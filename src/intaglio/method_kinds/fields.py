"""Checks of a method's fields: each says what is wrong with a value as a list of problems, empty where it is right."""

from __future__ import annotations

import math
import typing
from typing import Any

__all__ = ["choice", "count", "number", "patterns", "refuse", "share"]


def count(name: str, value: object, what: str = "whole number", *, least: int = 1, none: str = "") -> list[str]:
    """A whole number.

    Args:
        name: of the field.
        value: to check.
        what: is counted, for the message.
        least: smallest value allowed; default 1.
        none: what None stands for, where it is allowed; default "", where it is not.
    """
    if (value is None and none) or (isinstance(value, int) and not isinstance(value, bool) and value >= least):
        return []
    return [f"{name}={value!r}: give a {what} of at least {least}{_or_none(none)}"]


def share(name: str, value: object, what: str = "entries", *, none: str = "") -> list[str]:
    """A count of things as a whole number, or a share of them as a fraction in (0, 1]; arguments as `count`."""
    if value is None and none:
        return []
    if not _is_number(value):
        return [f"{name}={value!r}: give a whole number (a count of {what}) or a fraction in (0, 1] (a share){_or_none(none)}"]
    if not value > 0 or (isinstance(value, float) and not value <= 1):
        return [f"{name}={value}: a count of {what} must be at least 1, a share above 0 and at most 1.0{_or_none(none)}"]
    return []


def number(
    name: str, value: object, allowed: str, *, low: float = -math.inf, high: float = math.inf, none: str = ""
) -> list[str]:
    """A finite number, low ≤ value ≤ high.

    Args:
        name: of the field.
        value: to check.
        allowed: what is, for the message: "a finite number of at least 0".
        low: the least.
        high: the greatest.
        none: what None stands for, where it is allowed.
    """
    if (value is None and none) or (_is_number(value) and low <= value <= high and math.isfinite(value)):
        return []
    return [f"{name}={value!r}: give {allowed}{_or_none(none)}"]


def choice(name: str, value: object, allowed: Any) -> list[str]:
    """One of the values of a `Literal`, or of a collection."""
    known = typing.get_args(allowed) or tuple(allowed)
    return [] if value in known else [f"{name}={value!r}: known are {', '.join(map(str, known))}"]


def patterns(**fields: object) -> list[str]:
    """Tuples of shell patterns, by the field's name."""
    problems = []
    for name, value in fields.items():
        if isinstance(value, str):
            problems.append(f"{name}={value!r}: give a tuple of patterns, ({value!r},)")
        elif not isinstance(value, tuple) or not all(isinstance(pattern, str) for pattern in value):
            problems.append(f"{name}={value!r}: give a tuple of patterns, e.g. ('*.mlp.*',)")
    return problems


def refuse(owner: str, problems: list[str]) -> None:
    """Raise all problems of the fields of `owner` in one `ValueError`; none, no error."""
    if problems:
        raise ValueError(f"{owner}: " + "; ".join(problems))


def _or_none(none: str) -> str:
    return f", or None for {none}" if none else ""


def _is_number(value: object) -> typing.TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
