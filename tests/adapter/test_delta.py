"""The artefact: exact both ways, and every damaged or foreign file refused before the base is touched."""

import json
import multiprocessing
import os
import shutil
import signal

import pytest
import safetensors.torch
import torch

from intaglio import S2FT, Delta, Random, attach
from intaglio.adapter.delta import Delta as DeltaClass
from intaglio.adapter.folder import CONFIG, WEIGHTS
from intaglio.core.entries import Elements, Slices, Whole
from intaglio.core.fingerprint import fingerprint
from intaglio.core.selection import Selection
from support import tiny

METHODS = [S2FT(o=0.5, down=0.25), Random(budget=0.05)]


def state(model):
    return {key: t.clone() for key, t in model.state_dict().items()}


def same(model, expected):
    return all(torch.equal(t, expected[key]) for key, t in model.state_dict().items())


def trained(method=METHODS[0], dtype=torch.bfloat16, name="gqa_llama"):
    model = tiny.build(name, dtype=dtype)
    tuner = attach(model, method)
    optimizer = tuner.optimizer(torch.optim.AdamW, lr=1e-2)
    for i in range(2):
        model(**tiny.batch(name, seed=i)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return tuner


@pytest.fixture(params=METHODS, ids=lambda m: m.name)
def adapter(request, tmp_path):
    return trained(request.param).save(tmp_path / "adapter")


def test_apply_and_revert_100_times_in_bf16(adapter):
    """S2FT checklist 17: values are swapped, never added, so every bit comes back."""
    model = tiny.build("gqa_llama", dtype=torch.bfloat16)
    base, delta = state(model), Delta.load(adapter)
    delta.apply_(model)
    tuned = state(model)
    delta.revert_(model)
    for _ in range(100):
        delta.apply_(model)
        assert same(model, tuned)
        delta.revert_(model)
        assert same(model, base)


def rewrite(folder, tensors=None, config=None):
    """Write back changed tensors with a fitting hash, so that only the change itself can be what is refused."""
    import hashlib

    settings = json.loads((folder / CONFIG).read_text())
    if tensors is not None:
        raw = safetensors.torch.save(tensors)
        (folder / WEIGHTS).write_bytes(raw)
        settings["sha256"] = hashlib.sha256(raw).hexdigest()
    (folder / CONFIG).write_text(json.dumps(settings | (config or {})))


def edit(key_part, change):
    def damage(folder):
        tensors = safetensors.torch.load_file(folder / WEIGHTS)
        key = next(k for k, t in tensors.items() if key_part in k and t.numel() > 3)
        tensors[key] = change(tensors[key].clone())
        rewrite(folder, {k: t.contiguous() for k, t in tensors.items()})

    return damage


def put(tensor, position, value):
    tensor.view(-1)[position] = value
    return tensor


def truncate(folder):
    raw = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(raw[: len(raw) // 2])


def flip(folder):
    raw = bytearray((folder / WEIGHTS).read_bytes())
    raw[-1] ^= 1
    (folder / WEIGHTS).write_bytes(raw)


def drop(folder):
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    del tensors[next(k for k in tensors if "intaglio_values" in k)]
    rewrite(folder, tensors)


def add(folder):
    rewrite(folder, safetensors.torch.load_file(folder / WEIGHTS) | {"stranger.intaglio_values.weight": torch.zeros(1)})


DAMAGES = {
    "out of range": (edit("intaglio_indices", lambda t: put(t, -1, torch.iinfo(t.dtype).max)), r"must lie in|blocks"),
    "negative": (edit("intaglio_indices", lambda t: put(t, 0, -1)), r"must lie in|sorted"),
    "duplicate": (edit("intaglio_indices", lambda t: put(t, 1, int(t[0]))), "duplicates"),
    "unsorted": (edit("intaglio_indices", lambda t: torch.cat([t[:2].flip(0), t[2:]])), "sorted"),
    "float indices": (edit("intaglio_indices", lambda t: t.float()), "integers"),
    "index count": (edit("intaglio_indices", lambda t: t[:-1]), "expected"),
    "NaN": (edit("intaglio_values", lambda t: put(t, 3, float("nan"))), "finite"),
    "infinity": (edit("intaglio_values", lambda t: put(t, 0, float("inf"))), "finite"),
    "value count": (edit("intaglio_values", lambda t: t[:-1]), "shape"),
    "integer values": (edit("intaglio_values", lambda t: t.int()), "floating-point"),
    "truncated": (truncate, "damaged or truncated"),
    "one bit": (flip, "damaged or truncated"),
    "missing tensor": (drop, "has no"),
    "unknown tensor": (add, "does not name"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "missing"),
    "no config": (lambda f: (f / CONFIG).unlink(), "not an adapter folder"),
    "config not JSON": (lambda f: (f / CONFIG).write_text('{"peft_type"'), "not JSON"),
    "other type": (lambda f: rewrite(f, config={"peft_type": "LORA"}), "not an Intaglio adapter"),
    "future format": (lambda f: rewrite(f, config={"format_version": 99}), "format version 99"),
    "a base that is no name": (lambda f: rewrite(f, config={"base_model_name_or_path": 5}), "of the wrong type"),
    "config without key": (lambda f: (f / CONFIG).write_text('{"peft_type": "INTAGLIO", "format_version": 3}'), "without"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused(adapter, damage):
    spoil, message = DAMAGES[damage]
    spoil(adapter)
    with pytest.raises(ValueError, match=message):
        Delta.load(adapter)


def test_kind_and_shape_are_checked(adapter):
    settings = json.loads((adapter / CONFIG).read_text())
    name = next(iter(settings["parameters"]))
    for change, message in (
        ({"kind": "code"}, "unknown kind"),
        ({"shape": "x"}, "no list of sizes"),
        ({"shape": [2, 2]}, name),
        ({"dtype": "int8"}, "no floating-point type"),
        ({"dtype": "float8_e5m2"}, "no floating-point type of 16 bits or more"),
        ({"dtype": "nn"}, "no floating-point type"),
        ({"indices": True}, "no count" if settings["parameters"][name]["kind"] != "whole" else name),
        ({"fingerprint": 3}, "fingerprint"),
    ):
        broken = json.loads(json.dumps(settings))
        broken["parameters"][name] |= change
        (adapter / CONFIG).write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=message):
            Delta.load(adapter)


FOREIGN = {
    "other values": (lambda: tiny.build("gqa_llama", dtype=torch.bfloat16, seed=7), "fingerprint"),
    "other type": (lambda: tiny.build("gqa_llama"), "dtype=torch.bfloat16"),
    "other shapes": (lambda: tiny.build("head_dim_qwen3", dtype=torch.bfloat16), "expected shape|fingerprint"),
    "other names": (lambda: tiny.build("transposed_gpt2", dtype=torch.bfloat16), "no such parameter"),
}


@pytest.mark.parametrize("foreign", FOREIGN)
def test_a_foreign_base_is_refused_untouched(adapter, foreign):
    """S2FT checklist 16: a Delta says by its fingerprints which base it belongs to."""
    make, message = FOREIGN[foreign]
    model = make()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        Delta.load(adapter).apply_(model)
    assert same(model, before)


def test_one_changed_base_value_is_noticed_and_names_its_parameter(adapter):
    delta = Delta.load(adapter)
    model = tiny.build("gqa_llama", dtype=torch.bfloat16)
    name = list(delta.selection)[-1]
    parameter = dict(model.named_parameters())[name]
    with torch.no_grad():
        parameter.view(-1)[delta.selection[name].flat()[-1]] += 0.5
    before = state(model)
    with pytest.raises(ValueError, match=f"{name}.*fingerprint"):
        delta.apply_(model)
    assert same(model, before)


def test_wrong_order_of_calls(adapter):
    model = tiny.build("gqa_llama", dtype=torch.bfloat16)
    delta = Delta.load(adapter)
    with pytest.raises(ValueError, match="not applied"):
        delta.revert_(model)
    delta.apply_(model)
    tuned = state(model)
    with pytest.raises(ValueError, match="applied already"):
        delta.apply_(model)
    with pytest.raises(ValueError, match="fingerprint"):
        Delta.load(adapter).apply_(model)
    with pytest.raises(ValueError, match="no longer holds"):
        delta.revert_(tiny.build("gqa_llama", dtype=torch.bfloat16))
    assert same(model, tuned)


def test_an_interrupted_call_leaves_no_half_tuned_model(tmp_path, monkeypatch):
    model = tiny.build("gqa_llama", dtype=torch.bfloat16)
    delta, before, writes = Delta.load(trained().save(tmp_path / "adapter")), state(model), []
    scatter = Slices.scatter_

    def interrupted(self, *args):
        writes.append(1)
        if len(writes) == 3:
            raise KeyboardInterrupt
        scatter(self, *args)

    monkeypatch.setattr(Slices, "scatter_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        delta.apply_(model)
    assert same(model, before)
    delta.apply_(model)
    writes.clear()
    with pytest.raises(KeyboardInterrupt):
        delta.revert_(model)
    delta.revert_(model)
    assert same(model, before)


def test_disjoint_adapters_stack_exactly():
    """S2FT checklist 15: fused weights are the base with both deltas, exactly."""
    first = trained(METHODS[1], torch.float32)
    model = tiny.build("gqa_llama")
    second = attach(model, Random(budget=0.05, seed=1), exclude=first.selection)
    with torch.no_grad():
        for slot in second.slots:
            slot.values.add_(1.0)
    second.slots.write()
    one, two = first.delta(), second.delta()
    model = tiny.build("gqa_llama")
    base = state(model)
    one.apply_(model)
    two.apply_(model)
    for delta in (one, two):
        for name, entries in delta.selection.items():
            assert torch.equal(entries.gather(dict(model.named_parameters())[name]), delta.values[name])
    one.revert_(model)
    two.revert_(model)
    assert same(model, base)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 2, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_any_shape_and_type(shape, dtype, tmp_path):
    parameter = torch.nn.Parameter(torch.randn(shape).to(dtype))
    model = torch.nn.Module()
    model.w = parameter
    whole, last = Whole(shape), Elements(shape, torch.tensor([parameter.numel() - 1]))
    for entries in (whole, last, *([Slices(shape, 1, torch.tensor([0, 2]))] if len(shape) > 1 else [])):
        before = parameter.detach().clone()
        values = entries.gather(parameter) + 1
        delta = DeltaClass(Selection({"w": entries}), {"w": values}, {"w": fingerprint(entries.gather(parameter))})
        delta.save(tmp_path / entries.kind)
        loaded = Delta.load(tmp_path / entries.kind)
        loaded.apply_(model)
        assert torch.equal(entries.gather(parameter), values)
        loaded.revert_(model)
        assert torch.equal(parameter, before)


def test_the_config_counts_the_whole_model(tmp_path):
    """`of` counts tied weights once and none of our own slots."""
    for name in ("gqa_llama", "tied_llama"):
        model = tiny.build(name)
        total = sum(p.numel() for p in model.parameters())
        delta = attach(model, METHODS[1]).delta()
        assert delta.of == total
        assert Delta.load(delta.save(tmp_path / name)).of == total


def test_scattered_entries_cost_at_most_six_bytes():
    model = tiny.build("gqa_llama")
    delta = attach(model, Random(0.3)).delta()
    blocks = sum(-(-p.numel() // 2**16) for _, p in model.named_parameters())
    assert delta.values["model.embed_tokens.weight"].dtype == torch.float32
    assert delta.nbytes <= 6 * delta.selection.size + 4 * blocks


def test_saving_into_a_folder_keeps_other_files(tmp_path):
    tuner = trained()
    folder = tuner.save(tmp_path / "adapter")
    (folder / "notes.txt").write_text("mine")
    tuner.save(folder)
    assert (folder / "notes.txt").read_text() == "mine"
    assert Delta.load(folder).selection == tuner.selection
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]


def test_a_strangers_readme_survives(tmp_path):
    (tmp_path / "README.md").write_text("my project")
    trained().save(tmp_path)
    assert (tmp_path / "README.md").read_text() == "my project"
    Delta.load(tmp_path)


def _save_for_ever(folder):
    tuner = trained()
    while True:  # other values each time, so that a mixture of two saves would show
        with torch.no_grad():
            for slot in tuner.slots:
                slot.values.add_(0.125)
        tuner.slots.write()
        tuner.save(folder)


def test_a_killed_save_leaves_a_whole_adapter_or_a_refused_one(tmp_path):
    """Kill a process that saves in a loop; what is on disk loads, or is refused as damaged: never a silent mixture."""
    folder = tmp_path / "adapter"
    context = multiprocessing.get_context("spawn")
    for wait in (0.0, 0.003, 0.01):
        process = context.Process(target=_save_for_ever, args=(folder,))
        process.start()
        while not (folder / CONFIG).exists():
            assert process.is_alive()
            process.join(0.01)
        process.join(wait)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        try:
            delta = Delta.load(folder)
        except ValueError as error:
            assert "damaged" in str(error)  # noqa: PT017  # one of two allowed ends
            shutil.rmtree(folder)
        else:
            assert delta.selection == trained().selection


def test_card_and_config_name_the_base_but_no_path(tmp_path):
    tuner = attach(tiny.build("gqa_llama"), METHODS[0], base="someone/some-model")
    folder = tuner.save(tmp_path / "adapter")
    assert "someone/some-model" in (folder / "README.md").read_text()
    assert json.loads((folder / CONFIG).read_text())["base_model_name_or_path"] == "someone/some-model"
    model = tiny.build("gqa_llama")
    model.config._name_or_path = str(tmp_path)
    assert str(tmp_path) not in (attach(model, METHODS[0]).save(tmp_path / "b") / CONFIG).read_text()


def test_applying_under_a_tuner_is_refused(adapter):
    model = tiny.build("gqa_llama", dtype=torch.bfloat16)
    attach(model, METHODS[0])
    before = state(model)
    with pytest.raises(ValueError, match="tuner attached"):
        Delta.load(adapter).apply_(model)
    assert same(model, before)


@pytest.mark.parametrize("change", [{"parameters": []}, {"parameters": {"w": 1}}, {"method": "x"}, {"sha256": 1}, {"of": "all"}])
def test_a_config_of_wrong_types_is_refused(adapter, change):
    rewrite(adapter, config=change)
    with pytest.raises(ValueError, match="damaged"):
        Delta.load(adapter)
