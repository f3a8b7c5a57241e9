"""Many adapters on one model: every switch exact, nothing copied, nothing refused half-way."""

import gc
import random
import shutil
import threading

import pytest
import torch

from intaglio import S2FT, AdapterPool, BitFit, Delta, Full, Random, attach, fuse
from intaglio.core.entries import Slices
from intaglio.model.permute import co_permute
from support import tiny

NAME = "gqa_llama"
METHODS = {
    "s2ft": S2FT(o=0.25, down=0.25),
    "other_units": S2FT(o=0.5, down=0.5, up=0.25, seed=5),
    "same_units": S2FT(o=0.25, down=0.25),
    "entries": Random(0.05, seed=2),
    "vectors": BitFit(tensors="one_dimensional"),
    "all": Full(),
}


def model_of(name=NAME, dtype=torch.bfloat16):
    return tiny.build(name, dtype=dtype)


def delta_of(method, shift, name=NAME, dtype=torch.bfloat16, **kwargs):
    """An adapter whose values differ from the base and from those of any other shift."""
    tuner = attach(model_of(name, dtype), method, **kwargs)
    with torch.no_grad():
        for slot in tuner.slots:
            slot.values.add_(torch.linspace(shift, 2 * shift, slot.values.numel()).view_as(slot.values))
    tuner.slots.write()
    return tuner.delta()


def state(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def same(model, expected):
    return all(torch.equal(t, expected[name]) for name, t in model.state_dict().items())


def merged(delta, name=NAME, dtype=torch.bfloat16):
    model = model_of(name, dtype)
    delta.apply_(model)
    return state(model)


@pytest.fixture(scope="module")
def deltas():
    return {name: delta_of(method, 0.25 * (number + 1)) for number, (name, method) in enumerate(METHODS.items())}


@pytest.fixture(scope="module")
def tuned(deltas):
    """Name → the state of the model with that adapter merged; None → the base's."""
    return {name: merged(delta) for name, delta in deltas.items()} | {None: state(model_of())}


@pytest.fixture
def folders(deltas, tmp_path):
    return {name: delta.save(tmp_path / name) for name, delta in deltas.items()}


def filled(deltas, **kwargs):
    pool = AdapterPool(model_of(), **kwargs)
    for name, delta in deltas.items():
        pool.load(name, delta)
    return pool


@pytest.mark.parametrize("storage", ["base", "rows"])
def test_a_thousand_random_switches_in_bf16(deltas, tuned, storage):
    """S2FT checklist 22: every switch gives the adapter's weights, and the way back the base's, bit for bit."""
    pool = filled(deltas, storage=storage)
    assert same(pool.model, tuned[None])
    draw = random.Random(0)
    for _ in range(1000):
        name = draw.choice([None, *deltas])
        pool.use(name)
        assert pool.active == name
        assert same(pool.model, tuned[name])
    pool.close()
    assert same(pool.model, tuned[None])
    assert all(p.is_contiguous() for p in pool.model.parameters())


def test_a_thousand_switches_within_little_memory(folders, tuned):
    """Most values are dropped and read again; what is read is what was loaded."""
    biggest = 30_000
    pool = AdapterPool(model_of(), capacity_bytes=biggest)
    small = {name: folder for name, folder in folders.items() if name != "all"}
    for name, folder in small.items():
        pool.load(name, folder)
    draw, most = random.Random(1), 0
    for _ in range(100):
        name = draw.choice([None, *small])
        pool.use(name)
        assert same(pool.model, tuned[name])
        most = max(most, pool.nbytes)
    assert most <= 2 * biggest
    pool.use(None)
    assert 0 < pool.nbytes <= biggest
    with pytest.raises(ValueError, match=r"'all': needs .* capacity_bytes=30,000"):
        pool.load("all", folders["all"])
    assert pool.names == sorted(small)


def tensors_alive():
    gc.collect()
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in gc.get_objects() if type(t) is torch.Tensor}


def test_nothing_of_the_base_is_copied(deltas):
    """The weights stay where they are, and no more memory is taken than the adapters' own places need."""
    model = model_of()
    own = {name: deltas[name] for name in ("s2ft", "other_units", "entries")}
    where = {name: p.data_ptr() for name, p in model.named_parameters()}
    before = tensors_alive()
    pool = AdapterPool(model)
    for name, delta in own.items():
        pool.load(name, delta)
    for name in (*own, None):
        pool.use(name)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == where
    values = sum(t.nbytes for delta in own.values() for t in delta.values.values())
    indices = sum(e.index.nbytes for delta in own.values() for e in delta.selection.values())
    added = sum(size for pointer, size in tensors_alive().items() if pointer not in before)
    assert pool.nbytes == 2 * values + indices
    assert values <= added <= pool.nbytes  # the base's values at those places; the adapters' own tensors were there before


def test_equal_places_are_held_once(deltas):
    alone, both = AdapterPool(model_of()), AdapterPool(model_of())
    alone.load("a", deltas["s2ft"])
    both.load("a", deltas["s2ft"])
    both.load("b", deltas["same_units"])
    assert both.nbytes - alone.nbytes == sum(t.nbytes for t in deltas["same_units"].values.values())


@pytest.mark.parametrize("name", tiny.MODELS)
@pytest.mark.parametrize("storage", ["base", "rows"])
def test_every_architecture(name, storage):
    first = delta_of(S2FT(o=0.5, down=0.25), 0.25, name)
    second = delta_of(S2FT(o=0.5, down=0.25, up=0.1, seed=1), 0.5, name)
    model = model_of(name)
    base = state(model)
    pool = AdapterPool(model, storage=storage)
    pool.load("first", first)
    pool.use("first")
    pool.load("second", second)  # while the other stands on the model
    for use, expected in (("second", merged(second, name)), ("first", merged(first, name)), (None, base)):
        pool.use(use)
        assert same(model, expected)


def test_tied_weights_are_switched_once():
    delta = delta_of(Random(0.2), 0.5, "tied_llama")
    assert "model.embed_tokens.weight" in delta.selection
    assert "lm_head.weight" not in delta.selection
    model = model_of("tied_llama")
    pool = AdapterPool(model, storage="rows")
    pool.load("a", delta)
    pool.use("a")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert same(model, merged(delta, "tied_llama"))


def test_rows_change_strides_and_nothing_else(deltas):
    model, batch = model_of(), tiny.batch(NAME)
    expected = model(**batch).logits
    pool = AdapterPool(model, storage="rows")
    pool.load("s2ft", deltas["s2ft"])
    turned = {name for name, p in model.named_parameters() if not p.is_contiguous()}
    assert turned == {name for name, e in deltas["s2ft"].selection.items() if isinstance(e, Slices) and e.runs is None}
    assert turned
    assert same(model, state(model_of()))
    torch.testing.assert_close(model(**batch).logits, expected, rtol=0.02, atol=0.02)


def test_heads_are_runs_and_need_no_other_storage():
    """A head's columns lie side by side; they are copied as one run."""
    index = torch.cat([torch.arange(16, 48), torch.arange(64, 80)])
    heads = Slices((8, 96), 1, index)
    assert heads.runs == [(16, 32), (64, 16)]
    assert Slices((8, 96), 1, torch.arange(0, 96, 2)).runs is None
    weight, values = torch.randn(8, 96), torch.randn(8, 48)
    assert torch.equal(heads.gather(weight), weight.index_select(1, index))
    expected = weight.clone().index_copy_(1, index, values)
    heads.scatter_(weight, values)
    assert torch.equal(weight, expected)


@pytest.mark.parametrize("name", ["gqa_llama", "qk_norm_olmo2", "qkv_bias_qwen2"])
def test_on_a_permuted_model(name):
    """Adapters speak the base's coordinates, wherever the chosen units lie."""
    method = S2FT(o=0.5, down=0.25, up=0.25)
    first, second = delta_of(method, 0.25, name), delta_of(method, 0.5, name)
    other = delta_of(S2FT(down=0.5, o=None, seed=4), 0.75, name)
    model = model_of(name)
    layout = co_permute(model, first.selection, None)
    base = state(model)
    pool = AdapterPool(model, layout=layout)
    for key, delta in {"first": first, "second": second, "other": other}.items():
        pool.load(key, delta)
    for key, delta in {"first": first, "other": other, "second": second}.items():
        pool.use(key)
        plain = model_of(name)
        plain.load_state_dict(model.state_dict())
        layout.revert_(plain)
        assert same(plain, merged(delta, name))
    pool.use(None)
    assert same(model, base)
    down = next(e for key, e in layout.entries(first.selection).items() if key.endswith("down_proj.weight"))
    assert down.index.tolist() == list(range(len(down.index)))
    with pytest.raises(ValueError, match="permuted along dimension"):
        pool.load("entries", delta_of(Random(0.05), 0.5, name))


def test_fused_in_the_pool_equals_a_fused_adapter(deltas, tuned):
    pool = filled(deltas)
    weights = {"s2ft": 0.5, "entries": -1.0, "vectors": 1.0}
    with pytest.warns(UserWarning, match="overlap"):
        expected = merged(fuse([deltas[name] for name in weights], list(weights.values()), base=model_of()))
    pool.use("all")  # what stands on the model must not get into the sum
    with pytest.warns(UserWarning, match="overlap"):
        pool.fuse(weights)
    assert pool.active == "0.5*s2ft+-1*entries+vectors"
    assert same(pool.model, expected)
    assert pool.names == sorted(deltas)
    pool.use("s2ft")
    assert same(pool.model, tuned["s2ft"])
    with pytest.warns(UserWarning, match="overlap"):
        pool.fuse(weights, name="mixture")
    assert pool.active == "mixture"
    pool.use(None)
    pool.use("mixture")
    assert same(pool.model, expected)
    pool.use(None)
    pool.unload("mixture")
    assert same(pool.model, tuned[None])


def test_disjoint_adapters_fuse_to_both_exactly(deltas):
    first = deltas["s2ft"]
    second = delta_of(S2FT(o=0.25, down=0.25, seed=1), 1.0, exclude=first.selection)
    pool = AdapterPool(model_of())
    pool.load("first", first)
    pool.load("second", second)
    pool.fuse({"first": 1.0, "second": 1.0})  # a warning would be an error
    for delta in (first, second):
        for name, entries in delta.selection.items():
            assert torch.equal(entries.gather(pool.model.get_parameter(name)), delta.values[name])


def test_using_puts_back_what_stood_before(deltas, tuned):
    pool = filled(deltas)
    pool.use("entries")
    with pool.using("s2ft"):
        assert same(pool.model, tuned["s2ft"])
        with pool.using(None):
            assert same(pool.model, tuned[None])
            with pytest.raises(ValueError, match="'entries': stands on the model"):
                pool.unload("entries")
            with pytest.raises(ValueError, match="using block"):
                pool.close()
        assert same(pool.model, tuned["s2ft"])
    assert pool.active == "entries"
    with pytest.raises(ZeroDivisionError), pool.using("all"):
        1 / 0  # noqa: B018
    assert same(pool.model, tuned["entries"])


def test_threads_never_see_two_adapters(folders, tuned):
    """Eight threads run the model under adapters of their own while another loads, unloads and drops values."""
    pool, batch = AdapterPool(model_of(), capacity_bytes=100_000), tiny.batch(NAME)
    names = [name for name in folders if name != "all"]
    expected = {}
    with torch.no_grad():
        for name in (None, *names):
            model = model_of()
            model.load_state_dict(tuned[name])
            expected[name] = model(**batch).logits
    for name in names:
        pool.load(name, folders[name])
    failures = []

    def serve(seed):
        draw = random.Random(seed)
        try:
            for _ in range(12):
                name = draw.choice([None, *names])
                with pool.using(name), torch.inference_mode():
                    assert torch.equal(pool.model(**batch).logits, expected[name])
        except BaseException as error:
            failures.append(error)

    def churn():
        try:
            for number in range(12):
                pool.load(f"extra{number}", folders[names[number % len(names)]])
                pool.unload(f"extra{number}")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=serve, args=(seed,)) for seed in range(8)] + [threading.Thread(target=churn)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert same(pool.model, tuned[None])
    assert pool.names == sorted(names)


def test_values_used_longest_ago_are_dropped_and_read_again(folders, tuned, deltas):
    needed = {}
    for name in ("s2ft", "other_units", "entries"):
        pool = AdapterPool(model_of())
        pool.load(name, folders[name])
        needed[name] = pool.nbytes
    pool = AdapterPool(model_of(), capacity_bytes=needed["s2ft"] + needed["other_units"] + needed["entries"] - 1)
    for name in needed:
        pool.load(name, folders[name])
    assert pool.nbytes == needed["other_units"] + needed["entries"]
    shutil.rmtree(folders["s2ft"])
    for name in ("other_units", "entries"):
        pool.use(name)
        assert same(pool.model, tuned[name])
    with pytest.raises(ValueError, match="'s2ft': was dropped from memory and cannot be read again"):
        pool.use("s2ft")
    assert pool.active == "entries"
    assert same(pool.model, tuned["entries"])
    deltas["same_units"].save(folders["s2ft"])
    with pytest.raises(ValueError, match="has changed since"):
        pool.use("s2ft")
    deltas["s2ft"].save(folders["s2ft"])
    pool.use("s2ft")
    assert same(pool.model, tuned["s2ft"])


def test_bad_arguments(deltas):
    with pytest.raises(ValueError, match="capacity_bytes=0"):
        AdapterPool(model_of(), capacity_bytes=0)
    with pytest.raises(ValueError, match="storage='columns'"):
        AdapterPool(model_of(), storage="columns")  # type: ignore[arg-type]
    pool = AdapterPool(model_of())
    for name in ("", "../up", "a/b", "a b", "x" * 129, ".hidden", 3):
        with pytest.raises(ValueError, match="adapter name"):
            pool.load(name, deltas["s2ft"])  # type: ignore[arg-type]
    pool.load("a", deltas["s2ft"])
    with pytest.raises(ValueError, match=r"'a': an adapter of this name is loaded; unload it first"):
        pool.load("a", deltas["entries"])
    for call in (pool.use, pool.unload, lambda name: pool.fuse({name: 1.0})):
        with pytest.raises(ValueError, match="'b': no such adapter; loaded are a"):
            call("b")
    with pytest.raises(ValueError, match="at least one"):
        pool.fuse({})
    with pytest.raises(ValueError, match="finite"):
        pool.fuse({"a": float("nan")})
    with pytest.raises(ValueError, match="'a': an adapter of this name"):
        pool.fuse({"a": 1.0}, name="a")
    pool.use("a")
    with pytest.raises(ValueError, match=r"'a': stands on the model; call use\(None\)"):
        pool.unload("a")
    pool.use(None)
    pool.unload("a")
    assert pool.names == []
    assert pool.nbytes == 0


def quantized():
    model = model_of()
    model.model.layers[0].mlp.down_proj.weight = torch.nn.Parameter(torch.zeros(32, 48, dtype=torch.int8), requires_grad=False)
    return model


FOREIGN = {
    "another base": (lambda: tiny.build(NAME, dtype=torch.bfloat16, seed=3), "fingerprint"),
    "another type": (lambda: model_of(dtype=torch.float32), "dtype=torch.bfloat16"),
    "another architecture": (lambda: model_of("transposed_gpt2"), "no such parameter"),
    "quantized": (quantized, "quantized"),
    "offloaded": (lambda: model_of().to("meta"), "meta device"),
}


@pytest.mark.parametrize("foreign", FOREIGN)
def test_what_does_not_fit_is_refused_and_nothing_loaded(deltas, foreign):
    make, message = FOREIGN[foreign]
    model = make()
    before = {name: (p.data_ptr(), p.stride(), p._version) for name, p in model.named_parameters()}
    pool = AdapterPool(model, storage="rows")
    with pytest.raises(ValueError, match=message):
        pool.load("a", deltas["s2ft"])
    assert {name: (p.data_ptr(), p.stride(), p._version) for name, p in model.named_parameters()} == before
    assert pool.names == []
    assert pool.nbytes == 0


def test_a_damaged_folder_leaves_everything(folders, tuned):
    pool = AdapterPool(model_of(), storage="rows")
    pool.load("entries", folders["entries"])
    pool.use("entries")
    weights = folders["s2ft"] / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match="damaged"):
        pool.load("s2ft", folders["s2ft"])
    with pytest.raises(ValueError, match="not an adapter folder"):
        pool.load("s2ft", folders["s2ft"] / "nowhere")
    assert (pool.names, pool.active) == (["entries"], "entries")
    assert same(pool.model, tuned["entries"])


def test_a_model_in_training_is_refused(deltas):
    model = model_of()
    tuner = attach(model, METHODS["s2ft"])
    with pytest.raises(ValueError, match="tuner attached"):
        AdapterPool(model)
    tuner.detach()
    pool = AdapterPool(model)
    pool.load("a", deltas["s2ft"])
    tuner = attach(model, METHODS["s2ft"])
    before = state(model)
    for call in (lambda: pool.use("a"), lambda: pool.load("b", deltas["entries"])):
        with pytest.raises(ValueError, match="tuner attached"):
            call()
    assert same(model, before)
    tuner.detach()  # writes the weights once more
    with pytest.raises(ValueError, match="changed by something other"):
        pool.use("a")
    pool.unload("a")
    pool.load("a", deltas["s2ft"])
    pool.use("a")


@pytest.mark.parametrize("standing", [None, "s2ft"])
def test_weights_that_something_else_changed_are_not_overwritten(deltas, standing):
    pool = filled({"s2ft": deltas["s2ft"]})
    pool.use(standing)
    with torch.no_grad():
        pool.model.get_parameter(next(iter(deltas["s2ft"].selection))).mul_(2.0)
    before = state(pool.model)
    with pytest.raises(ValueError, match="was changed by something other than this pool"):
        pool.use(None if standing else "s2ft")
    assert pool.active == standing
    assert same(pool.model, before)


def test_an_interrupted_switch_can_be_undone(deltas, tuned, monkeypatch):
    pool = filled(deltas)
    plain = Slices.scatter_
    for allowed in range(12):
        for before, after in (("all", "s2ft"), ("s2ft", "same_units"), ("other_units", "s2ft"), ("s2ft", None)):
            pool.use(before)
            left = [allowed]

            def stop(self, tensor, values, left=left):
                plain(self, tensor, values)
                left[0] -= 1
                if left[0] < 0:
                    raise KeyboardInterrupt

            with monkeypatch.context() as patched:
                patched.setattr(Slices, "scatter_", stop)
                try:
                    pool.use(after)
                except KeyboardInterrupt:
                    assert pool.active is None
            name = (before, None, after)[allowed % 3]
            pool.use(name)
            assert same(pool.model, tuned[name])


def test_after_the_last_adapter_the_pool_takes_the_weights_as_they_are(deltas):
    pool = filled({"s2ft": deltas["s2ft"]})
    pool.unload("s2ft")
    with torch.no_grad():
        for parameter in pool.model.parameters():
            parameter.add_(1.0)
    changed = state(pool.model)
    with pytest.raises(ValueError, match="fingerprint"):
        pool.load("s2ft", deltas["s2ft"])
    delta = Delta(
        deltas["s2ft"].selection,
        deltas["s2ft"].values,
        attach(tiny_copy(pool.model), METHODS["s2ft"]).delta().fingerprints,
    )
    pool.load("s2ft", delta)
    pool.use("s2ft")
    pool.use(None)
    assert same(pool.model, changed)


def test_the_pool_starts_anew_after_a_combination_too(deltas):
    pool = filled({"s2ft": deltas["s2ft"]})
    pool.fuse({"s2ft": 0.5})
    pool.unload("s2ft")
    pool.use(None)
    with torch.no_grad():
        next(pool.model.parameters()).add_(1)
    assert not pool._overlay._seen


def test_rows_loaded_in_inference_mode_can_be_trained(deltas):
    pool = AdapterPool(model_of(), storage="rows")
    with torch.inference_mode():
        pool.load("s2ft", deltas["s2ft"])
    assert not any(parameter.is_inference() for parameter in pool.model.parameters())


def tiny_copy(model):
    copy = model_of()
    copy.load_state_dict(model.state_dict())
    return copy
