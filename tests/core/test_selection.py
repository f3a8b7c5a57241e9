import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from intaglio.core.algebra import within
from intaglio.core.budget import resolve_budget, top_k
from intaglio.core.entries import Elements, Slices, Whole, check_index
from intaglio.core.selection import Selection


def oracle(scores, k):
    """Stable argsort over everything at once."""
    flat = torch.cat([s.flatten() for s in scores.values()])
    chosen = torch.sort(flat, descending=True, stable=True).indices[:k].sort().values
    result, start = {}, 0
    for name, s in scores.items():
        inside = chosen[(chosen >= start) & (chosen < start + s.numel())] - start
        if inside.numel():
            result[name] = inside.tolist()
        start += s.numel()
    return result


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=9), min_size=1, max_size=5), st.data())
@settings(max_examples=200, deadline=None)
def test_top_k_equals_stable_sort_under_ties(rows, data):
    scores = {f"t{i}": torch.tensor(row, dtype=torch.float32) for i, row in enumerate(rows)}
    k = data.draw(st.integers(1, sum(map(len, rows))))
    chosen = top_k(iter(scores.items()), k)
    assert {name: entries.flat().tolist() for name, entries in chosen.items()} == oracle(scores, k)
    assert chosen.size == k


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_top_k_large_and_low_precision(dtype):
    torch.manual_seed(0)
    scores = {name: torch.randn(40, 50).to(dtype) for name in "abc"}
    for k in (1, 777, 5999, 6000):
        chosen = top_k(scores.items(), k)
        assert {n: e.flat().tolist() for n, e in chosen.items()} == oracle(scores, k)


def test_top_k_known_ties():
    """The three tie cases that the authors' ID3 code gets wrong."""
    ones = torch.ones(3)
    assert top_k({"a": ones, "b": torch.tensor([5.0, 6.0])}.items(), 3) == Selection(
        {"a": Elements((3,), torch.tensor([0])), "b": Whole((2,))}
    )
    assert top_k({"a": torch.tensor([10.0, 1, 1, 1])}.items(), 2)["a"].flat().tolist() == [0, 1]
    assert top_k({n: torch.ones(5) for n in "abcd"}.items(), 10) == Selection({"a": Whole((5,)), "b": Whole((5,))})


@pytest.mark.parametrize(
    ("scores", "k", "message"), [([1.0], 2, "more than"), ([1.0], 0, "at least"), ([float("nan")], 1, "NaN")]
)
def test_top_k_refuses(scores, k, message):
    with pytest.raises(ValueError, match=message):
        top_k({"a": torch.tensor(scores)}.items(), k)


ENTRIES = [
    Whole((3, 4)),
    Slices((3, 4), 0, torch.tensor([0, 2])),
    Slices((3, 4), 1, torch.tensor([1])),
    Slices((2, 3, 4), 1, torch.tensor([0, 2])),
    Elements((3, 4), torch.tensor([0, 5, 11])),
    Elements((), torch.tensor([0])),
    Whole(()),
    Elements((2, 2, 2, 2, 2), torch.tensor([1, 31])),
]


@pytest.mark.parametrize("entries", ENTRIES, ids=repr)
@pytest.mark.parametrize("contiguous", [True, False])
def test_gather_scatter_flat_agree(entries, contiguous):
    base = torch.arange(entries.numel, dtype=torch.float32).reshape(entries.shape)
    if not contiguous and base.dim() == 2:
        base = base.t().contiguous().t()
    values = entries.gather(base)
    assert tuple(values.shape) == entries.values_shape
    assert entries.count == values.numel() == entries.flat().numel()
    assert sorted(values.flatten().tolist()) == entries.flat().tolist()
    target = torch.full_like(base, -1.0)
    entries.scatter_(target, values)
    assert torch.equal(target == base, target != -1)
    assert torch.equal(entries.gather(target), values)
    assert int((target != -1).sum()) == entries.count


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_set_operations_equal_sets_of_offsets(data):
    def entries():
        kind = data.draw(st.sampled_from(["whole", "rows", "columns", "elements"]))
        if kind == "whole":
            return Whole((4, 5))
        size = {"rows": 4, "columns": 5, "elements": 20}[kind]
        index = torch.tensor(sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1))))
        return Elements((4, 5), index) if kind == "elements" else Slices((4, 5), int(kind == "columns"), index)

    a, b = Selection({"w": entries(), "x": Whole((2,))}), Selection({"w": entries()})
    flat_a, flat_b = set(a["w"].flat().tolist()), set(b["w"].flat().tolist())
    assert set(a.union(b)["w"].flat().tolist()) == flat_a | flat_b
    left = a.difference(b).get("w")
    assert (set() if left is None else set(left.flat().tolist())) == flat_a - flat_b
    assert a.overlap(b) == b.overlap(a) == len(flat_a & flat_b)
    assert a.size == len(flat_a) + 2


def test_slices_stay_slices_in_set_operations():
    a = Selection({"w": Slices((3, 4), 1, torch.tensor([0, 2]))})
    b = Selection({"w": Slices((3, 4), 1, torch.tensor([2, 3]))})
    assert isinstance(a.union(b)["w"], Slices)
    assert isinstance(a.difference(b)["w"], Slices)
    assert a == Selection({"w": Elements((3, 4), a["w"].flat())})


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (torch.tensor([0, 4]), r"\[0, 4\)"),
        (torch.tensor([-1, 2]), r"\[0, 4\)"),
        (torch.tensor([1, 1]), "duplicates"),
        (torch.tensor([2, 1]), "sorted"),
        (torch.tensor([0, 1], dtype=torch.int32), "int64"),
        (torch.tensor([[0]]), "1-D"),
        (torch.tensor([], dtype=torch.int64), "at least one"),
    ],
)
def test_bad_index(index, message):
    with pytest.raises(ValueError, match=message):
        check_index(index, 4)


def test_resolve_budget():
    assert resolve_budget(5, 10) == 5
    assert resolve_budget(1.0, 10) == 10
    assert resolve_budget(0.25, 10) == 3
    assert all(resolve_budget(share, 1000) == math.floor(share * 1000 + 0.5) for share in (0.001, 0.0126, 0.5, 0.9999))
    for bad in (0, 11, -1, 0.0, 1.5, -0.1, True, "1", float("nan")):
        with pytest.raises(ValueError, match="budget"):
            resolve_budget(bad, 10)
    with pytest.raises(ValueError, match="rounds to nothing"):
        resolve_budget(0.01, 10)


PAIRS = [(a, b) for a in ENTRIES for b in ENTRIES if a.shape == b.shape]


@pytest.mark.parametrize(("a", "b"), PAIRS, ids=repr)
def test_intersection_is_what_both_have(a, b):
    both = Selection({"w": a, "x": a}).intersection({"w": b})
    expected = sorted(set(a.flat().tolist()) & set(b.flat().tolist()))
    assert (both["w"].flat().tolist() if both else []) == expected


@pytest.mark.parametrize(("a", "b"), PAIRS, ids=repr)
def test_a_part_is_found_within_the_compact_values_of_the_whole(a, b):
    tensor = torch.randn(a.shape)
    both = Selection({"w": a}).union({"w": b})["w"]
    compact = both.gather(tensor)
    for part in (a, b):
        inside = within(both, part)
        assert torch.equal(inside.gather(compact).reshape(part.values_shape), part.gather(tensor))


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_copying_runs_equals_going_through_the_index(data):
    size, dim = 400, data.draw(st.integers(0, 1))
    starts = data.draw(st.lists(st.integers(0, size - 60), min_size=1, max_size=4))
    chosen = {position for start in starts for position in range(start, start + data.draw(st.integers(1, 60)))}
    index = torch.tensor(sorted(chosen))
    shape = (size, 3) if dim == 0 else (3, size)
    entries, weight = Slices(shape, dim, index), torch.randn(shape)
    values = torch.randn(entries.values_shape)
    if entries.runs is not None:
        positions = [position for start, length in entries.runs for position in range(start, start + length)]
        assert positions == index.tolist()
    assert torch.equal(entries.gather(weight), weight.index_select(dim, index))
    expected = weight.clone().index_copy_(dim, index, values)
    entries.scatter_(weight, values.double())
    assert torch.equal(weight, expected)
