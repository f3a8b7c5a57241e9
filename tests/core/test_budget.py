"""A budget split among candidates, against exact fractions."""

import random
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from intaglio.core.budget import largest_remainder

WEIGHTS = st.lists(st.integers(0, 50), min_size=1, max_size=8).filter(any)


@given(st.integers(0, 200), WEIGHTS, st.booleans())
def test_what_the_floors_leave_goes_to_the_largest_remainders(total, weights, drawn):
    parts = largest_remainder(total, weights, random.Random(0) if drawn else None)
    shares = [Fraction(total * weight, sum(weights)) for weight in weights]
    assert sum(parts) == total
    assert all(part in (int(share), int(share) + 1) for part, share in zip(parts, shares, strict=True))
    raised = [share - int(share) for part, share in zip(parts, shares, strict=True) if part > int(share)]
    left = [share - int(share) for part, share in zip(parts, shares, strict=True) if part == int(share)]
    assert not raised or not left or min(raised) >= max(left)


def test_equal_remainders_go_to_the_first_or_are_drawn():
    assert largest_remainder(2, [1, 1, 1]) == [1, 1, 0]
    drawn = {tuple(largest_remainder(2, [1, 1, 1], random.Random(seed))) for seed in range(40)}
    assert drawn == {(1, 1, 0), (1, 0, 1), (0, 1, 1)}
