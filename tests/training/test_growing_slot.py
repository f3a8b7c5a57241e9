"""A growing slot by itself: what is damped, checked and loaded of entries that left."""

import pytest
import torch
from torch import nn

from intaglio.training.growing_slot import GrowingSlot


def parameter():
    return nn.Parameter(torch.arange(24.0).reshape(4, 6))


def exchanged():
    """A slot that trained entries 3 and 20 and now trains 5 and 20, each tuned by one."""
    weight = parameter()
    slot = GrowingSlot("w", weight)
    for step, offsets in enumerate(([3, 20], [5, 20]), start=1):
        slot.exchange(torch.tensor(offsets), torch.zeros(2), step)
        slot.commit()
        with torch.no_grad():
            slot.values.add_(1.0)
        slot.write()
    return slot, weight


def test_damping_reaches_entries_that_left():
    slot, weight = exchanged()
    base, tuned = parameter().detach(), weight.detach().clone()
    assert tuned.flatten()[[3, 5, 20]].tolist() == [4.0, 6.0, 22.0]
    undo = slot.damp(0.5)
    torch.testing.assert_close(weight.detach(), base + 0.5 * (tuned - base), rtol=0, atol=0)
    undo()
    assert torch.equal(weight.detach(), tuned)
    assert slot.entries.index.tolist() == [3, 5, 20]


def test_a_state_fits_the_base_and_the_tuned_weights_and_nothing_else():
    slot, weight = exchanged()
    state = slot.state()
    GrowingSlot("w", parameter()).check(state, None)  # the base
    GrowingSlot("w", nn.Parameter(weight.detach().clone())).check(state, None)  # loaded already
    for offset in (3, 5, 20):
        other = parameter()
        with torch.no_grad():
            other.view(-1)[offset] += 0.5
        with pytest.raises(ValueError, match="another base model"):
            GrowingSlot("w", other).check(state, None)


def test_a_state_is_loaded_over_what_was_trained_before():
    """What this slot trained, and the other did not, goes back to the base."""
    state = exchanged()[0].state()
    weight = parameter()
    slot = GrowingSlot("w", weight)
    for step, offsets in enumerate(([0, 7], [1, 7]), start=1):
        slot.exchange(torch.tensor(offsets), torch.zeros(2), step)
        slot.commit()
        with torch.no_grad():
            slot.values.sub_(9.0)
        slot.write()
    slot.load(state)
    slot.write()
    expected = parameter().detach()
    expected.view(-1)[[3, 5, 20]] = torch.tensor([4.0, 6.0, 22.0])
    assert torch.equal(weight.detach(), expected)
