"""The store checks an adapter whole before it loads it, forgets none that is in use, and finds evicted ones again."""

import json
import shutil
import threading
import time

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from intaglio import Delta, Selection
from intaglio.core.entries import Elements, Whole
from intaglio.core.fingerprint import fingerprint
from intaglio.export.lora import to_lora
from intaglio.runtime.mixing import Mixer
from intaglio.runtime.store import AdapterError, AdapterInUse, AdapterStore, DuplicateAdapter, UnknownAdapter
from support import requests as tools
from support import tiny

NAME = "gqa_llama"


@pytest.fixture(scope="module")
def base():
    return tiny.build(NAME)


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory):
    """Six adapter folders."""
    folder = tmp_path_factory.mktemp("adapters")
    return [tools.columns(base, seed).save(folder / str(seed)) for seed in range(6)]


def test_load_list_unload(base, folders):
    store = AdapterStore(base, base="tiny")
    before = int(time.time())
    info = store.load("team:alice_1.0-rc", folders[0])
    assert (info.kind, info.parent, info.path) == ("slices", "tiny", str(folders[0]))
    assert before <= info.created <= time.time()
    assert store.fetch("team:alice_1.0-rc").nbytes == info.bytes == store.resident_bytes > 0
    store.load("bob", folders[1])
    assert [info.name for info in store.infos()] == ["bob", "team:alice_1.0-rc"]
    assert "bob" in store
    store.unload("bob")
    assert "bob" not in store
    store.load("bob", folders[2])


def test_names_are_checked(base, folders):
    store = AdapterStore(base)
    for name in ("", "..", ".", "a/b", "a\\b", "a b", "ä", "x" * 129, "a\n", "../user", 3):
        with pytest.raises(AdapterError, match="adapter name"):
            store.load(name, folders[0])
    store.load("x" * 128, folders[0])
    store.load("a", folders[0])
    with pytest.raises(DuplicateAdapter, match="unload it first"):
        store.load("a", folders[1])
    for call in (store.unload, store.acquire):
        with pytest.raises(UnknownAdapter):
            call("b")


def damage_truncate(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def damage_flip(folder):
    file = folder / "adapter_model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 1
    file.write_bytes(bytes(raw))


def damage_config(folder):
    (folder / "adapter_config.json").write_text("{")


def damage_missing(folder):
    (folder / "adapter_model.safetensors").unlink()


def damage_kind(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "VERA"}))


@pytest.mark.parametrize("damage", [damage_truncate, damage_flip, damage_config, damage_missing, damage_kind])
def test_a_damaged_folder_is_refused(base, folders, tmp_path, damage):
    shutil.copytree(folders[0], tmp_path / "bad")
    damage(tmp_path / "bad")
    store = AdapterStore(base)
    with pytest.raises(AdapterError, match=r"^'alice': "):
        store.load("alice", tmp_path / "bad")
    assert not store.infos()
    assert store.resident_bytes == 0
    store.load("alice", folders[0])  # the name is free


def test_another_base_is_refused(base, folders):
    with pytest.raises(AdapterError, match="fingerprint"):
        AdapterStore(tiny.build(NAME, seed=1)).load("a", folders[0])
    with pytest.raises(AdapterError, match=r"float32.*bfloat16"):
        AdapterStore(tiny.build(NAME, dtype=torch.bfloat16)).load("a", folders[0])
    with pytest.raises(AdapterError, match="not the weight of a linear layer"):
        AdapterStore(tiny.build("opt")).load("a", folders[0])


def handmade(base, name, entries, folder):
    values = entries.gather(dict(base.named_parameters())[name])
    return Delta(Selection({name: entries}), {name: values + 0.1}, {name: fingerprint(values)}).save(folder)


def test_kinds_that_no_batch_can_mix_are_refused(base, tmp_path):
    weight, norm = "model.layers.0.mlp.down_proj.weight", "model.norm.weight"
    store = AdapterStore(base)
    for name, entries, message in (
        (weight, Elements((32, 48), torch.tensor([3, 9])), "holds elements.*AdapterPool.*LoRA by SVD"),
        (weight, Whole((32, 48)), "holds whole"),
        (norm, Whole((32,)), "not the weight of a linear layer"),
        ("lm_head.weight", Whole((96, 32)), "not the weight of a linear layer"),
    ):
        shutil.rmtree(tmp_path / "a", ignore_errors=True)
        with pytest.raises(AdapterError, match=message):
            store.load("a", handmade(base, name, entries, tmp_path / "a"))


def test_absurd_values_are_refused(base, tmp_path):
    """They would overflow, and in a step that runs many requests 0 · ∞ reaches them all."""
    with pytest.raises(AdapterError, match="finite and at most 10000"):
        AdapterStore(base).load("a", tools.columns(base, 0, strength=1e6).save(tmp_path / "a"))


def test_limits(base, folders):
    with pytest.raises(ValueError, match="capacity_bytes=0"):
        AdapterStore(base, capacity_bytes=0)
    with pytest.raises(AdapterError, match="more than capacity_bytes=100"):
        AdapterStore(base, capacity_bytes=100).load("a", folders[0])
    store = AdapterStore(base, max_entries=2)
    store.load("a", folders[0])
    store.load("b", folders[1])
    with pytest.raises(AdapterError, match="max_entries=2"):
        store.load("c", folders[2])
    store.unload("a")
    store.load("c", folders[2])


def test_eviction_is_least_recently_used_and_undone_on_demand(base, folders):
    size = AdapterStore(base).load("a", folders[0]).bytes
    store = AdapterStore(base, capacity_bytes=3 * size)
    for name in "abc":
        store.load(name, folders[0])
    first = store.fetch("a")
    store.load("d", folders[0])  # evicts "b", which was used least recently
    assert (len(store.infos()), store.resident_bytes, store.evictions) == (4, 3 * size, 1)
    assert store.fetch("a") is first
    second = store.fetch("b")  # evicts "c"
    assert (store.loads, store.resident_bytes, store.evictions) == (5, 3 * size, 2)
    assert store.fetch("b") is second
    for path, change in first.changes.items():
        assert torch.equal(change.write, second.changes[path].write)
        assert torch.equal(change.read, second.changes[path].read)


def test_files_that_changed_since_are_not_taken(base, folders, tmp_path):
    shutil.copytree(folders[0], tmp_path / "a")
    store = AdapterStore(base, capacity_bytes=AdapterStore(base).load("b", folders[1]).bytes + 1000)
    store.load("a", tmp_path / "a")
    store.load("b", folders[1])
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(AdapterError, match="not an adapter folder"):
        store.fetch("a")
    shutil.copytree(folders[2], tmp_path / "a")
    with pytest.raises(AdapterError, match="has changed since"):
        store.fetch("a")


def test_configs_that_break_their_reader_are_refused(base, folders, tmp_path):
    shutil.copytree(folders[0], tmp_path / "deep")
    (tmp_path / "deep/adapter_config.json").write_text("[" * 100_000)
    store = AdapterStore(base)
    with pytest.raises(AdapterError, match="damaged"):
        store.load("deep", tmp_path / "deep")
    assert not store.infos()


def test_an_unknown_adapter_is_named(base):
    with pytest.raises(UnknownAdapter, match="nobody"):
        AdapterStore(base).fetch("nobody")


def test_a_lora_that_changed_its_base_too_is_refused(base, tmp_path):
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "init_lora_weights": "pissa_niter_4"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(AdapterError, match="init_lora_weights='pissa_niter_4'"):
        AdapterStore(base).load("a", tmp_path)


def test_an_adapter_in_use_stays(base, folders):
    store = AdapterStore(base)
    store.load("a", folders[0])
    store.acquire("a")
    with pytest.raises(AdapterInUse, match="1 requests"):
        store.unload("a")
    assert "a" in store
    threading.Timer(0.1, store.release, ["a"]).start()
    store.unload("a", wait=10)
    assert "a" not in store


def test_no_new_request_gets_an_adapter_that_is_leaving(base, folders):
    store = AdapterStore(base)
    store.load("a", folders[0])
    store.acquire("a")
    thread = threading.Thread(target=store.unload, args=["a"], kwargs={"wait": 10})
    thread.start()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:  # until the thread waits
        try:
            store.acquire("a")
            store.release("a")
        except UnknownAdapter:
            break
    else:
        pytest.fail("still given out")
    store.release("a")
    thread.join(10)
    assert not thread.is_alive()
    assert "a" not in store


def test_many_threads(base, folders):
    """Loads, fetches and unloads at random from eight threads: no lost name, no wrong content, no deadlock."""
    store = AdapterStore(base, capacity_bytes=4 * AdapterStore(base).load("a", folders[0]).bytes)
    truth = {}
    for i, folder in enumerate(folders):
        fresh = AdapterStore(base)
        fresh.load("a", folder)
        truth[i] = fresh.fetch("a")
    errors = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(40):
            i, action = torch.randint(6, (2,), generator=generator).tolist()
            try:
                if action == 0:
                    store.unload(str(i))
                elif action < 3:
                    store.load(str(i), folders[i])
                else:
                    store.acquire(str(i))
                    found = store.fetch(str(i))
                    store.release(str(i))
                    path = "model.layers.0.mlp.down_proj"
                    assert torch.equal(found.changes[path].write, truth[i].changes[path].write)
            except (UnknownAdapter, DuplicateAdapter, AdapterInUse):
                pass
            except BaseException as error:
                errors.append(error)

    threads = [threading.Thread(target=work, args=[seed]) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not errors
    for info in store.infos():
        store.unload(info.name)
    assert store.resident_bytes == 0


# stock LoRA


def lora_logits(base, folder, batch):
    return PeftModel.from_pretrained(base, str(folder)).eval()(**batch).logits


def mixed_logits(base, folder, batch):
    store = AdapterStore(base)
    info = store.load("a", folder)
    mixer = Mixer(base, store.layers)
    with torch.no_grad(), mixer.using([store.fetch("a")] * batch["input_ids"].shape[0]):
        return info, store.fetch("a"), base(**batch).logits


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"alpha_pattern": {"down_proj": 3, "layers.1.self_attn.q_proj": 7}}]
)
@pytest.mark.parametrize("rows", [1, 12])
def test_a_stock_lora_is_served(tmp_path, settings, rows):
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=9, target_modules=["q_proj", "up_proj", "down_proj"], **settings)
    model = get_peft_model(tiny.build(NAME), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(str(tmp_path / "lora"))
    batch = tiny.batch(NAME, length=rows)
    info, _, mixed = mixed_logits(tiny.build(NAME), tmp_path / "lora", batch)
    assert info.kind == "lora"
    expected = lora_logits(tiny.build(NAME), tmp_path / "lora", batch)
    torch.testing.assert_close(mixed, expected, rtol=1e-4, atol=1e-4)
    assert (mixed - tiny.build(NAME)(**batch).logits).abs().max() > 0.05


@pytest.mark.parametrize("dims", [(1,), (0,)], ids=["columns", "rows"])
def test_an_exported_lora_becomes_compact_again(base, tmp_path, dims):
    delta = tools.draw(base, 0, dims=dims)
    delta.save(tmp_path / "delta")
    to_lora(delta, base, tmp_path / "lora")
    store = AdapterStore(base)
    store.load("delta", tmp_path / "delta")
    store.load("lora", tmp_path / "lora")
    compact, exported = store.fetch("delta"), store.fetch("lora")
    assert compact.changes.keys() == exported.changes.keys()
    for path, change in compact.changes.items():
        assert torch.equal(change.read, exported.changes[path].read)
        assert torch.equal(change.write, exported.changes[path].write)


def edit_config(folder, **changes):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))


def edit_tensors(folder, change):
    file = folder / "adapter_model.safetensors"
    safetensors.torch.save_file({key: change(key, t).contiguous() for key, t in safetensors.torch.load_file(file).items()}, file)


BAD_LORAS = {
    "uses use_dora": lambda f: edit_config(f, use_dora=True),
    "uses bias": lambda f: edit_config(f, bias="all"),
    "without regular expressions": lambda f: edit_config(f, alpha_pattern={"(a+)+$": 1}),
    "lora_alpha=None: give a finite number": lambda f: edit_config(f, lora_alpha=None),
    "expected, found": lambda f: edit_tensors(f, lambda key, t: t[:, :-1]),
    "holds nan": lambda f: edit_tensors(f, lambda key, t: t * float("nan")),
    "not safetensors": lambda f: (f / "adapter_model.safetensors").write_bytes(b"x" * 100),
}


@pytest.mark.parametrize("message", BAD_LORAS)
def test_a_lora_that_cannot_be_served_is_refused(base, tmp_path, message):
    to_lora(tools.columns(base, 0), base, tmp_path / "lora")
    BAD_LORAS[message](tmp_path / "lora")
    store = AdapterStore(base)
    with pytest.raises(AdapterError, match=message):
        store.load("a", tmp_path / "lora")
    assert not store.infos()
