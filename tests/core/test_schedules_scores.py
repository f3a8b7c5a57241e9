from fractions import Fraction

import pytest
import torch

from intaglio.core import schedules, scores


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scores_of_gradients_are_computed_in_fp32(dtype):
    """the cast comes before the arithmetic, whatever the type of weight and gradient."""
    generator = torch.Generator().manual_seed(0)
    weight, gradient = (torch.randn(1000, generator=generator).mul(0.02).to(dtype) for _ in range(2))
    w, g = weight.float(), gradient.float()
    assert torch.equal(scores.gradient(gradient), g.abs())
    assert torch.equal(scores.snip(weight, gradient), (g * w).abs())
    for exponent, eps in [(1.0, 1e-8), (1, 1.0), (2.0, 0.1), (0.5, 1e-3), (-2.0, 0.0)]:
        found = scores.d3(weight, gradient, exponent, eps)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), g.double().abs() / (w.double().abs() + eps) ** exponent, rtol=1e-6, atol=0)
        halves = [scores.d3(weight[part], gradient[part], exponent, eps) for part in (slice(0, 333), slice(333, None))]
        assert torch.equal(torch.cat(halves), found)
    assert torch.equal(scores.d3(weight, gradient, 0, 1e-8), g.abs())
    assert torch.equal(scores.d3(weight, gradient, -1, 0), (g * w).abs())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("exponent", "eps"), [(1.0, 1e-8), (1.0, 0.0), (100.0, 1e-8), (-1.0, 0.0), (-100.0, 10.0), (0.0, 0.0)])
def test_d3_is_never_nan(dtype, exponent, eps):
    """0/0 and 0·inf score 0 and are chosen last."""
    zeros = torch.zeros(3, dtype=dtype)
    assert torch.equal(scores.d3(zeros, zeros, exponent, eps), torch.zeros(3))
    assert not scores.d3(zeros, torch.ones(3, dtype=dtype), exponent, eps).isnan().any()


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
