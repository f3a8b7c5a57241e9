"""One folder, every loader: what PEFT and transformers make of an adapter is what Delta.apply_ makes of it."""

import copy
import json
import subprocess
import sys

import peft
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model

import tiny
from intaglio import Delta, attach
from intaglio.adapter_folder import CONFIG
from intaglio.hf import DeltaConfig, S2FTConfig
from intaglio.methods import METHODS, build
from intaglio.probe import Batches

# Settings that choose something in a tiny model; a method without a row runs on its defaults.
SETTINGS = {
    "s2ft": {"o": 0.5, "down": 0.25, "v": 0.5},
    "random": {"budget": 0.05},
    "pafi": {"budget": 0.02},
}
AT_START = {name: SETTINGS.get(name, {}) for name, cls in METHODS.items() if cls.phase == "start"}
BF16, FP32 = torch.bfloat16, torch.float32
S2FT = {"o": 0.5, "down": 0.25}
RANDOM = {"name": "random", "budget": 0.05}


def delta_folder(folder, method, name="gqa_llama", dtype=FP32, seed=0):
    """An adapter trained by `attach` for two steps."""
    tuner = attach(tiny.build(name, dtype=dtype), build(method))
    optimizer = tuner.optimizer(torch.optim.AdamW, lr=1e-2)
    for step in range(2):
        tuner.model(**tiny.batch(name, seed=seed + step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return str(tuner.save(folder))


def trained(config, name="gqa_llama", dtype=FP32, steps=2, seed=0):
    """A PEFT model, trained for some steps."""
    model = get_peft_model(tiny.build(name, dtype=dtype), config)
    train(model, name, steps, seed)
    return model


def train(model, name="gqa_llama", steps=2, seed=0):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        model(**tiny.batch(name, seed=seed + step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def logits(model, name="gqa_llama", **kwargs):
    return model(**tiny.batch(name, seed=9), **kwargs).logits


def applied(folder, name="gqa_llama", dtype=FP32):
    model = tiny.build(name, dtype=dtype)
    Delta.load(folder).apply_(model)
    return model


def same(model, other):
    mine, theirs = model.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(t, theirs[key]) for key, t in mine.items())


def refuses(message):
    return pytest.raises(ValueError, match=message)


MOST = ["gqa_llama", "tied_llama", "fused_phi3", "transposed_gpt2", "mixtral", "bert"]


@pytest.mark.parametrize("name", MOST)
@pytest.mark.parametrize("method", AT_START)
def test_every_method_loads_everywhere(method, name, tmp_path):
    """Checklist 16: on a fresh base, by every loader, logits to 1e-5; merged, every bit."""
    check_loaders(name, method, tmp_path)


@pytest.mark.parametrize("name", sorted(set(tiny.MODELS) - {"deberta", *MOST}))
def test_whole_weights_reach_every_layout(name, tmp_path):
    """Every parameter through a wrapper: a module that read a weight past it would show."""
    check_loaders(name, "full", tmp_path)


def check_loaders(name, method, tmp_path):
    folder = delta_folder(tmp_path, {"name": method} | AT_START[method], name)
    expected = applied(folder, name)
    loaded = PeftModel.from_pretrained(tiny.build(name), folder).eval()
    native = tiny.build(name)
    native.load_adapter(folder)
    for model in (loaded, native):
        assert (logits(model, name) - logits(expected, name)).abs().max() < 1e-5
    assert not torch.equal(logits(loaded, name), logits(tiny.build(name), name))
    assert same(loaded.merge_and_unload(safe_merge=True), expected)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("name", ["gqa_llama", "qkv_bias_qwen2", "transposed_gpt2", "opt"])
@pytest.mark.parametrize(
    "config", [S2FTConfig(**S2FT, task_type="CAUSAL_LM"), DeltaConfig(method=RANDOM)], ids=["s2ft", "random"]
)
def test_a_folder_that_peft_saves_is_a_delta(config, name, dtype, tmp_path):
    model = trained(copy.deepcopy(config), name, dtype)
    tuned = logits(model, name)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.build(name, dtype=dtype), tmp_path)
    assert torch.equal(logits(again, name), tuned)
    merged = model.merge_and_unload()
    assert same(applied(tmp_path, name, dtype), merged)
    delta = Delta.load(tmp_path)
    assert delta.method == config.method
    assert delta.of == sum(p.numel() for p in tiny.build(name).parameters())
    assert {values.dtype for values in delta.values.values()} == {dtype}
    settings = json.loads((tmp_path / CONFIG).read_text())
    assert settings["sha256"]
    assert settings["trainable"] == delta.selection.size
    assert "probe" not in settings


@pytest.mark.parametrize("config", [S2FTConfig(**S2FT), DeltaConfig(method=RANDOM)], ids=["s2ft", "random"])
def test_merging_100_times_in_bf16_leaves_the_base_as_it_was(config):
    """Checklist 17."""
    name = "tied_llama"
    model = trained(copy.deepcopy(config), name, BF16)
    base, tuned = tiny.build(name, dtype=BF16), None
    for _ in range(100):
        model.merge_adapter()
        tuned = logits(model, name) if tuned is None else tuned
        assert torch.equal(model.get_input_embeddings().weight, model.get_output_embeddings().weight)
        model.unmerge_adapter()
    assert not torch.equal(tuned, logits(base, name))
    assert same(model.unload(), base)


def three_adapters(name, dtype=FP32):
    """Adapters of unequal size: columns of o and down, rows of v as well, single entries."""
    model = trained(S2FTConfig(**S2FT), name, dtype)
    model.add_adapter("rows", S2FTConfig(o=None, down=0.5, v=0.5, up=0.2, seed=1))
    model.add_adapter("entries", DeltaConfig(method=RANDOM))
    for position, adapter in enumerate(("rows", "entries")):
        model.set_adapter(adapter)
        train(model, name, seed=20 * position)
    return model.eval()


@pytest.mark.parametrize("name", ["gqa_llama", "tied_llama", "transposed_gpt2"])
def test_mixed_batches_equal_each_adapter_merged(name):
    """Checklist 18: fp32, to 1e-5, with adapters of unequal size and a row without any."""
    model = three_adapters(name)
    names = ["rows", "__base__", "default", "entries", "rows"]
    batch = {key: t[:, :12] for key, t in tiny.batch(name, rows=5, seed=9).items()}
    with torch.no_grad():
        mixed = model(**batch, adapter_names=names).logits
        for row, adapter in enumerate(names):
            if adapter != "__base__":
                model.set_adapter(adapter)
                model.merge_adapter()
            alone = (
                model.get_base_model()(**batch).logits[row] if adapter != "__base__" else tiny.build(name)(**batch).logits[row]
            )
            assert (mixed[row] - alone).abs().max() < 1e-5
            if adapter != "__base__":
                model.unmerge_adapter()


def test_mixed_batches_generate_with_beams():
    model = three_adapters("gqa_llama")
    ids = tiny.batch("gqa_llama", rows=2)["input_ids"]
    options = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    mixed = model.generate(input_ids=ids, adapter_names=["entries", "__base__"], **options)
    model.set_adapter("entries")
    assert torch.equal(mixed[0], model.generate(input_ids=ids, **options)[0])
    with model.disable_adapter():
        assert torch.equal(mixed[1], model.generate(input_ids=ids, **options)[1])


def test_mixed_batches_are_refused_where_they_cannot_be_right():
    model = three_adapters("gqa_llama")
    for names, message in ((["default", "nobody", "rows"], "nobody"), (["default"], "cannot be told apart")):
        with refuses(message):
            logits(model, adapter_names=names)
    names = ["default", "__base__", "rows"]
    with refuses("training mode"):
        logits(model.train(), adapter_names=names)
    model.eval().merge_adapter()
    with refuses("unmerge_adapter"):
        logits(model, adapter_names=names)
    names = ["default", "__base__", "default"]
    experts = get_peft_model(tiny.build("mixtral"), DeltaConfig(method={"name": "full", "include": ("*experts*",)})).eval()
    with refuses("experts.*one adapter at a time"):
        logits(experts, "mixtral", adapter_names=names)
    flat = get_peft_model(tiny.build("opt"), S2FTConfig(**S2FT)).eval()
    with refuses("fc2.*one adapter at a time"):
        logits(flat, "opt", adapter_names=names)


@pytest.mark.parametrize("config", [S2FTConfig(**S2FT), DeltaConfig(method=RANDOM)], ids=["s2ft", "random"])
def test_it_compiles(config):
    model = get_peft_model(tiny.build("gqa_llama"), copy.deepcopy(config)).eval()
    assert torch.equal(logits(torch.compile(model, backend="aot_eager")), logits(model))


def test_several_adapters_switch_disable_and_go():
    model = three_adapters("gqa_llama")
    base, outputs = logits(tiny.build("gqa_llama")), {}
    for adapter in ("default", "rows", "entries"):
        model.set_adapter(adapter)
        outputs[adapter] = logits(model)
        with model.disable_adapter():
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), outputs[adapter])
        assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {adapter}
    assert not torch.equal(outputs["default"], outputs["rows"])
    status = model.get_model_status()
    assert (status.enabled, set(status.peft_types.values())) == (True, {"INTAGLIO"})
    model.set_adapter("default")
    model.delete_adapter("rows")
    assert torch.equal(logits(model), outputs["default"])
    assert not any("rows" in key for key in model.state_dict())
    with refuses("does not exist"):
        model.delete_adapter("rows")


def test_disjoint_adapters_act_together_and_overlapping_ones_are_refused():
    model = trained(S2FTConfig(**S2FT))
    model.add_adapter("twin", S2FTConfig(**S2FT))
    model.add_adapter("other", S2FTConfig(**S2FT, exclude=model.peft_config["default"].chosen))
    model.set_adapter("other")
    train(model, seed=5)
    model.base_model.set_adapter(["default", "other"])
    together = logits(model)
    model.merge_adapter()
    assert (logits(model) - together).abs().max() < 1e-5
    model.unmerge_adapter()
    assert same(copy.deepcopy(model).unload(), tiny.build("gqa_llama"))
    model.base_model.set_adapter(["default", "twin"])
    for use in (lambda: logits(model), model.merge_adapter):
        with refuses("'default' and 'twin' both replace entries"):
            use()


def test_gradients_are_the_dense_ones_and_only_the_chosen_inputs_are_kept():
    name = "gqa_llama"
    model = get_peft_model(tiny.build(name), S2FTConfig(o=0.5, down=0.25, v=0.5))
    dense = tiny.build(name)
    batch = tiny.batch(name)
    dense(**batch).loss.backward()
    model(**batch).loss.backward()
    for path, entries in model.peft_config["default"].chosen.items():
        layer = model.get_base_model().get_submodule(path.removesuffix(".weight"))
        expected = entries.gather(dense.get_parameter(path).grad)
        assert (layer.intaglio_values["default"]["weight"].grad - expected).abs().max() < 1e-6
    kept = []
    x = torch.randn(4, 7, 48)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model.get_base_model().model.layers[0].mlp.down_proj(x)
    activations = [t for t in kept if t.shape[:-1] == x.shape[:-1]]
    assert [t.shape[-1] for t in activations] == [12]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    grads = []
    for checkpointing in (False, True):
        model = get_peft_model(tiny.build("gqa_llama"), S2FTConfig(**S2FT)).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model(**tiny.batch("gqa_llama")).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_whole_modules_beside_the_slices(tmp_path):
    """modules_to_save: the classifier is trained, saved and loaded whole; Delta.load says why it cannot read that."""
    model = trained(S2FTConfig(**S2FT, task_type="SEQ_CLS", modules_to_save=["classifier"]), "bert")
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.build("bert"), tmp_path)
    assert torch.equal(logits(again, "bert"), logits(model, "bert"))
    assert not torch.equal(again.classifier.weight, tiny.build("bert").classifier.weight)
    with refuses("modules_to_save"):
        Delta.load(tmp_path)


def places(**kwargs):
    return sorted(get_peft_model(tiny.build("gqa_llama"), S2FTConfig(**kwargs)).peft_config["default"].parameters)


def test_restrictions():
    down, out = "model.layers.{}.mlp.down_proj.weight", "model.layers.{}.self_attn.o_proj.weight"
    assert places(**S2FT) == [down.format(0), out.format(0), down.format(1), out.format(1)]
    assert places(**S2FT, layers_to_transform=[1]) == [down.format(1), out.format(1)]
    assert places(**S2FT, layers_to_transform=0, layers_pattern="layers") == [down.format(0), out.format(0)]
    assert places(**S2FT, target_modules=["down_proj"]) == [down.format(0), down.format(1)]
    assert places(**S2FT, target_modules=r".*1\.mlp\.down_proj") == [down.format(1)]
    assert places(**S2FT, exclude_modules=["o_proj"]) == [down.format(0), down.format(1)]
    assert places(o=0.5, q=0.5, k=0.5, v=0.5, up=0.1, gate=0.1, target_modules="all-linear") == places(
        o=0.5, q=0.5, k=0.5, v=0.5, up=0.1, gate=0.1
    )
    assert places(**S2FT, target_modules=["down_proj", "lm_head"])[0] == "lm_head.weight"


def test_the_choice_may_look_at_data_and_is_made_once():
    class Once(Batches):
        reads = 0

        def batches(self):
            Once.reads += 1
            return super().batches()

    config = S2FTConfig(**S2FT, select="activation", probe=Once([tiny.batch("gqa_llama")]))
    model = get_peft_model(tiny.build("gqa_llama"), config)
    chosen = attach(tiny.build("gqa_llama"), build(config.method), probe=Batches([tiny.batch("gqa_llama")])).selection
    assert config.chosen == chosen
    reads = Once.reads
    model.add_adapter("copy", config)
    assert Once.reads == reads > 0


def test_auto_class_and_little_memory(tmp_path):
    base = tiny.save_folder(tmp_path / "base")
    model = get_peft_model(AutoPeftModelForCausalLM._target_class.from_pretrained(base), S2FTConfig(**S2FT))
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    auto = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    fresh = AutoPeftModelForCausalLM._target_class.from_pretrained(base)
    thrifty = PeftModel.from_pretrained(fresh, tmp_path / "adapter", low_cpu_mem_usage=True)
    assert torch.equal(logits(auto), logits(model))
    assert torch.equal(logits(thrifty), logits(model))


def test_transformers_own_adapters(tmp_path):
    """add_adapter, save_pretrained (twice into one folder), load_adapter, set_adapter, disable, delete."""
    model = tiny.build("gqa_llama")
    model.add_adapter(S2FTConfig(**S2FT))
    model.save_pretrained(tmp_path)
    train(model)
    model.save_pretrained(tmp_path)
    assert (logits(applied(tmp_path)) - logits(model)).abs().max() < 1e-5
    assert {v.dtype for v in model.model.layers[0].mlp.down_proj.intaglio_values["default"].values()} == {FP32}
    fresh = tiny.build("gqa_llama")
    fresh.load_adapter(str(tmp_path), adapter_name="one")
    with pytest.warns(UserWarning, match="multiple adapters"):
        fresh.load_adapter(str(tmp_path), adapter_name="two")
    fresh.set_adapter("two")
    assert torch.equal(logits(fresh), logits(model))
    fresh.disable_adapters()
    assert torch.equal(logits(fresh), logits(tiny.build("gqa_llama")))
    fresh.enable_adapters()
    fresh.delete_adapter("one")
    assert torch.equal(logits(fresh), logits(model))
    with refuses("otswap"):
        fresh.load_adapter(str(tmp_path), adapter_name="two", hotswap=True)


def test_registration_waits_for_peft():
    """`import intaglio.hf` is cheap; PEFT knows the type as soon as it is imported."""
    code = """
import sys, intaglio.hf
assert not {"peft", "transformers", "torch"} & set(sys.modules)
import peft
assert peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING["INTAGLIO"] == "intaglio_"
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING["INTAGLIO"] is DeltaConfig
