"""Field checks: what is right gives no problem, what is wrong says name, value and what is allowed."""

import math
from typing import Literal

import pytest

from intaglio.method_kinds import fields

Colour = Literal["red", "green"]


@pytest.mark.parametrize(
    "problems",
    [
        fields.count("n", 1),
        fields.count("n", 0, least=0),
        fields.count("n", None, none="all"),
        fields.share("n", 3),
        fields.share("n", 1.0),
        fields.share("n", None, none="frozen"),
        fields.number("n", -2.5, "a number"),
        fields.number("n", 1, "a share", low=0, high=1),
        fields.choice("n", "red", Colour),
        fields.choice("n", "a", {"a": 1}),
        fields.patterns(n=("*",), m=()),
    ],
)
def test_right_values_give_no_problem(problems):
    assert problems == []


@pytest.mark.parametrize(
    ("problems", "message"),
    [
        (fields.count("n", 0), "n=0: give a whole number of at least 1"),
        (fields.count("n", True), "n=True: give a whole number of at least 1"),
        (fields.count("n", 1.0, "number of rows", none="all"), "n=1.0: give a number of rows of at least 1, or None for all"),
        (fields.count("n", None), "n=None: give a whole number of at least 1"),
        (fields.share("n", 0), "n=0: a count of entries must be at least 1, a share above 0 and at most 1.0"),
        (fields.share("n", 1.5, "units"), "n=1.5: a count of units must be at least 1, a share above 0 and at most 1.0"),
        (fields.share("n", math.nan), "n=nan: a count of entries must be at least 1, a share above 0 and at most 1.0"),
        (fields.share("n", "1"), "n='1': give a whole number (a count of entries) or a fraction in (0, 1] (a share)"),
        (fields.share("n", False), "n=False: give a whole number (a count of entries) or a fraction in (0, 1] (a share)"),
        (fields.number("n", math.inf, "a finite number"), "n=inf: give a finite number"),
        (fields.number("n", 2, "a share", high=1, none="no share"), "n=2: give a share, or None for no share"),
        (fields.choice("n", "blue", Colour), "n='blue': known are red, green"),
        (fields.patterns(n="*"), "n='*': give a tuple of patterns, ('*',)"),
        (fields.patterns(n=(1,)), "n=(1,): give a tuple of patterns, e.g. ('*.mlp.*',)"),
    ],
)
def test_wrong_values_say_what_is_allowed(problems, message):
    assert problems == [message]


def test_all_problems_are_raised_in_one_error():
    fields.refuse("Mine", [])
    with pytest.raises(ValueError, match=r"^Mine: a; b$"):
        fields.refuse("Mine", ["a", "b"])
