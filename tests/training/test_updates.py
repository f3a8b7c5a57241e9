"""How optimizers act on entries that come while they run."""

import contextlib
import copy
import itertools

import pytest
import torch

from intaglio import ID3, Selection, Updates, attach
from support import tiny
from support.dense_unmasking import DenseUnmasking
from support.unmasking import Leaves, adamw, assert_equal_weights, both, chosen, gradients, leaves, loss, normal, weights

OPTIMIZERS = {
    "AdamW": lambda p: adamw(p),
    "Adam-L2-amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1, amsgrad=True),
    "SGD-momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "SGD-nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, weight_decay=0.1, initial_accumulator_value=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, weight_decay=0.1, momentum=0.9, centered=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-2, weight_decay=0.1),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=1e-2, weight_decay=0.1),
}


def grouped(make):
    """The same optimizer with weight decay set in groups, not by keyword."""
    return lambda parameters: make([{"params": [p], "weight_decay": 0.1} for p in parameters])


def frozen_are_unchanged(tuner, start):
    for name, after in weights(tuner.model).items():
        frozen = torch.ones(after.numel(), dtype=torch.bool)
        if name in tuner.selection:
            frozen[tuner.selection[name].flat()] = False
        assert torch.equal(after.flatten()[frozen], start[name].flatten()[frozen])


@pytest.mark.parametrize("mode", ["increment", "repeat"])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizers_equal_the_dense_twin_and_spare_the_rest(make, mode):
    """ID3 checklist 8, 9 and 30: weight decay 0.1 in every group, momentum, state that follows its entry."""
    method = ID3(budget=120, steps=6) if mode == "increment" else ID3(budget=20, mode="repeat")
    tuner, optimizer, dense = both("gqa_llama", method, make=grouped(make))
    start = weights(tuner.model)
    for step in range(8):
        loss(tuner.model, "gqa_llama", step).backward()
        loss(dense.model, "gqa_llama", step).backward()
        optimizer.step()
        optimizer.zero_grad()
        dense.update()
    assert_equal_weights(tuner.model, dense.model)
    frozen_are_unchanged(tuner, start)
    assert all(bool((weights(tuner.model)[name] != start[name]).any()) for name in tuner.selection)


@pytest.mark.parametrize("make", [torch.optim.Adafactor, torch.optim.RAdam, torch.optim.ASGD, torch.optim.Adadelta])
def test_other_optimizers_spare_the_rest(make):
    """ID3 checklist 30: Adafactor scales a step by all chosen entries of a tensor, so no dense twin has its bits."""
    tuner = attach(tiny.build("gqa_llama"), ID3(budget=120, steps=4))
    start, optimizer = weights(tuner.model), tuner.optimizer(make, weight_decay=0.1)
    for step in range(6):
        loss(tuner.model, "gqa_llama", step).backward()
        optimizer.step()
        optimizer.zero_grad()
    frozen_are_unchanged(tuner, start)
    assert tuner.selection.size == 120
    assert all(bool((weights(tuner.model)[name] != start[name]).any()) for name in tuner.selection)


class Shampoo(torch.optim.SGD):
    """Stands for those that treat a matrix as one."""


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (torch.optim.LBFGS, "LBFGS"),
        (torch.optim.Rprop, "optimizer Rprop: an entry's update depends on others or on its past"),
        (Shampoo, "optimizer Shampoo: an entry's update depends on others"),
        (getattr(torch.optim, "Muon", Shampoo), "an entry.s update depends on others"),  # since torch 2.9
    ],
)
def test_optimizers_that_couple_entries_are_refused(make, message):
    """ID3 checklist 30: by name, before anything is trained."""
    with pytest.raises(ValueError, match=message):
        attach(leaves((4, 5)), ID3(budget=3, steps=3)).optimizer(make)


def test_a_closure_is_refused_and_changes_nothing():
    """ID3 checklist 8: a closure would run backward again, past the choice; the weights keep their bits."""
    model = leaves((4, 5))
    start = weights(model)
    optimizer = attach(model, ID3(budget=3, steps=3)).optimizer(adamw)
    for arguments, options in (([lambda: 1.0], {}), ([], {"closure": lambda: 1.0})):
        model.backward(normal(4, 5))
        with pytest.raises(ValueError, match=r"optimizer.step\(closure\): .* run backward first"):
            optimizer.step(*arguments, **options)
        optimizer.zero_grad()
    assert torch.equal(model.get_parameter("0"), start["0"])


def test_an_optimizer_without_the_slots_is_refused():
    tuner = attach(leaves((4, 5), (3,)), ID3(budget=3, steps=3))
    with pytest.raises(ValueError, match=r"optimizer SGD: lacks 1; .* pass tuner.parameters\(\)"):
        tuner.watch(torch.optim.SGD(tuner.parameters()[:1], lr=0.1))


def test_state_that_is_not_one_number_per_entry_is_refused():
    """ID3 checklist 13: block-quantized state, as of 8-bit optimizers."""
    tuner = attach(leaves((40,)), ID3(budget=8, steps=2))
    optimizer = tuner.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)
    tuner.model.backward(normal(40))
    optimizer.step()
    optimizer.zero_grad()
    optimizer.state[tuner.parameters()[0]]["momentum_buffer"] = torch.zeros(1, 4, dtype=torch.uint8)
    tuner.model.backward(normal(40))
    with pytest.raises(ValueError, match=r"its state 'momentum_buffer' of 0 is torch.uint8 \[1, 4\], not one number per entry"):
        optimizer.step()


@pytest.mark.parametrize("decay", ["zero", "start"])
def test_weight_decay_by_hand(decay):
    """ID3 checklist 9: toward zero w ← w · (1 − lr · wd) − step; toward the start w ← s + (w − s) · (1 − lr · wd) − step."""
    model = leaves((30,))
    start = model.get_parameter("0").detach().double()
    tuner = attach(model, ID3(budget=10, steps=1, exponent=0), updates=Updates(decay=decay))
    optimizer = tuner.optimizer(torch.optim.AdamW, lr=0.1, weight_decay=0.5, betas=(0.0, 0.0), eps=0.0)
    gradient = torch.arange(30.0)
    for _ in range(5):
        model.backward(gradient)
        optimizer.step()
        optimizer.zero_grad()
    want, anchor = start.clone(), start if decay == "start" else torch.zeros(30)
    for _ in range(5):
        want[20:] = anchor[20:] + (want[20:] - anchor[20:]) * (1 - 0.1 * 0.5) - 0.1
    torch.testing.assert_close(model.get_parameter("0").double(), want, rtol=0, atol=1e-6)
    assert torch.equal(model.get_parameter("0")[:20].double(), start[:20])


@pytest.mark.parametrize(("unmasked", "first", "peak"), [(1, 1.0, 1.0), (10, 0.48, 1.11), (100, 0.98, 2.14), (1000, 2.51, 5.24)])
@pytest.mark.parametrize("correction", ["global", "per_entry"])
def test_bias_correction_of_a_late_entry(correction, unmasked, first, peak):
    """ID3 checklist 10: constant gradient; global as in section 1.7, per entry as a fresh Adam: 30 updates move 30 lr."""
    model, lr = Leaves(torch.zeros(2)), 1e-3
    tuner = attach(model, ID3(budget=2, mode="repeat"), updates=Updates(bias_correction=correction))
    tuner.unmasking.method = tuner.unmasking.candidates.method = _Late(tuner.method, unmasked)
    optimizer = tuner.optimizer(torch.optim.AdamW, lr=lr, weight_decay=0.0)
    places = [0.0]
    for _ in range(unmasked + 29):
        model.backward(torch.ones(2))
        optimizer.step()
        optimizer.zero_grad()
        places.append(weights(model)["0"][1].item())
    steps = [(a - b) / lr for a, b in itertools.pairwise(places)]
    assert not any(steps[: unmasked - 1])
    found = steps[unmasked - 1], max(steps)
    if correction == "global":
        assert found == pytest.approx((first, peak), abs=0.006)
    else:
        assert found == pytest.approx((1.0, 1.0), abs=2e-4)
        assert places[-1] / lr == pytest.approx(-30, abs=2e-3)


@pytest.mark.parametrize("idle", ["no gradient", "not finite"])
def test_the_age_of_an_entry_counts_its_own_updates(idle):
    """Updates that passed an entry by do not age it: it goes on as a fresh Adam would after as many steps."""
    model, lr = Leaves(torch.zeros(2), torch.zeros(2)), 1e-3
    tuner = attach(model, ID3(budget=4, mode="static"), updates=Updates(bias_correction="per_entry"))
    optimizer = tuner.optimizer(torch.optim.Adam, lr=lr)
    for step in range(6):
        moves = step in (0, 5)
        if idle == "no gradient":
            model.backward(torch.ones(2), torch.ones(2) if moves else None)
        else:
            model.backward(torch.ones(2), torch.ones(2) if moves else torch.full((2,), float("nan")))
        with contextlib.nullcontext() if moves or idle == "no gradient" else pytest.warns(UserWarning, match="not finite"):
            optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(weights(model)["1"], torch.full((2,), -2 * lr), rtol=2e-4, atol=0)


class _Late:
    """One entry at once, all of the rest at update `unmasked`."""

    steps_needed = chooses_anew = False

    def __init__(self, method, unmasked):
        self.score, self.least_gradient, self.unmasked = method.score, method.least_gradient, unmasked

    def granted(self, budget, step):
        return budget if step >= self.unmasked else 1


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.AdamW(p, amsgrad=True),
        lambda p: torch.optim.Adamax(p),
        lambda p: torch.optim.NAdam(p),
    ],
)
def test_per_entry_bias_correction_needs_a_plain_adam(make):
    """ID3 checklist 10: only a plain Adam's step can be taken anew by an entry's age."""
    tuner = attach(leaves((4,)), ID3(budget=2, steps=2), updates=Updates(bias_correction="per_entry"))
    with pytest.raises(ValueError, match="bias_correction='per_entry': needs Adam or AdamW without amsgrad"):
        tuner.optimizer(make)


@pytest.mark.parametrize("dense_norm", [False, True], ids=["selected", "dense"])
@pytest.mark.parametrize("accumulation", ["none", "exact"])
def test_clipping_equals_the_twin(dense_norm, accumulation):
    """ID3 checklist 15: the coefficient of the masked gradient, or that of the whole one, and new entries are scaled too."""
    method = ID3(budget=200, steps=5, whole=("model.norm.weight",))
    updates = Updates(clip="dense" if dense_norm else "selected", accumulation=accumulation)
    tuner, optimizer, dense = both("gqa_llama", method, updates=updates)
    for step in range(7):
        loss(tuner.model, "gqa_llama", step).backward()
        loss(dense.model, "gqa_llama", step).backward()
        everything = list(dense.model.parameters())
        if dense_norm:
            want = torch.nn.utils.get_total_norm([p.grad for p in everything])
        dense.choose()
        if not dense_norm:
            want = torch.nn.utils.get_total_norm([p.grad for p in everything])
        torch.nn.utils.clip_grads_with_norm_(everything, 0.3, want)
        got = tuner.clip_grad_norm_(0.3)
        assert float(got) > 0.3
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
        dense.make()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in weights(dense.model).items():
        torch.testing.assert_close(weights(tuner.model)[name], parameter, rtol=0, atol=1e-6)


@pytest.mark.parametrize("accumulation", ["none", "exact", "lean"])
def test_clipping_by_torch_is_clipping_by_the_tuner(accumulation):
    """ID3 checklist 15: newly chosen entries have their gradients when backward ends, whatever the accumulation."""
    models = []
    for by_torch in (True, False):
        tuner = attach(tiny.build("gqa_llama"), ID3(budget=200, steps=4), updates=Updates(accumulation=accumulation))
        optimizer = tuner.optimizer(adamw)
        for step in range(5):
            loss(tuner.model, "gqa_llama", step).backward()
            clip = (
                tuner.clip_grad_norm_
                if not by_torch
                else lambda n, m=tuner.model: torch.nn.utils.clip_grad_norm_(m.parameters(), n)
            )
            assert float(clip(0.2)) > 0.2
            gradients_now = torch.cat([p.grad for p in tuner.parameters()])
            assert gradients_now.numel() == min(50 * (step + 1), 200)
            assert float(gradients_now.norm()) == pytest.approx(0.2, rel=1e-4)
            optimizer.step()
            optimizer.zero_grad()
        models.append(tuner.model)
    assert_equal_weights(*models)


def test_state_is_proportional_to_what_is_chosen():
    """ID3 checklist 13: 24 bytes per entry with AdamW in fp32: 4 each of offset, value, base, birth and two moments."""
    tuner = attach(leaves((300, 100), (5000,)), ID3(budget=900, steps=3))
    optimizer = tuner.optimizer(adamw)
    for step in range(3):
        tuner.model.backward(*gradients(tuner.model, step))
        optimizer.step()
        optimizer.zero_grad()
        held = [t for slot in tuner.unmasking.slots.values() for t in vars(slot.held).values()]
        moments = [t for state in optimizer.state.values() for key, t in state.items() if key != "step"]
        assert sum(t.nbytes for t in held + moments) == 24 * 300 * (step + 1)
        saved = [
            *tuner.state_dict()["slots"].values(),
            *(t for s in optimizer.state_dict()["state"].values() for t in s.values()),
        ]
        assert sum(t.nbytes for t in saved) == 24 * 300 * (step + 1) + 2 * 4  # Adam's own step, one per tensor


def test_tiny_updates_survive_bf16_whenever_an_entry_comes():
    """ID3 checklist 21: 100 updates of ±1e-5 on bf16 weights of 0.02: within half a unit of the last place of fp32's."""
    start = (normal(400).sign() * (0.015 + 0.01 * normal(400, seed=1).abs())).bfloat16()
    ends = []
    for dtype in (torch.bfloat16, torch.float32):
        tuner = attach(Leaves(start.to(dtype)), ID3(budget=400, steps=50))
        optimizer = tuner.optimizer(torch.optim.SGD, lr=1e-5)
        for _ in range(150):
            tuner.model.backward(normal(400, seed=2).sign())
            optimizer.step()
            optimizer.zero_grad()
        ends.append(tuner.model.get_parameter("0").detach())
    assert torch.equal(ends[0], ends[1].bfloat16())
    assert float((ends[1] - start.float()).abs().min()) > 9.9e-4


def test_bad_updates_are_refused_together():
    with pytest.raises(
        ValueError, match=r"Updates: accumulation='all': known are none, exact, lean; clip='none'.*oversampling=0"
    ):
        Updates(accumulation="all", clip="none", oversampling=0)
    with pytest.raises(ValueError, match=r"clip='dense': the norm of a sum needs whole gradients"):
        Updates(accumulation="lean", clip="dense")
    with pytest.raises(ValueError, match=r"oversampling=4: has no effect with accumulation='exact'"):
        Updates(accumulation="exact", oversampling=4)


def test_the_twin_leaves_masked_entries_alone():
    """The oracle itself: nothing moves but its selection, under an optimizer that moves everything."""
    model = leaves((6, 5), (7,))
    start = copy.deepcopy(weights(model))
    dense = DenseUnmasking(model, ID3(budget=9, steps=3), grouped(adamw), Selection())
    for step in range(3):
        model.backward(*gradients(model, step))
        dense.update()
    moved = {name: (p != start[name]).flatten().nonzero().flatten().tolist() for name, p in weights(model).items()}
    assert {name: at for name, at in moved.items() if at} == {n: e.flat().tolist() for n, e in dense.selection.items()}
    assert dense.selection.size == 9
    assert chosen(attach(model, ID3(budget=1, steps=1))) == {}
