"""One folder, every loader: what PEFT and transformers make of an adapter is what Delta.apply_ makes of it."""

import copy
import dataclasses
import json
import subprocess
import sys

import peft
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, convert_to_lora, get_peft_model, set_peft_model_state_dict

from intaglio import Delta
from intaglio.adapter.folder import CONFIG
from intaglio.hf import DeltaConfig, S2FTConfig
from intaglio.methods import METHODS
from intaglio.methods import S2FT as Method
from support import tiny
from support.peft_models import BF16, FP32, RANDOM, S2FT, applied, delta_folder, logits, refuses, same, train, trained

# Settings that choose something in a tiny model; a method without a row runs on its defaults.
SETTINGS = {
    "s2ft": {"o": 0.5, "down": 0.25, "v": 0.5},
    "id3": {"budget": 0.05, "steps": 2},
    "gradient": {"budget": 0.05},
    "snip": {"budget": 0.05},
    "random": {"budget": 0.05},
    "pafi": {"budget": 0.02},
    "shira": {"budget": 0.05},
    "fishmask": {"budget": 0.02},
    "bitfit": {"tensors": "one_dimensional"},
    "ist": {"layers": 1, "of": {"name": "s2ft", "o": 0.5, "down": 0.25}},
    "rst": {"layers": 1, "of": {"name": "bitfit", "tensors": "one_dimensional"}},
}
EVERY = {name: SETTINGS.get(name, {}) for name in METHODS}


MOST = ["gqa_llama", "tied_llama", "fused_phi3", "transposed_gpt2", "mixtral", "bert"]


@pytest.mark.parametrize("name", MOST)
@pytest.mark.parametrize("method", EVERY)
def test_every_method_loads_everywhere(method, name, tmp_path):
    """S2FT checklist 16: on a fresh base, by every loader, logits to 1e-5; merged, every bit."""
    check_loaders(name, method, tmp_path)


# PEFT cannot wrap both GPT-OSS' attention, which holds its sinks, and the projections inside it.
@pytest.mark.parametrize("name", sorted(set(tiny.MODELS) - {"deberta", "experts_gpt_oss", *MOST}))
def test_whole_weights_reach_every_layout(name, tmp_path):
    """Every parameter through a wrapper: a module that read a weight past it would show."""
    check_loaders(name, "full", tmp_path)


def check_loaders(name, method, tmp_path):
    folder = delta_folder(tmp_path, {"name": method} | EVERY[method], name)
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
def test_it_compiles(config):
    model = get_peft_model(tiny.build("gqa_llama"), copy.deepcopy(config)).eval()
    assert torch.equal(logits(torch.compile(model, backend="aot_eager")), logits(model))


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


def conversion_case(case, folder):
    """A PEFT model whose config names no target, with values away from the base."""
    if case == "loaded":
        delta_folder(folder, {"name": "s2ft"} | S2FT)
        return PeftModel.from_pretrained(tiny.build("gqa_llama"), folder).eval()
    if case == "random":
        rows = {"name": "random", "budget": 0.05, "include": ["*o_proj.weight", "*down_proj.weight"]}
        return trained(DeltaConfig(method=rows), steps=3).eval()
    return trained(S2FTConfig(**S2FT, layers_to_transform=[1] if case == "one layer" else None), steps=3).eval()


@pytest.mark.parametrize("case", ["s2ft", "one layer", "random", "loaded"])
def test_an_adapter_without_targets_converts_to_lora(case, tmp_path):
    """PEFT's `convert_to_lora` adds to the config's targets: an adapter that names parameters has a list of none."""
    model = conversion_case(case, tmp_path)
    expected, adapted = logits(model), {name.rpartition(".")[0] for name in model.peft_config["default"].parameters}
    config, tensors = convert_to_lora(model, rank=32)
    assert config.target_modules == adapted
    lora = get_peft_model(tiny.build("gqa_llama"), config).eval()
    assert not set_peft_model_state_dict(lora, tensors).unexpected_keys
    assert len(tensors) == 2 * len(adapted)
    assert not torch.equal(logits(tiny.build("gqa_llama")), expected)
    assert (logits(lora) - expected).abs().max() < 1e-4


def test_a_config_used_up_by_a_refusal_still_chooses():
    """A choice that fails leaves the config as it was: without targets, it is not restricted."""
    config = S2FTConfig(**S2FT)
    with refuses("unknown|structure|no "):
        get_peft_model(torch.nn.Sequential(torch.nn.Linear(3, 3)), config)
    assert config.target_modules is None
    assert get_peft_model(tiny.build("gqa_llama"), config).peft_config["default"].trainable == config.trainable > 0


def test_the_shares_of_the_config_are_those_of_the_method():
    """Names and defaults stand twice, for readers and for command lines; they may not drift apart."""
    config = {field.name: field for field in dataclasses.fields(S2FTConfig)}
    for field in dataclasses.fields(Method):
        assert config[field.name].default == field.default
        assert config[field.name].metadata["help"]
    assert S2FTConfig().method == Method().to_dict()


def test_importing_registers():
    """In a fresh process, `import intaglio.hf` is enough; the package itself stays cheap to import."""
    code = """
import sys, intaglio
assert "peft" not in sys.modules
import peft, intaglio.peft_tuners
types = peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING
assert "INTAGLIO" not in types, "only register() teaches PEFT"
import intaglio.hf
assert types["INTAGLIO"] == "intaglio_" and types["INTAGLIO_BOTTLENECK"] == "bottleneck_"
before = dict(types)
intaglio.peft_tuners.register()
assert types == before
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING["INTAGLIO"] is DeltaConfig
