"""Schedules of a budget over a run: a schedule is `step -> share of the budget`, an exact fraction in [0, 1].

Fractions, not floats, so that `granted` (a floor) never misses an entry through rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

__all__ = ["SCHEDULES", "Schedule", "constant", "cubic", "front_loaded", "granted", "linear", "ramp"]

Schedule = Callable[[int], Fraction]


def constant() -> Schedule:
    """Everything from the first step on."""
    return lambda step: Fraction(1)


def linear(steps: int, until: float = 1.0) -> Schedule:
    """Grow evenly and reach all of the budget after `until × steps` steps: t / (until · steps), at most 1.

    >>> [granted(linear(4), 10, step) for step in range(6)]
    [0, 2, 5, 7, 10, 10]

    Args:
        steps: length of the run in optimizer steps, ≥ 1.
        until: fraction of the run by which all is granted, (0, 1]; default 1.0.

    Raises:
        ValueError: outside those ranges.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps={steps!r}: give the number of optimizer steps, a whole number of at least 1")
    if not 0 < until <= 1:
        raise ValueError(f"until={until!r}: give the fraction of the run, above 0 and at most 1")
    end = steps * Fraction(str(until))
    return lambda step: min(Fraction(max(step, 0)) / end, Fraction(1))


def cubic(steps: int, until: float = 1.0) -> Schedule:
    """Grow fast, then ever slower: 1 − (1 − t / (until · steps))³, the cubic ramp of gradual pruning turned round.

    Args and errors as `linear`.
    """
    ramp = linear(steps, until)
    return lambda step: 1 - (1 - ramp(step)) ** 3


def ramp(steps: int, until: float = 1.0) -> Schedule:
    """Grow slowly, then ever faster, each grant larger than the one before by the same amount: (t / (until · steps))².

    Args and errors as `linear`.
    """
    even = linear(steps, until)
    return lambda step: even(step) ** 2


def granted(schedule: Schedule, budget: int, step: int) -> int:
    """Entries granted in all after `step` updates: floor(budget × share), exact."""
    return int(budget * schedule(step))


def front_loaded(budget: int, steps: int, step: int) -> int:
    """Entries granted in all after `step` updates where the first `budget mod steps` updates get one more than the rest."""
    t = min(max(step, 0), steps)
    return budget // steps * t + min(t, budget % steps)


SCHEDULES: dict[str, Callable[[int, float], Schedule]] = {"linear": linear, "ramp": ramp, "cubic": cubic}
