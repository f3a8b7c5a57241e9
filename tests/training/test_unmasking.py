"""The engine against two oracles: its dense twin, and a plain stable sort."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from intaglio import ID3, SNIP, StaticGradient, attach
from intaglio.core.budget import TopK
from intaglio.training import candidates as scanning
from support import tiny
from support.unmasking import (
    Leaves,
    adamw,
    assert_equal_weights,
    both,
    chosen,
    gradients,
    leaves,
    loss,
    normal,
    offsets,
    stable_top,
    weights,
)

RUNS = [
    ("gqa_llama", {"budget": 1037, "steps": 40, "exponent": 0, "eps": 1e-3}, 45),
    ("gqa_llama", {"budget": 1037, "steps": 10, "exponent": 1, "eps": 1}, 12),
    ("gqa_llama", {"budget": 1037, "steps": 10, "exponent": 2, "eps": 0.1, "schedule": "cubic"}, 10),
    ("gqa_llama", {"budget": 1037, "steps": 10, "exponent": -1, "eps": 1}, 10),
    ("gqa_llama", {"budget": 1037, "steps": 10, "exponent": 1, "eps": 1e-8}, 10),
    ("tied_llama", {"budget": 313, "steps": 6}, 6),
    ("transposed_gpt2", {"budget": 313, "steps": 6, "until": 0.5}, 6),
    ("mixtral", {"budget": 313, "steps": 6}, 6),
    ("deberta_v2", {"budget": 313, "steps": 6, "pools": ("*.weight", "*")}, 6),
]


@pytest.mark.parametrize(("name", "fields", "updates"), RUNS, ids=[f"{name}-{i}" for i, (name, *_) in enumerate(RUNS)])
def test_bit_equal_to_both_oracles(name, fields, updates):
    """ID3 checklist 4, 26 and 31; section 6.1: masks equal a stable sort, weights the dense twin's, weight decay 0.1."""
    method = ID3(**fields)
    tuner, optimizer, dense = both(name, method)
    for step in range(updates):
        loss(tuner.model, name, step).backward()
        loss(dense.model, name, step).backward()
        graded = {n: p for n, p in dense.model.named_parameters() if p.grad is not None}
        scores = {n: p.grad.abs() / (p.detach().abs() + method.eps) ** method.exponent for n, p in graded.items()}
        before = offsets(dense.selection)
        optimizer.step()
        optimizer.zero_grad()
        dense.update()
        assert chosen(tuner) == offsets(dense.selection)
        granted = [method.granted(b, step + 1) - method.granted(b, step) for b in tuner.unmasking.candidates.budgets]
        if not method.pools and granted[0] and method.exponent in (0, 1):  # whose plain formula rounds like ours
            new = stable_top(scores, granted[0], before)
            assert {n: sorted(before.get(n, []) + new.get(n, [])) for n in scores if n in before or n in new} == chosen(tuner)
    assert tuner.unmasking.chosen == fields["budget"]
    assert_equal_weights(tuner.model, dense.model)


def test_bf16_is_scored_and_trained_in_fp32():
    """ID3 checklist 6 and 21: the dense twin holds fp32 copies of all weights."""
    tuner, optimizer, dense = both("gqa_llama", ID3(budget=400, steps=8), dtype=torch.bfloat16)
    for step in range(10):
        loss(tuner.model, "gqa_llama", step).backward()
        loss(dense.model, "gqa_llama", step).backward()
        scores = {n: p.grad.float().abs() / (p.detach().float().abs() + 1) for n, p in dense.model.named_parameters()}
        before = offsets(dense.selection)
        optimizer.step()
        optimizer.zero_grad()
        dense.update()
        if step < 8:
            new = stable_top(scores, 50, before)
            assert {n: sorted(before.get(n, []) + new.get(n, [])) for n in {**before, **new}} == chosen(tuner)
    assert_equal_weights(tuner.model, dense.model)


# Few distinct values, so that most scores tie; with ends at which fp16, fp32 and fp64 round, under- and overflow.
NUMBERS = st.sampled_from([0.0, 1.0, -1.0, 0.5, 2.0, 1e-7, -6e4, 0.99999999999, 1e-39, 1e-44, 1e-300, 3e38])
METHODS = [
    ID3(budget=1, exponent=exponent, eps=eps)
    for exponent, eps in [
        (1, 1.0),
        (0, 0.0),
        (2, 0.1),
        (5, 1e-8),
        (1, 1e-8),
        (-1, 0.0),
        (-2, 0.5),
        (100, 1e-8),
        (400, 10),
        (2, 1e3),
    ]
] + [StaticGradient(budget=1), SNIP(budget=1)]


@given(
    st.lists(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=40), min_size=1, max_size=5),
    st.sampled_from(METHODS),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    st.sampled_from([(8, 2), (16, 16), (1 << 20, 1 << 10)]),
    st.data(),
)
@settings(max_examples=300, deadline=None)
def test_any_order_and_any_chunk_give_a_stable_sort(rows, method, dtype, sizes, data):
    """ID3 checklist 4, 6 and 20: heavy ties, hooks in any order, chunks of any size, barred entries."""
    tensors = [torch.tensor(row, dtype=torch.float64).clamp(-6e4, 6e4).to(dtype) for row in rows]
    barred = [[i for i in range(len(row)) if data.draw(st.integers(0, 3)) == 0] for row in rows]
    free = sum(len(row) - len(out) for row, out in zip(rows, barred, strict=True))
    best = TopK(data.draw(st.integers(1, free + 1)))
    chunk, block = scanning.CHUNK, scanning.BLOCK
    scanning.CHUNK, scanning.BLOCK = sizes
    try:
        for rank in data.draw(st.permutations(range(len(rows)))):
            weight, gradient = tensors[rank][:, 0].clone(), tensors[rank][:, 1].clone()
            assert scanning.scan(gradient, weight, method, best, rank, [torch.tensor(barred[rank], dtype=torch.int64)])
    finally:
        scanning.CHUNK, scanning.BLOCK = chunk, block
    scores = {str(rank): method.score(t[:, 0], t[:, 1]) for rank, t in enumerate(tensors)}
    want = stable_top(scores, min(best.k, free), {str(rank): out for rank, out in enumerate(barred)})
    found: dict[str, list[int]] = {}
    ranks, at, payloads = best.winners()
    for rank, offset, payload in zip(ranks.tolist(), at.tolist(), payloads, strict=True):
        found.setdefault(str(rank), []).append(offset)
        assert payload == tensors[rank][offset, 1]
    assert {name: sorted(offset) for name, offset in found.items()} == want


@pytest.mark.parametrize(
    ("method", "first", "second"),
    [
        (StaticGradient(budget=1), 1 - 1e-12, 1.0),  # fp64 that rounds up to the other's score
        (ID3(budget=1, exponent=5, eps=1e-8), 1.0, 2.0),  # both infinite
        (ID3(budget=1, exponent=2, eps=10), 8e-44, 1.4e-43),  # both the smallest number above 0
        (ID3(budget=1, exponent=800, eps=0.9), 1.0, 1.0),  # eps rounds down in fp32, and 800-fold so its power
        (ID3(budget=1, exponent=400, eps=10), 1.0, 2.0),  # a power beyond fp64; both 0
    ],
)
def test_the_bound_on_gradients_loses_no_tie(method, first, second):
    """ID3 checklist 4: the tensor that is looked at last comes first in the order, and ties."""
    best = TopK(1)
    for rank, value in ((1, second), (0, first)):
        scanning.scan(torch.tensor([value], dtype=torch.float64), torch.zeros(1, dtype=torch.float64), method, best, rank, [])
    assert best.winners()[0].tolist() == [0]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), min_size=1, max_size=60, unique=True), st.data())
@settings(max_examples=200, deadline=None)
def test_top_k_of_parts_in_any_order(places, data):
    """ID3 checklist 4, 5 and 20: parts of tensors beyond 2^32 entries, in any order, one score for almost all."""
    beyond = 2**32 - 5
    scored = {(rank, beyond + offset): float(data.draw(st.integers(0, 1))) for rank, offset in places}
    best = TopK(data.draw(st.integers(1, len(places))))
    for place in data.draw(st.permutations(sorted(scored))):
        best.add(place[0], torch.tensor([scored[place]]), torch.tensor([place[1]]), torch.tensor([float(place[1] - beyond)]))
    ranks, at, payloads = best.winners()
    want = sorted(scored, key=lambda place: (-scored[place], place))[: best.k]
    assert list(zip(ranks.tolist(), at.tolist(), strict=True)) == want
    assert payloads.tolist() == [offset - beyond for _, offset in want]


def test_offsets_are_wide_where_a_parameter_needs_it():
    """ID3 checklist 5: 4 bytes per offset, 8 beyond 2^31 entries (on the meta device, which holds none)."""
    from intaglio.training.growing_slot import GrowingSlot

    narrow, wide = (GrowingSlot("w", nn.Parameter(torch.empty(n, device="meta"))) for n in (2**31 - 1, 2**31))
    assert (narrow.held.index.dtype, wide.held.index.dtype) == (torch.int32, torch.int64)


def test_zero_weight_and_zero_gradient_in_fp16_come_last():
    """ID3 checklist 6: 0/0 is no reason to be chosen."""
    weight = torch.cat([torch.zeros(50), normal(50)]).half()
    gradient = torch.cat([torch.zeros(50), normal(50, seed=1)]).half()
    tuner = attach(Leaves(weight), ID3(budget=50, steps=1, eps=1e-8))
    tuner.model.backward(gradient)
    assert chosen(tuner) == {"0": list(range(50, 100))}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("update", "entry"), [(0, 0), (3, 0), (3, 19)], ids=["first", "chosen", "unchosen"])
def test_a_gradient_that_is_not_finite_changes_nothing(value, update, entry):
    """ID3 checklist 7: weights stay finite, nothing is chosen, and the next update catches up."""
    tuner = attach(leaves((20,), (30,)), ID3(budget=24, steps=8, exponent=0))
    optimizer = tuner.optimizer(adamw)
    for step in range(8):
        g = [normal(20, seed=step), normal(30, seed=100 + step)]
        g[0][0], g[0][19] = 100, 0
        before = weights(tuner.model), chosen(tuner)
        if step != update:
            tuner.model.backward(*g)
            optimizer.step()
            assert tuner.unmasking.chosen == 3 * (step + 1)
        else:
            g[0][entry] = value
            tuner.model.backward(*g)
            with pytest.warns(UserWarning, match=f"update {step + 1}: a gradient is not finite; nothing changes"):
                optimizer.step()
            assert chosen(tuner) == before[1]
            assert all(torch.equal(p, before[0][name]) for name, p in weights(tuner.model).items())
        optimizer.zero_grad()
    assert all(bool(p.isfinite().all()) for p in tuner.model.parameters())


def test_whole_gradients_never_coexist():
    """ID3 checklist 12: before each hook of ours at most one gradient is alive, after backward none."""
    model = tiny.build("gqa_llama")
    alive, most = [], 0

    def look(parameter):
        nonlocal most
        alive.append(StorageWeakRef(parameter.grad.untyped_storage()))
        most = max(most, sum(not ref.expired() for ref in alive))

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(look)
    tuner = attach(model, ID3(budget=500, steps=5))
    optimizer = tuner.optimizer(adamw)
    for step in range(5):
        loss(model, "gqa_llama", step).backward()
        assert all(slot.target.grad is None for slot in tuner.slots)
        optimizer.step()
        optimizer.zero_grad()
    assert len(alive) == 5 * len(weights(model))
    assert most == 1
    assert all(ref.expired() for ref in alive)


def test_two_runs_are_the_same_bit_for_bit():
    """ID3 checklist 20: heavy ties, whatever the global random state: candidates are sorted by their full key (on a CPU)."""
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        tuner = attach(leaves((700, 3), (900,)), ID3(budget=301, steps=7, exponent=0))
        optimizer = tuner.optimizer(adamw)
        for step in range(7):
            tuner.model.backward(*(g.round() for g in gradients(tuner.model, step)))
            optimizer.step()
            optimizer.zero_grad()
        results.append((tuner.model, [slot.held.index for slot in tuner.unmasking.slots.values()]))
    assert_equal_weights(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))
