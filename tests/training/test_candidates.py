"""The best entries of one update, where blocks of a gradient are passed over: ties at the threshold, in any order of tensors."""

import pytest
import torch

from intaglio.core.budget import TopK
from intaglio.training.candidates import BLOCK, scan


class Size:
    """Scores by |gradient|, with an exact bound."""

    def score(self, weight, gradient):
        return gradient.abs().float()

    def least_gradient(self, score):
        return max(score, 0.0)


@pytest.mark.parametrize("blocks", [1, 40], ids=["few blocks", "most blocks"])
@pytest.mark.parametrize("tail", [False, True], ids=["in a block", "in the short last one"])
def test_a_tie_with_the_threshold_is_not_passed_over(blocks, tail):
    """An earlier tensor wins ties, also when its gradient comes last."""
    best, length = TopK(3), 40 * BLOCK + 7
    late = torch.full((length,), 1.0)
    assert scan(late, torch.zeros(length), Size(), best, 1, [])
    assert best.threshold == 1.0
    early, at = torch.zeros(length), [block * BLOCK + 5 for block in range(blocks)]
    at = [length - 2, *at] if tail else at
    early[at] = -1.0
    assert scan(early, torch.zeros(length), Size(), best, 0, [])
    ranks, offsets, gradients = best.winners()
    first = sorted(at)[:3]
    expected = [(0, offset) for offset in first] + [(1, offset) for offset in range(3 - len(first))]
    assert list(zip(ranks.tolist(), offsets.tolist(), strict=True)) == expected
    assert gradients.tolist()[: len(first)] == [-1.0] * len(first)


def test_a_gradient_that_is_not_finite_adds_nothing():
    best, gradient = TopK(1), torch.zeros(3 * BLOCK)
    gradient[-1] = float("inf")
    assert not scan(gradient, torch.zeros(3 * BLOCK), Size(), best, 0, [])
    assert best.winners()[0].numel() == 0
