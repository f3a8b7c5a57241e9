"""Runs that are accumulated, skipped, scaled, interrupted, spread over processes."""

import copy
import io

import pytest
import torch

from intaglio import ID3, Updates, attach
from intaglio.core.entries import Elements
from intaglio.core.selection import Selection
from support import tiny
from support.unmasking import adamw, assert_equal_weights, both, chosen, gradients, leaves, loss, normal, offsets, weights

NAN = float("nan")


def test_a_second_backward_is_refused_and_does_no_harm():
    """ID3 checklist 14: never silently per micro-batch. What follows goes on as if the update had been skipped."""
    tuner = attach(leaves((20,), (30,)), ID3(budget=9, steps=3))
    optimizer = tuner.optimizer(adamw)
    tuner.model.backward(*gradients(tuner.model, 0))
    with pytest.raises(ValueError, match=r"a second backward before the update.*accumulation='exact'"):
        tuner.model.backward(*gradients(tuner.model, 1))
    optimizer.zero_grad()
    for step in range(3):
        tuner.model.backward(*gradients(tuner.model, step))
        optimizer.step()
        optimizer.zero_grad()
        assert tuner.unmasking.chosen == 3 * (step + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_accumulation_equals_the_dense_one(dtype):
    """ID3 checklist 14 and 12: the sum of four micro-batches, bit for bit; no whole gradient stays in .grad."""
    method = ID3(budget=200, steps=5)
    tuner, optimizer, dense = both("gqa_llama", method, dtype=dtype, updates=Updates(accumulation="exact", clip="dense"))
    for step in range(6):
        for micro in range(4):
            (loss(tuner.model, "gqa_llama", step, micro) / 4).backward()
            (loss(dense.model, "gqa_llama", step, micro) / 4).backward()
            assert all(slot.target.grad is None for slot in tuner.slots)
        dense.choose()
        assert chosen(tuner) == offsets(dense.selection)
        dense.make()
        optimizer.step()
        optimizer.zero_grad()
    assert_equal_weights(tuner.model, dense.model)


def accumulated(updates, micros):
    """The first update's choice of 400 entries from so many micro-batches, and the tuner."""
    tuner = attach(tiny.build("gqa_llama"), ID3(budget=400, mode="static"), updates=updates)
    for micro in range(micros):
        (loss(tuner.model, "gqa_llama", 0, micro) / micros).backward()
    return tuner


@pytest.mark.parametrize(("oversampling", "least"), [(1, 0.6), (10, 0.96), (100, 1.0)])
def test_lean_accumulation_is_nearly_exact(oversampling, least):
    """ID3 checklist 14: candidate sums over four micro-batches; measured overlaps .64, .97 and 1."""
    exact = accumulated(Updates(accumulation="exact"), 4)
    lean = accumulated(Updates(accumulation="lean", **({} if oversampling == 10 else {"oversampling": oversampling})), 4)
    assert lean.selection.size == exact.selection.size == 400
    assert least <= lean.selection.overlap(exact.selection) / 400 <= (1 if oversampling > 1 else 0.95)


def test_lean_accumulation_of_one_pass_is_exact():
    """ID3 checklist 14; and the chosen entries' gradients are those of the sum in any case."""
    one, none = accumulated(Updates(accumulation="lean"), 1), accumulated(Updates(), 1)
    assert one.selection == none.selection
    wide, exact = accumulated(Updates(accumulation="lean", oversampling=100), 3), accumulated(Updates(accumulation="exact"), 3)
    for left, right in zip(wide.unmasking.slots.values(), exact.unmasking.slots.values(), strict=True):
        order, same = left.index.argsort(), right.index.argsort()
        assert torch.equal(left.index[order], right.index[same])
        torch.testing.assert_close(left.values.grad[order], right.values.grad[same], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bad", [0, 1, 2])
@pytest.mark.parametrize("entry", [0, 19], ids=["candidate", "other"])
@pytest.mark.parametrize("accumulation", ["exact", "lean"])
def test_one_damaged_micro_batch_damages_the_update(accumulation, entry, bad):
    """ID3 checklist 7 and 14: also where it is the second or third of three."""
    tuner = attach(leaves((20,)), ID3(budget=2, steps=2, exponent=0), updates=Updates(accumulation=accumulation))
    start, optimizer = weights(tuner.model), tuner.optimizer(adamw)
    for micro in range(3):
        gradient = 1e-3 * normal(20, seed=micro)
        gradient[0] = 5.0
        gradient[entry] = NAN if micro == bad else gradient[entry]
        tuner.model.backward(gradient)
    assert not tuner.clip_grad_norm_(1.0).isfinite()
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step()
    assert torch.equal(tuner.model.get_parameter("0"), start["0"])
    assert chosen(tuner) == {}


def test_a_damaged_whole_parameter_damages_the_update():
    """ID3 checklist 7 and 27: one NaN in a weight trained whole: nothing moves, nothing is chosen, the next update catches up."""
    tuner = attach(leaves((20,), (3,)), ID3(budget=4, steps=2, whole=("1",)))
    start, optimizer = weights(tuner.model), tuner.optimizer(adamw)
    tuner.model.backward(normal(20), torch.tensor([1.0, NAN, 1.0]))
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step()
    assert all(torch.equal(p, start[name]) for name, p in weights(tuner.model).items())
    optimizer.zero_grad()
    tuner.model.backward(normal(20), normal(3))
    optimizer.step()
    assert tuner.unmasking.chosen == 4
    assert bool((weights(tuner.model)["1"] != start["1"]).all())


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("accumulation", ["none", "exact", "lean"])
@pytest.mark.parametrize("skipped", [0, 3])
def test_a_skipped_update_leaves_no_trace(accumulation, set_to_none, skipped):
    """ID3 checklist 16: the mask, its state and t are those of a run without that backward; also before the first entry."""
    tuners = []
    for skips in (False, True):
        tuner = attach(leaves((20, 3), (30,)), ID3(budget=5, steps=6), updates=Updates(accumulation=accumulation))
        optimizer = tuner.optimizer(adamw)
        for step in range(6):
            if skips and step == skipped:
                before = tuner.state_dict()["slots"]
                tuner.model.backward(*(10 * g for g in gradients(tuner.model, 99)))
                after = tuner.state_dict()
                assert (tuner.step, tuner.unmasking.step, after["step"]) == (step,) * 3
                assert all(torch.equal(t, after["slots"][key]) for key, t in before.items())
                optimizer.zero_grad(set_to_none=set_to_none)
            tuner.model.backward(*gradients(tuner.model, step))
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
        tuners.append(tuner)
    assert chosen(tuners[0]) == chosen(tuners[1])
    assert_equal_weights(tuners[0].model, tuners[1].model)


def test_gradients_of_zero_are_no_skipped_update():
    """ID3 checklist 16 and 14: a second backward after a gradient that is truly 0 is still one."""
    tuner = attach(leaves((4,)), ID3(budget=2, steps=1))
    optimizer = tuner.optimizer(adamw)
    tuner.model.backward(normal(4))
    optimizer.step()
    optimizer.zero_grad()
    tuner.model.backward(torch.zeros(4))
    with pytest.raises(ValueError, match="a second backward"):
        tuner.model.backward(torch.ones(4))


@pytest.mark.parametrize(
    ("accumulation", "clip"),
    [("none", "selected"), ("none", "dense"), ("exact", "selected"), ("exact", "dense"), ("lean", "selected")],
)
def test_grad_scaler(accumulation, clip):
    """ID3 checklist 16: every overflow, of any entry, chosen or not, halves the scale; the rest is the run without a scaler."""
    updates = Updates(accumulation=accumulation, clip=clip)
    tuners = [attach(leaves((20, 3), (30,)), ID3(budget=12, steps=6), updates=updates) for _ in range(2)]
    optimizers = [tuner.optimizer(adamw) for tuner in tuners]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    for step in range(8):
        g = gradients(tuners[0].model, step)
        if step in (0, 1, 5):  # overflows before anything is chosen, and later
            scaler.scale(torch.ones(()))
            tuners[0].model.backward(g[0], torch.full((30,), float("inf")))
            before, scale = tuners[0].state_dict(), scaler.get_scale()
            scaler.step(optimizers[0])
            scaler.update()
            optimizers[0].zero_grad()
            after = tuners[0].state_dict()
            assert scaler.get_scale() == scale / 2
            assert (before["step"], tuners[0].unmasking.step) == (after["step"], after["step"])
            assert all(torch.equal(t, after["slots"][key]) for key, t in before["slots"].items())
        for _ in range(1 if accumulation == "none" else 2):
            tuners[0].model.backward(*(g_ * scaler.scale(torch.ones(())) for g_ in g))
            tuners[1].model.backward(*g)
        scaler.unscale_(optimizers[0])
        norms = [tuner.clip_grad_norm_(0.5) for tuner in tuners]
        torch.testing.assert_close(norms[0], norms[1], rtol=1e-6, atol=0)
        scaler.step(optimizers[0])
        scaler.update()
        optimizers[1].step()
        for optimizer in optimizers:
            optimizer.zero_grad()
        assert chosen(tuners[0]) == chosen(tuners[1])
    for name, parameter in weights(tuners[1].model).items():
        torch.testing.assert_close(weights(tuners[0].model)[name], parameter, rtol=0, atol=1e-6)


def test_a_masked_overflow_does_not_reach_the_dense_norm():
    """ID3 checklist 7 and 15: once all is chosen, the norm of the whole gradient still sees the masked ones."""
    tuner = attach(leaves((4,)), ID3(budget=1, steps=1), updates=Updates(clip="dense"))
    optimizer = tuner.optimizer(adamw)
    tuner.model.backward(normal(4))
    optimizer.step()
    optimizer.zero_grad()
    start = weights(tuner.model)
    masked = torch.full((4,), NAN)
    masked[chosen(tuner)["0"]] = 1.0
    tuner.model.backward(masked)
    tuner.clip_grad_norm_(1.0)
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step()
    assert torch.equal(weights(tuner.model)["0"], start["0"])


def go(tuner, optimizer, steps):
    for step in steps:
        loss(tuner.model, "gqa_llama", step).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("fields", "updates"),
    [
        ({"steps": 40, "budget": 403}, Updates()),
        ({"steps": 40, "budget": 403, "schedule": "cubic"}, Updates(bias_correction="per_entry", decay="start")),
        ({"mode": "repeat", "budget": 50}, Updates()),
    ],
)
def test_stop_at_17_of_40(fields, updates):
    """ID3 checklist 22: bf16, AdamW, through torch.save, on a fresh model: bit-equal to the run that went on."""
    build = lambda: attach(tiny.build("gqa_llama", dtype=torch.bfloat16), ID3(**fields), updates=updates)  # noqa: E731
    tuner = build()
    optimizer = tuner.optimizer(adamw)
    go(tuner, optimizer, range(17))
    file = io.BytesIO()
    torch.save({"tuner": tuner.state_dict(), "optimizer": optimizer.state_dict()}, file)
    go(tuner, optimizer, range(17, 40))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = build()
    again = resumed.optimizer(adamw)
    resumed.load_state_dict(saved["tuner"])
    again.load_state_dict(saved["optimizer"])
    assert (resumed.step, resumed.unmasking.step) == (17, 17)
    go(resumed, again, range(17, 40))
    assert resumed.selection == tuner.selection
    assert_equal_weights(resumed.model, tuner.model)
    assert all(torch.equal(t, resumed.state_dict()["slots"][key]) for key, t in tuner.state_dict()["slots"].items())


@pytest.mark.parametrize(
    ("change", "updates", "message"),
    [
        ({"budget": 9}, Updates(), "id3.budget"),
        ({"steps": 7}, Updates(), "id3.steps"),
        ({"exponent": 2}, Updates(), "id3.exponent"),
        ({"eps": 0.5}, Updates(), "id3.eps"),
        ({"schedule": "ramp"}, Updates(), "id3.schedule"),
        ({}, Updates(clip="dense"), "updates.clip"),
        ({"budget": 0.2}, Updates(), "id3.budget"),
    ],
)
def test_another_run_cannot_go_on(change, updates, message):
    """ID3 checklist 22: nothing is changed by the refusal."""
    tuner = attach(leaves((20,), (30,)), ID3(budget=10, steps=5))
    optimizer = tuner.optimizer(adamw)
    tuner.model.backward(*gradients(tuner.model, 0))
    optimizer.step()
    other = attach(leaves((20,), (30,)), ID3(**({"budget": 10, "steps": 5} | change)), updates=updates)
    start = weights(other.model)
    with pytest.raises(ValueError, match=f"resume: the checkpoint's {message} is .*, this run's"):
        other.load_state_dict(tuner.state_dict())
    assert other.step == other.unmasking.step == 0
    assert all(torch.equal(p, start[name]) for name, p in weights(other.model).items())


def test_rolling_back_drops_the_pending_choice():
    """A checkpoint that is loaded between backward and update is what goes on."""
    results, state = [], ({}, {})
    for rolls_back in (False, True):
        tuner = attach(leaves((20,), (30,)), ID3(budget=12, steps=4))
        optimizer = tuner.optimizer(adamw)
        for step in (0, 1, 99, 2, 3, 4) if rolls_back else range(5):
            tuner.model.backward(*gradients(tuner.model, step))
            if step == 2 and rolls_back:
                tuner.load_state_dict(state[0])
                optimizer.load_state_dict(state[1])
                assert tuner.unmasking.chosen == 6
                optimizer.zero_grad()
                tuner.model.backward(*gradients(tuner.model, step))
            optimizer.step()
            optimizer.zero_grad()
            if step == 1:
                state = copy.deepcopy((tuner.state_dict(), optimizer.state_dict()))
        results.append(tuner)
    assert chosen(results[0]) == chosen(results[1])
    assert_equal_weights(results[0].model, results[1].model)


def test_an_optimizer_that_does_not_follow_is_noticed():
    tuner = attach(leaves((20,)), ID3(budget=6, steps=3))
    optimizer = torch.optim.SGD(tuner.model.parameters(), lr=0.1)
    tuner.model.backward(normal(20))
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(ValueError, match="no optimizer follows this tuner"):
        tuner.model.backward(normal(20))


def test_other_exclusions_cannot_go_on():
    tuner = attach(leaves((50,)), ID3(budget=6, steps=3), exclude=Selection({"0": Elements((50,), torch.arange(0, 10))}))
    other = attach(leaves((50,)), ID3(budget=6, steps=3), exclude=Selection({"0": Elements((50,), torch.arange(10, 20))}))
    with pytest.raises(ValueError, match="exclude"):
        other.load_state_dict(tuner.state_dict())


def test_other_tensors_and_another_base_cannot_go_on():
    """ID3 checklist 22: a state of other tensors, or of other base values, is refused."""
    tuner = attach(leaves((20,), (30,)), ID3(budget=10, steps=2))
    optimizer = tuner.optimizer(adamw)
    tuner.model.backward(*gradients(tuner.model, 0))
    optimizer.step()
    state = tuner.state_dict()
    with pytest.raises(ValueError, match="the checkpoint's list of candidates"):
        attach(leaves((20,), (31,)), ID3(budget=10, steps=2)).load_state_dict(state)
    other = leaves((20,), (30,))
    with torch.no_grad():
        other.get_parameter("0").add_(1)
        other.get_parameter("1").add_(1)
    with pytest.raises(ValueError, match="was made on another base model"):
        attach(other, ID3(budget=10, steps=2)).load_state_dict(state)


def test_the_length_of_the_run_comes_from_the_checkpoint():
    """ID3 checklist 22: `steps` left out goes on with T of the checkpoint."""
    tuner = attach(leaves((20,)), ID3(budget=10, steps=5))
    optimizer = tuner.optimizer(adamw)
    tuner.model.backward(normal(20))
    optimizer.step()
    other = attach(leaves((20,)), ID3(budget=10))
    other.load_state_dict(tuner.state_dict() | {"method": ID3(budget=10, steps=5).to_dict()})
    assert other.method == ID3(budget=10, steps=5)
