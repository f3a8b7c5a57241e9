"""ID3 and its controls: what is granted when, what competes, what is refused."""

import json

import pytest
import torch

from intaglio import ID3, SNIP, Selection, StaticGradient, attach
from intaglio.core.entries import Elements, Slices, Whole
from intaglio.methods import build
from support.unmasking import Leaves, adamw, both, chosen, gradients, leaves, loss, normal, offsets, stable_top, weights

PAIRS = [(1000, 100), (1000, 300), (320, 300), (200, 300), (1, 300), (7, 3)]
UPDATE_COUNTS = {(1000, 100): 50_500, (1000, 300): 150_400}


def run(method, updates, model=None):
    """Entries trained after each of so many updates."""
    tuner = attach(model or leaves((40, 30)), method)
    optimizer = tuner.optimizer(torch.optim.SGD, lr=1e-3)
    counts = []
    for step in range(updates):
        tuner.model.backward(*gradients(tuner.model, step))
        optimizer.step()
        optimizer.zero_grad()
        counts.append(tuner.unmasking.chosen)
    return counts


@pytest.mark.parametrize(("budget", "steps"), PAIRS)
def test_the_budget_is_exact_at_every_update(budget, steps):
    """ID3 checklist 1 and 2: S(t) = floor(B · t / T), also for B < T, B mod T ≠ 0 and t > T."""
    counts = run(ID3(budget=budget, steps=steps), steps + 5)
    assert counts == [min(budget, budget * t // steps) for t in range(1, steps + 6)]
    assert sum(counts[:steps]) == UPDATE_COUNTS.get((budget, steps), sum(budget * t // steps for t in range(1, steps + 1)))


def test_front_schedule_counts_as_the_authors_code():
    """ID3 checklist 1 and 2: the remainder of B / T on the first updates: 160,500 scalar updates of B=1000, T=300."""
    counts = run(ID3(budget=1000, steps=300, schedule="front"), 305)
    assert [b - a for a, b in zip([0, *counts], counts, strict=False)] == [4] * 100 + [3] * 200 + [0] * 5
    assert sum(counts[:300]) == 160_500


@pytest.mark.parametrize("until", [1.0, 0.5, 0.3])
@pytest.mark.parametrize("schedule", ["linear", "ramp", "cubic"])
def test_schedules_end_where_they_say(schedule, until):
    """ID3 checklist 11: all is unmasked after the fraction `until` of the run, along the schedule's own curve."""
    counts = run(ID3(budget=101, steps=20, schedule=schedule, until=until), 22)
    assert counts == sorted(counts)
    end = round(20 * until)
    assert counts[end - 1 :] == [101] * (23 - end)
    assert counts[end - 2] < 101
    shape = {"linear": lambda x: x, "ramp": lambda x: x**2, "cubic": lambda x: 1 - (1 - x) ** 3}[schedule]
    assert all(abs(count - 101 * shape(t / end)) <= 1 for t, count in enumerate(counts[:end], 1))


@pytest.mark.parametrize(("until", "mass"), [(1.0, 0.333), (0.5, 0.583)])
def test_learning_rate_left_for_an_entry(until, mass):
    """ID3 checklist 11: mean share of static-S's learning rate that an entry gets under linear decay."""
    steps = budget = 2000
    method = ID3(budget=budget, steps=steps, until=until)
    rates = [1 - t / steps for t in range(steps)]
    got = sum(rate * method.granted(budget, t) for t, rate in enumerate(rates, 1)) / (budget * sum(rates))
    assert got == pytest.approx(mass, abs=1e-3)


def test_the_mask_only_grows_and_new_entries_move_at_once():
    """ID3 checklist 3: mask_t ⊂ mask_{t+1}, and an entry picked at t differs from the base after update t."""
    tuner = attach(leaves((20, 6), (9,)), ID3(budget=60, steps=12))
    start, optimizer = weights(tuner.model), tuner.optimizer(adamw)
    before = {}
    for step in range(12):
        tuner.model.backward(*gradients(tuner.model, step))
        optimizer.step()
        optimizer.zero_grad()
        now = chosen(tuner)
        assert all(set(before[name]) <= set(now[name]) for name in before)
        moved = {name: (p.flatten() != start[name].flatten()).nonzero().flatten() for name, p in weights(tuner.model).items()}
        assert {name: at.tolist() for name, at in moved.items() if at.numel()} == now
        before = now


@pytest.mark.parametrize(
    ("rows", "budget", "want"),
    [
        ([[1, 1, 1], [5, 6]], 3, {"0": [0], "1": [0, 1]}),
        ([[10, 1, 1, 1]], 2, {"0": [0, 1]}),
        ([[1] * 5] * 4, 10, {"0": [0, 1, 2, 3, 4], "1": [0, 1, 2, 3, 4]}),
    ],
)
def test_known_ties(rows, budget, want):
    """ID3 checklist 4: score, then order of tensors, then offset; never more than granted."""
    tuner = attach(Leaves(*(torch.ones(len(row)) for row in rows)), ID3(budget=budget, steps=1))
    tuner.model.backward(*(torch.tensor(row, dtype=torch.float32) for row in rows))
    assert chosen(tuner) == want


def test_static_modes_are_the_static_methods():
    """ID3 checklist 31: ID3 static at exponent 0 is StaticGradient, at −1 with eps 0 SNIP; each is a plain sort at update 1."""
    grads = [gradients(leaves((30, 8), (17,)), seed) for seed in (1, 2, 3)]

    def go(method):
        tuner = attach(leaves((30, 8), (17,)), method)
        optimizer, picks = tuner.optimizer(adamw), []
        for gradient in grads:
            tuner.model.backward(*gradient)
            optimizer.step()
            optimizer.zero_grad()
            picks.append(offsets(tuner.selection))
        assert picks[0] == picks[1] == picks[2]
        return picks[0], weights(tuner.model)

    base = weights(leaves((30, 8), (17,)))
    for methods, score in [
        ((ID3(budget=25, mode="static", exponent=0), StaticGradient(budget=25)), lambda w, g: g.abs()),
        ((ID3(budget=25, mode="static", exponent=-1, eps=0), SNIP(budget=25)), lambda w, g: (g * w).abs()),
    ]:
        (picks, left), (same, right) = (go(method) for method in methods)
        want = stable_top({name: score(w, g) for (name, w), g in zip(base.items(), grads[0], strict=True)}, 25)
        assert picks == same == want
        assert all(torch.equal(left[name], right[name]) for name in base)


def test_repeat_chooses_anew_and_reports_every_entry_touched():
    """ID3 checklist 31: repeat-S against the dense twin: entries that leave keep their value, and start anew if they return."""
    tuner, optimizer, dense = both("gqa_llama", ID3(budget=300, mode="repeat"))
    last, touched, returned = Selection(), Selection(), 0
    for step in range(8):
        for model, update in ((tuner.model, optimizer.step), (dense.model, dense.update)):
            loss(model, "gqa_llama", step).backward()
            update()
        optimizer.zero_grad()
        assert chosen(tuner) == offsets(dense.selection)
        assert dense.selection.size == 300
        returned += dense.selection.overlap(touched.difference(last))
        last, touched = dense.selection, touched.union(dense.selection)
    assert returned > 0
    assert tuner.selection == touched
    assert tuner.selection.size > 300
    assert all(torch.equal(p, weights(tuner.model)[name]) for name, p in weights(dense.model).items())


def test_include_exclude_frozen_and_unused_tensors():
    """ID3 checklist 25: what is no candidate keeps every bit, what has no gradient is merely not chosen."""
    model = leaves((6, 5), (7,), (8,), (9,))
    model.get_parameter("1").requires_grad_(False)
    start = weights(model)
    tuner = attach(model, ID3(budget=0.5, steps=2, exclude=("2",)))
    assert tuner.unmasking.candidates.budgets == [20]  # half of 30 + 9, rounded up
    optimizer = tuner.optimizer(adamw)
    for seed in range(2):
        model.backward(normal(6, 5, seed=seed), None, None, None)
        optimizer.step()
        optimizer.zero_grad()
    assert set(chosen(tuner)) == {"0"}
    assert tuner.unmasking.chosen == 20
    assert all(torch.equal(p, start[name]) for name, p in weights(model).items() if name != "0")
    only = attach(leaves((3, 3), (4,)), ID3(budget=2, steps=1, include=("1",)))
    assert [slot.name for slot in only.slots] == ["1"]


def test_candidates_that_never_get_a_gradient_do_not_stop_the_run():
    """ID3 checklist 25 and 16: a run that cannot spend its budget says so by what it reports."""
    tuner = attach(leaves((3,), (4,)), ID3(budget=7, steps=1))
    tuner.model.backward(torch.ones(3), None)
    assert chosen(tuner) == {"0": [0, 1, 2]}
    assert tuner.unmasking.chosen == 3 < tuner.unmasking.candidates.budgets[0]


def test_excluded_entries_are_never_chosen_even_at_the_full_budget():
    """ID3 checklist 25 and 32: B = all that is left ends with just that unmasked."""
    barred = Selection({"0": Whole((3,))})
    tuner = attach(leaves((3,), (9,)), ID3(budget=9, steps=4), exclude=barred)
    optimizer = tuner.optimizer(adamw)
    for step in range(4):
        tuner.model.backward(*gradients(tuner.model, step))
        optimizer.step()
        optimizer.zero_grad()
    assert tuner.selection == Selection({"1": Whole((9,))})


def test_whole_parameters_stand_outside_the_budget():
    """ID3 checklist 27: trained from update 1, reported with the chosen, and all of the rest may be the budget."""
    model = leaves((4, 5), (6,))
    start = weights(model)
    tuner = attach(model, ID3(budget=20, steps=4, whole=("1",)))
    assert tuner.unmasking.candidates.budgets == [20]
    optimizer = tuner.optimizer(adamw)
    for step in range(4):
        model.backward(*gradients(model, step))
        optimizer.step()
        optimizer.zero_grad()
        assert bool((model.get_parameter("1") != start["1"]).all())
        assert tuner.unmasking.chosen == 5 * (step + 1)
        assert tuner.selection.size == 5 * (step + 1) + 6
    with pytest.raises(ValueError, match=r"budget=21: a count must lie between 1 and the 20 candidates"):
        attach(leaves((4, 5), (6,)), ID3(budget=21, whole=("1",)))


def test_pools_share_the_budget_by_size():
    """ID3 checklist 28: B of a LoRA starts at zero, so at the first update A has no gradient; pools keep its part for it."""
    shares = {}
    for pools in ((), ("0", "1")):
        model = Leaves(normal(30), torch.zeros(10))
        tuner = attach(model, ID3(budget=8, steps=2, eps=1e-3, pools=pools))
        optimizer = tuner.optimizer(adamw)
        for a in (torch.zeros(30), normal(30)):
            model.backward(a, normal(10, seed=1))
            optimizer.step()
            optimizer.zero_grad()
        shares[pools] = {name: len(at) for name, at in chosen(tuner).items()}
    assert shares[()] == {"1": 8}
    assert shares[("0", "1")] == {"0": 6, "1": 2}


def test_eps_of_the_score_and_of_adam_are_separate():
    """ID3 checklist 29: the score's eps is a field of the method, Adam's an option of the optimizer."""
    tuner, optimizer, dense = both("gqa_llama", ID3(budget=50, steps=2, eps=0.5), make=lambda p: adamw(p, eps=0.25))
    for step in range(2):
        for model, update in ((tuner.model, optimizer.step), (dense.model, dense.update)):
            loss(model, "gqa_llama", step).backward()
            update()
        optimizer.zero_grad()
    assert (tuner.method.to_dict()["eps"], optimizer.param_groups[0]["eps"]) == (0.5, 0.25)
    assert all(torch.equal(p, weights(tuner.model)[name]) for name, p in weights(dense.model).items())
    method = ID3(budget=7, pools=("a", "b"), eps=0.5)
    assert build(json.loads(json.dumps(method.to_dict()))) == method


def test_budgets_outside_the_model_are_refused_before_training():
    """ID3 checklist 32: B up to all candidates; a budget or pool beyond them is refused at attach."""
    size = leaves((4, 5)).leaves[0].numel()
    assert run(ID3(budget=size, steps=3), 3, leaves((4, 5)))[-1] == size
    for budget, message in [(size + 1, "between 1 and the 20 candidates"), (0.001, "rounds to nothing")]:
        with pytest.raises(ValueError, match=message):
            attach(leaves((4, 5)), ID3(budget=budget))
    with pytest.raises(ValueError, match=r"pools=\('1', '9'\): 0 is in none of them"):
        attach(leaves((4,), (5,)), ID3(budget=2, pools=("1", "9")))
    with pytest.raises(ValueError, match="matches no parameter"):
        attach(leaves((4,)), ID3(budget=2, whole=("head*",)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"budget": 0}, "budget=0: a count of entries must be at least 1"),
        ({"budget": -5}, "budget=-5"),
        ({"budget": True}, "budget=True"),
        ({"steps": 0}, "steps=0: give a number of updates"),
        ({"steps": -1}, "steps=-1"),
        ({"steps": 2.5}, "steps=2.5"),
        ({"exponent": float("nan")}, "exponent=nan: give a finite number"),
        ({"exponent": float("inf")}, "exponent=inf"),
        ({"eps": -1e-3}, "eps=-0.001: give a finite number of at least 0"),
        ({"until": 0}, "until=0: give a fraction"),
        ({"until": 1.5}, "until=1.5"),
        ({"schedule": "fast"}, "schedule='fast': known are linear, ramp, cubic, front"),
        ({"mode": "random"}, "mode='random': known are increment, static, repeat"),
        ({"mode": "static", "until": 0.5}, "leave schedule and until"),
        ({"schedule": "front", "until": 0.5}, "schedule='front' has no `until`"),
        ({"whole": "head*"}, r"whole='head\*': give a tuple"),
        ({"budget": 0, "steps": 0, "eps": -1}, r"budget=0.*steps=0.*eps=-1"),
    ],
)
def test_bad_fields_are_refused_together(fields, message):
    """ID3 checklist 32: B, T and every other field, before a model is seen; all mistakes in one message."""
    with pytest.raises(ValueError, match=message):
        ID3(**fields)


def test_the_length_of_the_run_must_be_known():
    """ID3 checklist 1: T is never guessed, and cannot change."""
    tuner = attach(leaves((4, 5)), ID3(budget=5))
    tuner.optimizer(torch.optim.SGD, lr=1.0)
    with pytest.raises(ValueError, match=r"ID3.steps=None: give the number of updates"):
        tuner.model.backward(normal(4, 5))
    tuner.unmasking.expect(steps=5)
    tuner.model.backward(normal(4, 5))
    with pytest.raises(ValueError, match=r"ID3.steps=5: this run makes 6 updates"):
        tuner.unmasking.expect(steps=6)


def test_a_quantized_base_is_refused():
    """ID3 checklist 35: by the weight's name and type, with what to do instead."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[1].weight = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"1.*: quantized \(.*single entries need a floating-point base"):
        attach(model, ID3(budget=2))


def test_a_parameter_is_trained_whole_or_excluded():
    with pytest.raises(ValueError, match=r"ID3: 1 matches whole and exclude: it is trained, or it is frozen"):
        attach(leaves((3, 4), (5,)), ID3(budget=2, steps=2, whole=("1",), exclude=("1",)))


def test_a_share_is_of_what_is_not_excluded():
    """The plain twin too: 24 candidates, 8 of them another adapter's; half of 16."""
    model, other = (
        leaves((4, 6)),
        Selection({"0": Slices((4, 6), 0, torch.tensor([0]))}).union({"0": Elements((4, 6), torch.tensor([7, 9]))}),
    )
    model.backward(normal(4, 6, seed=3))
    chosen = ID3(budget=0.5, mode="static").choose_next(model, Selection(), 1, other)
    assert chosen.size == 8
    assert chosen.overlap(other) == 0
