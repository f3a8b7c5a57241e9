"""Combining adapters: exact where nothing overlaps, the formula where it does, and a Delta like any other."""

import pytest
import torch
from torch import nn

from intaglio import S2FT, Delta, Random, attach, fuse
from intaglio.adapter.folder import read_config
from intaglio.core.entries import Elements, Slices, Whole
from intaglio.core.fingerprint import fingerprint
from intaglio.core.selection import Selection
from support import tiny

SHAPE = (5, 8)
KINDS = {
    "whole": Whole(SHAPE),
    "rows": Slices(SHAPE, 0, torch.tensor([0, 3])),
    "columns": Slices(SHAPE, 1, torch.tensor([1, 2, 6])),
    "other columns": Slices(SHAPE, 1, torch.tensor([2, 7])),
    "elements": Elements(SHAPE, torch.tensor([0, 9, 10, 26, 39])),
}


def one_weight(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    model = nn.Module()
    model.weight = nn.Parameter(torch.randn(SHAPE).to(dtype))
    return model


def delta_at(model, entries, seed, base=None):
    """An adapter with values of any size at the entries of `model.weight`."""
    old = entries.gather(model.weight)
    values = torch.randn(old.shape, generator=torch.Generator().manual_seed(seed)).to(old.dtype)
    return Delta(Selection({"weight": entries}), {"weight": values}, {"weight": fingerprint(old)}, base=base)


def adapter(name="gqa_llama", method=None, exclude=None, dtype=torch.bfloat16, shift=0.25):
    """An adapter of a tiny model, away from the base by a step that its type shows, another at each entry."""
    tuner = attach(tiny.build(name, dtype=dtype), method or S2FT(o=0.25, down=0.25), exclude=exclude, base="someone/base")
    with torch.no_grad():
        for slot in tuner.slots:
            slot.values.add_(torch.linspace(shift, 2 * shift, slot.values.numel()).view_as(slot.values))
    tuner.slots.write()
    return tuner.delta()


def oracle(model, deltas, weights):
    """The formula, entry by entry in fp64, over a dense copy."""
    base = model.weight.detach().double()
    dense = base.clone()
    for delta, weight in zip(deltas, weights, strict=True):
        entries = delta.selection["weight"]
        changed = torch.zeros_like(base)
        entries.scatter_(changed, delta.values["weight"].double() - entries.gather(base))
        dense += weight * changed
    return dense


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("first", KINDS)
@pytest.mark.parametrize("second", KINDS)
@pytest.mark.filterwarnings("ignore:these adapters overlap")
def test_any_two_kinds_follow_the_formula(first, second, dtype):
    model = one_weight(dtype)
    deltas = [delta_at(model, KINDS[kind], seed) for seed, kind in enumerate((first, second))]
    fused = fuse(deltas, [0.75, -1.5], base=model)
    expected = oracle(model, deltas, [0.75, -1.5])
    fused.apply_(model)
    torch.testing.assert_close(model.weight.detach().double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-7)
    kept = torch.ones(SHAPE, dtype=torch.bool)
    kept.view(-1)[fused.selection["weight"].flat()] = False
    assert torch.equal(model.weight[kept], one_weight(dtype).weight[kept])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_disjoint_adapters_at_weight_one_are_both_exactly(dtype, recwarn):
    first = adapter(dtype=dtype)
    second = adapter(dtype=dtype, method=Random(0.1, seed=3), exclude=first.selection, shift=1e-3)
    model = tiny.build("gqa_llama", dtype=dtype)
    fused = fuse([first, second], base=model)
    assert not recwarn
    assert fused.selection.size == first.selection.size + second.selection.size
    fused.apply_(model)
    for delta in (first, second):
        for name, entries in delta.selection.items():
            assert torch.equal(entries.gather(model.get_parameter(name)), delta.values[name])
    both = tiny.build("gqa_llama", dtype=dtype)
    first.apply_(both)
    second.apply_(both)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), both.parameters(), strict=True))


def test_values_far_from_the_base_keep_every_bit():
    """Where base + (value − base) would round: the value is far smaller or larger than the base."""
    model = one_weight()
    entries = KINDS["elements"]
    values = torch.tensor([1e-30, 1e30, -1e-12, 3e7, 1.0000001])
    delta = Delta(Selection({"weight": entries}), {"weight": values}, {"weight": fingerprint(entries.gather(model.weight))})
    assert torch.equal(fuse([delta], base=model).values["weight"], values)
    assert torch.equal(fuse([delta], [0.0], base=model).values["weight"], entries.gather(model.weight))


def test_overlap_is_reported_with_its_share():
    model = one_weight()
    deltas = [delta_at(model, KINDS[kind], seed) for seed, kind in enumerate(("columns", "other columns"))]
    with pytest.warns(UserWarning, match=r"25\.00% of their 20 entries"):
        fused = fuse(deltas, base=model)
    assert fused.selection["weight"].index.tolist() == [1, 2, 6, 7]
    with pytest.warns(UserWarning, match=r"100\.00%"):
        same = fuse([deltas[0], deltas[0]], [0.5, 0.5], base=model)
    assert torch.equal(same.values["weight"], deltas[0].values["weight"])


def test_a_fused_adapter_is_an_adapter(tmp_path):
    first, second = adapter(), adapter(method=Random(0.02, seed=1), shift=0.5)
    model = tiny.build("gqa_llama", dtype=torch.bfloat16)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.warns(UserWarning, match="overlap"):
        fused = fuse([first, second], [1.0, 0.5], base=model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    loaded = Delta.load(fused.save(tmp_path / "fused"))
    loaded.apply_(model)
    for name, entries in fused.selection.items():
        assert torch.equal(entries.gather(model.get_parameter(name)), fused.values[name])
    loaded.revert_(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    config = read_config(tmp_path / "fused")
    assert config["base_model_name_or_path"] == "someone/base"
    assert config["method"] == {"name": "fuse", "of": [first.method, second.method], "weights": [1.0, 0.5]}
    assert loaded.of == first.of


@pytest.mark.parametrize(
    ("weights", "message"),
    [([1.0], "for each of the 2"), ([1.0, float("nan")], "finite"), ([1.0, float("inf")], "finite"), ([1, True], "finite")],
)
def test_weights_are_checked(weights, message):
    model = one_weight()
    deltas = [delta_at(model, KINDS[kind], 0) for kind in ("rows", "columns")]
    with pytest.raises(ValueError, match=message):
        fuse(deltas, weights, base=model)


def test_nothing_and_too_much_are_refused():
    model = one_weight(torch.float16)
    with pytest.raises(ValueError, match="at least one"):
        fuse([], base=model)
    with pytest.raises(ValueError, match=r"weight: weights=\[1000000\.0\].*exceeds torch.float16"):
        fuse([delta_at(model, KINDS["rows"], 0)], [1e6], base=model)


def test_deltas_of_different_bases_are_refused_by_name():
    model, other = one_weight(), one_weight(seed=1)
    own = delta_at(model, KINDS["rows"], 0, base="a/base")
    with pytest.raises(ValueError, match=r"deltas\[1\]: 'b/base'"):
        fuse([own, delta_at(model, KINDS["columns"], 0, base="b/base")], base=model)
    with pytest.raises(ValueError, match=r"deltas\[1\]: weight: base fingerprint"):
        fuse([own, delta_at(other, KINDS["columns"], 0)], base=model)
    with pytest.raises(ValueError, match=r"deltas\[1\]: weight: trained on a torch.bfloat16 base"):
        fuse([own, delta_at(one_weight(torch.bfloat16), KINDS["columns"], 0)], base=model)
    own.apply_(model)
    with pytest.raises(ValueError, match=r"deltas\[0\]: weight: base fingerprint"):
        fuse([own], base=model)
