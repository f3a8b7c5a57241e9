from fractions import Fraction

import pytest
import torch

from intaglio import schedules, scores


@pytest.mark.parametrize(
    ("budget", "steps"), [(1000, 100), (1000, 300), (320, 300), (200, 300), (1, 300), (7, 3), (10**12 + 1, 7)]
)
def test_linear_grants_exactly(budget, steps):
    granted = [schedules.granted(schedules.linear(steps), budget, step) for step in range(steps + 6)]
    assert granted[: steps + 1] == [budget * step // steps for step in range(steps + 1)]
    assert set(granted[steps:]) == {budget}
    assert granted == sorted(granted)


def test_until_and_shapes():
    assert schedules.granted(schedules.linear(100, until=0.1), 50, 10) == 50
    assert schedules.granted(schedules.linear(100, until=0.1), 50, 5) == 25
    assert schedules.cubic(10)(5) == Fraction(7, 8)
    assert [schedules.constant()(step) for step in (0, 9)] == [1, 1]


@pytest.mark.parametrize("arguments", [(0,), (-3,), (2.5,), (True,), (10, 0.0), (10, 1.1)])
def test_bad_schedule(arguments):
    with pytest.raises(ValueError, match="give the"):
        schedules.linear(*arguments)


def test_magnitude_is_fp32():
    weight = torch.tensor([-2.0, 0.5], dtype=torch.bfloat16)
    assert torch.equal(scores.magnitude(weight), torch.tensor([2.0, 0.5]))


def test_random_scores_depend_on_seed_and_key_alone():
    state = torch.random.get_rng_state()
    first = scores.random((3, 4), seed=1, key="a")
    assert torch.equal(first, scores.random((3, 4), seed=1, key="a"))
    assert not torch.equal(first, scores.random((3, 4), seed=2, key="a"))
    assert not torch.equal(first, scores.random((3, 4), seed=1, key="b"))
    assert torch.equal(state, torch.random.get_rng_state())


def test_stable_seed_is_the_same_everywhere():
    """A changed value would silently change every selection made from a seed."""
    assert scores.stable_seed(0, "model.layers.0") == 2629426258443081334
