"""The vLLM plugin without vLLM: what it recognises and stores, and that the CPU's way computes what the plain twin does."""

import random
import sys
import types
from itertools import pairwise
from pathlib import Path

import pytest
import safetensors.torch
import torch

from intaglio import S2FT, attach
from intaglio.export.lora import to_lora
from intaglio.vllm_plugin import cpu
from intaglio.vllm_plugin.plugin import TESTED, refusal, register
from intaglio.vllm_plugin.slots import Pool, Slots, recognise
from support import tiny
from support import vllm_reference as reference
from support.vllm import BATCHES, BF16, COUNTS, FP32, INPUTS, OUTPUTS, mixed, one_hot, ragged, step

SIDES = ["columns", "rows"]


def factors(change, rank, inputs=INPUTS, outputs=OUTPUTS):
    """A and B of a change, padded to `rank`."""
    a, b = torch.zeros(rank, inputs), torch.zeros(outputs, rank)
    chosen = torch.arange(len(change.index))
    if change.side == "columns":
        a[chosen, change.index.long()] = 1
        b[:, chosen] = change.values.T
    else:
        a[chosen] = change.values
        b[change.index.long(), chosen] = 1
    return a, b


# recognising


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("count", [1, 5, 8])
@pytest.mark.parametrize("side", SIDES)
def test_a_one_hot_lora_becomes_index_and_values(side, count, dtype):
    change = one_hot(side, count, seed=3)
    found = recognise(*(factor.to(dtype) for factor in factors(change, rank=8)))
    assert found.side == side
    assert torch.equal(found.index, change.index)
    assert torch.equal(found.values, change.values.to(dtype))


def test_padding_may_hold_anything_where_the_other_factor_is_zero():
    change = one_hot("columns", 3, seed=0)
    a, b = factors(change, rank=8)
    b[:, 3:] = 7.0
    assert torch.equal(recognise(a, b).values, change.values)


def test_zeros_are_an_empty_adapter():
    """vLLM warms up with adapters of zeros."""
    found = recognise(torch.zeros(8, INPUTS), torch.zeros(OUTPUTS, 8))
    assert found.index.numel() == 0
    assert found.values.shape == (0, OUTPUTS)


def damage(a, b, how):
    if how == "another value":
        a[0, a[0].argmax()] = 0.5
    if how == "two in a row":
        a[0, (a[0].argmax() + 1) % INPUTS] = 1
    if how == "one place twice":
        a[1] = a[0]
    if how == "not a number":
        a[0, a[0].argmax()] = float("nan")
    if how == "ordinary":
        a.copy_(torch.randn_like(a))
    return a, b


@pytest.mark.parametrize("how", ["another value", "two in a row", "one place twice", "not a number", "ordinary"])
def test_any_other_lora_is_not_recognised(how):
    assert recognise(*damage(*factors(one_hot("columns", 4, seed=1), rank=4), how)) is None


@pytest.mark.parametrize("how", ["another value", "two in a row", "one place twice", "not a number"])
def test_any_other_lora_is_not_recognised_as_rows_either(how):
    a, b = factors(one_hot("rows", 4, seed=1), rank=4)
    transposed, a = damage(b.T.contiguous(), a, how)
    assert recognise(a, transposed.T) is None


def test_what_intaglio_exports_is_recognised(tmp_path):
    """Every module of an exported adapter, and its product is the exported one."""
    name = "gqa_llama"
    tuner = attach(tiny.build(name), S2FT(v=0.5, o=0.5, up=0.25, down=0.25))
    optimizer = tuner.optimizer(torch.optim.AdamW, lr=1e-2)
    tuner.model(**tiny.batch(name)).loss.backward()
    optimizer.step()
    to_lora(tuner.delta(), tiny.build(name), tmp_path / "lora")
    tensors = safetensors.torch.load_file(tmp_path / "lora/adapter_model.safetensors")
    modules = {key.removesuffix(".lora_A.weight") for key in tensors if ".lora_A." in key}
    assert len(modules) == 8  # four of each of two layers
    for module in modules:
        a, b = tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"]
        change = recognise(a, b)
        assert change.side == ("columns" if module.endswith(("o_proj", "down_proj")) else "rows")
        dense = torch.zeros(b.shape[0], a.shape[1])
        if change.side == "columns":
            dense[:, change.index.long()] = change.values.T
        else:
            dense[change.index.long()] = change.values
        assert torch.equal(dense, b @ a)


# storing


def test_slots_keep_what_they_are_given_whatever_comes_and_goes():
    """Against a dictionary, over random loads and unloads of every size."""
    draw, pool, expected = random.Random(0), Pool(6, 5, FP32), {}
    for turn in range(300):
        slot = draw.randrange(6)
        if draw.random() < 0.3:
            pool.clear(slot)
            expected.pop(slot, None)
        else:
            change = one_hot("columns", draw.randrange(0, 12), turn, inputs=40, outputs=5)
            pool.put(slot, change.index, change.values)
            expected[slot] = change
        for other in range(6):
            index, values = pool.get(other)
            assert pool.spans[other].tolist() == list(pool.span(other))
            if other in expected:
                assert torch.equal(index, expected[other].index)
                assert torch.equal(values, expected[other].values)
            else:
                assert index.numel() == 0
        spans = sorted(pool.span(slot) for slot in range(6) if pool.span(slot)[1])
        assert all(a + n <= b for (a, n), (b, _) in pairwise(spans))
    assert len(pool.index) < 2 * 6 * 12  # gaps are used again


def test_a_slot_changes_sides():
    slots = Slots(1, INPUTS, OUTPUTS, FP32)
    slots.put(0, one_hot("columns", 4, 0))
    slots.put(0, one_hot("rows", 2, 1))
    assert slots.columns.span(0) == (0, 0)
    assert slots.rows.span(0)[1] == 2


def test_slots_take_what_their_adapters_hold():
    """Index and values, and two integers per slot and side; no rank, no second factor."""
    content = sum(COUNTS) * 4 * (1 + OUTPUTS)
    assert ragged("columns").nbytes <= content * 9 / 8 + 2 * 8 * len(COUNTS)


# computing


def tolerance(dtype):
    return {"rtol": 1e-5, "atol": 1e-5} if dtype == FP32 else {"rtol": 2e-2, "atol": 1e-1}


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("make", [lambda d: ragged("columns", d), lambda d: ragged("rows", d), mixed], ids=[*SIDES, "mixed"])
def test_the_cpu_computes_what_the_plain_twin_does(make, batch, dtype):
    slots = make(dtype)
    y, x, slot_T = step(batch, dtype)
    expected, before = y.clone(), y.clone()
    reference.add(expected, x, slots, slot_T)
    cpu.add(y, x, slots, cpu.Batch(slot_T))
    torch.testing.assert_close(y, expected, **tolerance(dtype))
    assert torch.equal(y[slot_T == -1], before[slot_T == -1])
    assert torch.equal(y[slot_T == 1], before[slot_T == 1])  # loaded, but empty


def test_the_plain_twin_is_the_product_with_the_dense_change():
    for side in SIDES:
        slots = ragged(side)
        y, x, slot_T = step("decoding")
        expected = y.clone()
        for token, slot in enumerate(slot_T.tolist()):
            if slot >= 0:
                a, b = factors(one_hot(side, COUNTS[slot], slot), rank=40)
                expected[token] += b @ (a @ x[token])
        reference.add(y, x, slots, slot_T)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_a_batch_sees_adapters_that_were_loaded_after_it_was_made():
    """Decoding goes on in the same batch while a slot gets another adapter, of another size and side."""
    slots = ragged("columns")
    y, x, slot_T = step("decoding")
    batch = cpu.Batch(slot_T)
    cpu.add(y.clone(), x, slots, batch)
    assert batch.fits(slot_T)
    assert not batch.fits(slot_T.roll(1))
    slots.put(0, one_hot("rows", 17, 50))
    slots.put(2, one_hot("columns", 2, 51))
    slots.clear(4)
    expected = y.clone()
    reference.add(expected, x, slots, slot_T)
    cpu.add(y, x, slots, batch)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


# registering


@pytest.mark.parametrize("version", ["0.31.1", "0.33.0", "1.0"])
def test_another_vllm_is_left_alone_with_both_versions_named(version):
    reason = refusal("1", version)
    assert version in reason
    assert all(tested in reason for tested in TESTED)
    assert "INTAGLIO_VLLM=force" in reason
    assert refusal("force", version) is None


def test_a_tested_vllm_is_taken_and_a_wrong_setting_named():
    assert refusal("1", TESTED[0]) is refusal("1", f"{TESTED[0]}+cpu") is None
    assert "INTAGLIO_VLLM='on'; give 0" in refusal("on", TESTED[0])


@pytest.fixture
def installed(monkeypatch):
    """How often the plugin was installed, in a stand-in for the vLLM that it is tested with; nobody has asked for it."""
    calls = []
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(__version__=TESTED[0]))
    linear = types.SimpleNamespace(install=lambda: calls.append("installed") or True)
    monkeypatch.setitem(sys.modules, "intaglio.vllm_plugin.linear", linear)
    for name in ("INTAGLIO_VLLM", "VLLM_PLUGINS"):
        monkeypatch.delenv(name, raising=False)
    return calls


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"INTAGLIO_VLLM": ""},
        {"INTAGLIO_VLLM": "0"},
        {"VLLM_PLUGINS": "other"},
        {"VLLM_PLUGINS": "intaglio", "INTAGLIO_VLLM": "0"},
    ],
)
def test_where_nobody_asks_it_is_off_without_a_word(installed, environment, monkeypatch, caplog):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    register()
    assert not installed
    assert not caplog.records


@pytest.mark.parametrize("environment", [{"INTAGLIO_VLLM": "1"}, {"INTAGLIO_VLLM": "force"}, {"VLLM_PLUGINS": "other,intaglio"}])
def test_where_it_is_asked_for_it_acts(installed, environment, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    register()
    assert installed == ["installed"]


def test_with_another_version_only_force_acts(installed, monkeypatch, caplog):
    monkeypatch.setattr(sys.modules["vllm"], "__version__", "9.9.9")
    monkeypatch.setenv("INTAGLIO_VLLM", "1")
    register()
    assert not installed
    assert "INTAGLIO_VLLM=force" in caplog.text
    monkeypatch.setenv("INTAGLIO_VLLM", "force")
    register()
    assert installed == ["installed"]


def test_registering_touches_nothing_where_it_may_not(monkeypatch, caplog):
    """With vLLM stood in for by a module of another version, which has nothing else: any further import of it would fail."""
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(__version__="9.9.9"))
    monkeypatch.setenv("INTAGLIO_VLLM", "0")
    register()
    assert not caplog.records
    monkeypatch.setenv("INTAGLIO_VLLM", "1")
    register()
    assert len(caplog.records) == 1
    assert "9.9.9" in caplog.text
    monkeypatch.setenv("INTAGLIO_VLLM", "force")
    register()
    assert len(caplog.records) == 2
    assert "vLLM 9.9.9 lacks what it builds on" in caplog.text


def test_the_entry_point_is_the_function():
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '[project.entry-points."vllm.general_plugins"]\nintaglio = "intaglio.vllm_plugin.plugin:register"' in project
