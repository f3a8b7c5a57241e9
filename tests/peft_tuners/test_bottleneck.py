"""Bottleneck adapters: their formula, PEFT's life cycle around them, and what is refused."""

import copy
import json

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from intaglio import IST, Batches, attach
from intaglio.hf import BottleneckConfig
from intaglio.peft_tuners.bottleneck_config import ACTIVATIONS
from intaglio.peft_tuners.bottleneck_layer import BottleneckLayer
from support import tiny
from support.peft_models import logits, refuses, same, train

PLACEMENTS = ("series", "parallel")
NAMES = ["gqa_llama", "transposed_gpt2", "fused_phi3", "opt", "bert"]
LLAMA = {"series": ("o", "down"), "parallel": ("q", "k", "v", "up", "down")}


def adapted(name="gqa_llama", *, dtype=torch.float32, **fields):
    """A tiny model with an adapter that already changes something."""
    fields = {"bottleneck_size": 8, "init_weights": False} | fields
    return get_peft_model(tiny.build(name, dtype=dtype), BottleneckConfig(**fields)).eval()


def layers(model):
    return {path: module for path, module in model.named_modules() if isinstance(module, BottleneckLayer)}


def adapter_tensors(model):
    return {name: p for name, p in model.named_parameters() if "bottleneck_" in name}


def watch(layer, seen):
    """Record what one call reads and puts out."""

    def hook(_, args, kwargs, y):
        seen.append((args[0] if args else kwargs["hidden_states"], y))

    return layer.register_forward_hook(hook, with_kwargs=True)


def change(x, layer, activation, scaling):
    """The formula, by hand: scaling · U act(D x)."""
    down, up = layer.bottleneck_down["default"].weight, layer.bottleneck_up["default"].weight
    return scaling * (ACTIVATIONS[activation](x @ down.T) @ up.T)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", ["gqa_llama", "transposed_gpt2"])
def test_every_adapted_module_follows_the_formula(name, placement, activation):
    model = adapted(name, placement=placement, activation=activation, scaling=1.5)
    assert layers(model)
    for path, layer in layers(model).items():
        seen: list = []
        watch(layer, seen)
        logits(model, name)
        [(x, y)] = seen
        h = layer.base_layer(x)
        by_hand = h + change(h if placement == "series" else x, layer, activation, 1.5)
        assert (y - by_hand).abs().max() < 1e-6, path
        assert (y - h).abs().max() > 1e-3, path


def test_the_activations_are_what_their_names_say():
    x = torch.linspace(-3, 3, 25)
    assert torch.equal(ACTIVATIONS["relu"](x), x.clamp(min=0))
    assert torch.allclose(ACTIVATIONS["silu"](x), x / (1 + (-x).exp()))
    assert torch.allclose(ACTIVATIONS["gelu"](x), x * 0.5 * (1 + torch.erf(x / 2**0.5)), atol=1e-6)
    assert torch.allclose(ACTIVATIONS["tanh"](x), 1 - 2 / ((2 * x).exp() + 1), atol=1e-6)


def test_whole_modules():
    """He et al.'s place, beside the whole MLP, and after an attention that puts out a tuple and is called by keyword."""
    for placement in PLACEMENTS:
        model = adapted(placement=placement, target_modules=["mlp", "self_attn"], scaling=4.0)
        for layer in layers(model).values():
            wrapped, bare = [], []
            watch(layer, wrapped)
            watch(layer.base_layer, bare)
            logits(model)
            [(x, y)], [(_, h)] = wrapped, bare
            if isinstance(h, tuple):
                assert len(y) == len(h)
                y, h = y[0], h[0]
            expected = h + change(h if placement == "series" else x, layer, "relu", 4.0)
            assert (y - expected).abs().max() < 1e-6
        assert len(layers(model)) == 4
        assert same(model.unload(), tiny.build("gqa_llama"))


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_adapter_changes_nothing_and_only_it_learns(name, placement):
    base = tiny.build(name)
    model = get_peft_model(tiny.build(name), BottleneckConfig(bottleneck_size=8, placement=placement)).eval()
    assert torch.equal(logits(model, name), logits(base, name))
    trainable = {key for key, p in model.named_parameters() if p.requires_grad}
    assert trainable == adapter_tensors(model).keys()
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    train(model, name, steps=2)
    moved = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    assert moved == trainable  # D moves from the second step on, when U is no longer zero
    with model.disable_adapter():
        assert torch.equal(logits(model, name), logits(base, name))
    assert not torch.equal(logits(model, name), logits(base, name))
    assert torch.equal(logits(model.unload(), name), logits(base, name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", ["gqa_llama", "transposed_gpt2"])
def test_a_saved_adapter_loads_bit_for_bit(name, placement, dtype, tmp_path):
    model = adapted(name, dtype=dtype, placement=placement, activation="silu", scaling=2.0, layers_to_transform=[1])
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "INTAGLIO_BOTTLENECK"
    assert (config["placement"], config["activation"], config["scaling"]) == (placement, "silu", 2.0)
    again = PeftModel.from_pretrained(tiny.build(name, dtype=dtype), tmp_path).eval()
    expected, found = adapter_tensors(model), adapter_tensors(again)
    assert expected.keys() == found.keys()
    assert all(torch.equal(t, found[key]) and t.dtype == torch.float32 for key, t in expected.items())
    assert torch.equal(logits(again, name), logits(model, name))
    assert not any(p.requires_grad for p in again.parameters())
    thrifty = PeftModel.from_pretrained(tiny.build(name, dtype=dtype), tmp_path, low_cpu_mem_usage=True).eval()
    assert torch.equal(logits(thrifty, name), logits(model, name))
    native = tiny.build(name, dtype=dtype)
    native.load_adapter(str(tmp_path))
    assert torch.allclose(logits(native, name), logits(model, name), atol=1e-6 if dtype == torch.float32 else 0.1)


def test_two_adapters():
    """Of different placements and sizes on shared modules: one at a time, both (their changes add up), deleted."""
    model = adapted(target_modules=["down_proj"])
    model.add_adapter(
        "second", BottleneckConfig(bottleneck_size=3, placement="parallel", target_modules=["down_proj"], init_weights=False)
    )
    first = logits(model)
    model.set_adapter("second")
    assert all(p.requires_grad == (".second." in key) for key, p in model.named_parameters())
    second = logits(model)
    assert not torch.equal(first, second)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.base_model.set_adapter(["default", "second"])
    layer, x = next(iter(layers(model).values())), torch.randn(2, 5, 48)
    h = layer.base_layer(x)
    parts = []
    for adapter, reads in (("default", h), ("second", x)):
        down, up = layer.bottleneck_down[adapter].weight, layer.bottleneck_up[adapter].weight
        parts.append(torch.relu(reads @ down.T) @ up.T)
    assert (layer(x) - (h + parts[0] + parts[1])).abs().max() < 1e-6
    model.set_adapter("second")
    model.delete_adapter("default")
    assert torch.equal(logits(model), second)
    assert not any(".default." in key for key, _ in model.named_parameters())


def test_default_targets():
    for placement, roles in LLAMA.items():
        model = adapted(placement=placement)
        ends = {path.rpartition(".")[2].removesuffix("_proj") for path in layers(model)}
        assert ends == set(roles)
        assert len(layers(model)) == 2 * len(roles)
        model = adapted(placement=placement, layers_to_transform=[1], exclude_modules=["down_proj"])
        assert {path.split(".")[-3] for path in layers(model)} == {"1"}
        assert len(layers(model)) == len(roles) - 1
    assert len(layers(adapted("transposed_gpt2"))) == 4
    sizes = {tuple(p.shape) for p in adapter_tensors(adapted("transposed_gpt2", placement="parallel")).values()}
    assert sizes == {(8, 32), (96, 8), (48, 8), (8, 48), (32, 8)}  # in and out of attn.c_attn, mlp.c_fc, mlp.c_proj
    ends = {path.partition("encoder.layer.")[2] for path in layers(adapted("bert"))}
    assert ends == {"0.output.dense", "0.attention.output.dense", "1.output.dense", "1.attention.output.dense"}


def test_default_targets_of_many_layers(tmp_path):
    """PEFT shortens long lists of names; what is adapted stays the same, in the saved config too."""
    base = tiny._llama(num_hidden_layers=14)
    config = BottleneckConfig(bottleneck_size=2, layers_to_transform=list(range(1, 14)))
    model = get_peft_model(copy.deepcopy(base), config)
    ends = ("self_attn.o_proj", "mlp.down_proj")
    wanted = {f"base_model.model.model.layers.{i}.{end}" for i in range(1, 14) for end in ends}
    assert layers(model).keys() == wanted
    model.save_pretrained(tmp_path)
    assert layers(PeftModel.from_pretrained(base, tmp_path)).keys() == wanted


def test_dropout_is_on_what_the_adapter_reads_and_off_in_eval():
    model = adapted(dropout=0.5)
    expected = logits(model)
    assert torch.equal(logits(model), expected)
    model.train()
    assert not torch.equal(logits(model), logits(model))
    layer = next(iter(layers(model).values()))
    assert isinstance(layer.bottleneck_dropout["default"], torch.nn.Dropout)


def test_biases_of_the_base():
    for bias, ends in (("bottleneck_only", ("out_proj.base_layer.bias", "fc2.base_layer.bias")), ("all", (".bias",))):
        model = adapted("opt", bias=bias)
        trained = {key for key, p in model.named_parameters() if p.requires_grad} - adapter_tensors(model).keys()
        assert trained == {key for key, _ in model.named_parameters() if key.endswith(ends)}
        assert trained


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["gqa_llama", "transposed_gpt2"])
def test_gradient_checkpointing_changes_nothing(name, reentrant):
    for placement in PLACEMENTS:
        plain, checkpointed = adapted(name, placement=placement).train(), adapted(name, placement=placement).train()
        checkpointed.load_state_dict(plain.state_dict())
        checkpointed.enable_input_require_grads()
        checkpointed.activation_checkpointing_enable({"use_reentrant": reentrant})
        for model in (plain, checkpointed):
            model(**tiny.batch(name)).loss.backward()
        found = adapter_tensors(checkpointed)
        assert all(torch.equal(p.grad, found[key].grad) for key, p in adapter_tensors(plain).items())
        assert all(p.grad.abs().max() > 0 for p in found.values())


def test_sft_trainer_takes_the_config(tmp_path):
    base = tiny.save_folder(tmp_path / "base")
    rows = [{"prompt": f"add {i} and 1: ", "completion": str(i + 1)} for i in range(8)]
    args = SFTConfig(
        str(tmp_path / "run"), max_steps=2, gradient_checkpointing=True, use_cpu=True, report_to="none", disable_tqdm=True,
        per_device_train_batch_size=2, learning_rate=1e-2,
    )  # fmt: skip
    config = BottleneckConfig(bottleneck_size=8, task_type="CAUSAL_LM", modules_to_save=["lm_head"])
    trainer = SFTTrainer(base, args=args, train_dataset=Dataset.from_list(rows), peft_config=copy.deepcopy(config))
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / "adapter")
    expected = {key: t for key, t in trainer.model.state_dict().items() if "bottleneck_" in key or "modules_to_save" in key}
    assert expected
    assert all(torch.equal(t, loaded.state_dict()[key]) for key, t in expected.items())
    ups = [t for key, t in expected.items() if "bottleneck_up" in key]
    assert len(ups) == 4
    assert all(t.abs().max() > 0 for t in ups)
    bare = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert not torch.equal(logits(loaded), logits(bare))


@pytest.mark.parametrize("targets", [None, ["mlp", "self_attn"]], ids=["linear", "whole"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_layers_train_in_turn_and_damping_scales_u(placement, targets):
    """IST over bottlenecks: the probe's loss is that of a copy whose U was multiplied by β; only active layers move."""
    base = tiny._llama(num_hidden_layers=4)
    config = BottleneckConfig(bottleneck_size=4, placement=placement, target_modules=targets, init_weights=False, dropout=0.1)
    model = get_peft_model(base, config).train()
    twin, batch = copy.deepcopy(model).eval(), tiny.batch("gqa_llama", seed=5)
    for name, parameter in twin.named_parameters():
        if "bottleneck_up" in name and (".layers.1." in name or ".layers.3." in name):
            parameter.data.mul_(0.3)
    tuner = attach(model, IST(layers=1, interval=2, suppression=0.3), probe=Batches([batch]))
    [found, untouched] = tuner.rotation.losses([[1, 3], []], batch)
    with torch.no_grad():
        assert found == pytest.approx(float(twin(**batch).loss), abs=1e-5)
    assert abs(found - untouched) > 1e-3
    optimizer = tuner.optimizer(torch.optim.AdamW, lr=1e-2)
    for step in range(5):
        before, active = {k: p.detach().clone() for k, p in model.named_parameters()}, tuner.rotation.active
        model.train()(**tiny.batch("gqa_llama", seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        moved = {int(k.split(".layers.")[1].split(".")[0]) for k, p in model.named_parameters() if not torch.equal(p, before[k])}
        assert moved == set(active)
    assert tuner.rotation.probes == 2


def test_merging_and_mixed_batches_are_refused():
    model = adapted()
    for merge in (model.merge_and_unload, model.merge_adapter, next(iter(layers(model).values())).merge):
        with refuses("nonlinear and cannot be merged"):
            merge()
    model.unmerge_adapter()
    with refuses("adapter_names: bottleneck adapters serve one adapter per batch"):
        logits(model, adapter_names=["default", "__base__", "default"])
    assert len(layers(model)) == 4


BAD = {
    "size": ({"bottleneck_size": 0}, "bottleneck_size=0: give a whole number"),
    "share": ({"bottleneck_size": 0.5}, "bottleneck_size=0.5"),
    "placement": ({"placement": "beside"}, "placement='beside': known are series, parallel"),
    "activation": ({"activation": "swish"}, "activation='swish': known are relu, gelu, silu, tanh"),
    "bias": ({"bias": "lora_only"}, "bias='lora_only': known are none, all, bottleneck_only"),
    "no effect": ({"scaling": 0.0}, "scaling=0.0"),
    "learned": ({"scaling": "learned"}, "scaling='learned': give a finite number other than 0"),
    "nan": ({"scaling": float("nan")}, "scaling=nan"),
    "dropout": ({"dropout": 1.0}, "dropout=1.0"),
    "regex": ({"target_modules": ".*mlp", "layers_to_transform": [0]}, "cannot be used when `target_modules` is a str"),
    "pattern": ({"layers_pattern": "layers"}, "`layers_to_transform` must also be specified"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_fields(case):
    fields, message = BAD[case]
    with refuses(message):
        BottleneckConfig(**fields)


def test_all_bad_fields_come_at_once():
    with pytest.raises(ValueError) as error:
        BottleneckConfig(bottleneck_size=-1, placement="", dropout=2)
    for part in ("BottleneckConfig:", "bottleneck_size=-1", "placement=''", "dropout=2"):
        assert part in str(error.value)


BAD_TARGETS = {
    "norm": ("gqa_llama", ["input_layernorm"], "layers.0.input_layernorm is a LlamaRMSNorm"),
    "embedding": ("gqa_llama", ["embed_tokens"], "embed_tokens is a Embedding"),
    "absent": ("gqa_llama", ["fc1"], "Target modules .*fc1.* not found"),
    "nested": ("gqa_llama", ["mlp", "down_proj"], r"mlp\.down_proj lies inside model.layers.0.mlp"),
    "experts": ("mixtral", None, "no default, .* holds stacked weights"),
}


@pytest.mark.parametrize("case", BAD_TARGETS)
def test_bad_targets(case):
    name, targets, message = BAD_TARGETS[case]
    base = tiny.build(name)
    with refuses(message):
        get_peft_model(base, BottleneckConfig(bottleneck_size=8, target_modules=targets))
    assert same(base, tiny.build(name))


def test_a_second_adapter_inside_an_adapted_module_is_refused():
    model = adapted(target_modules=["mlp"])
    with refuses("lies inside model.layers.0.mlp"):
        model.add_adapter("second", BottleneckConfig(target_modules=["down_proj"]))


def test_weights_read_past_wrappers_are_refused():
    base = torch.nn.ModuleDict({"attention": torch.nn.MultiheadAttention(8, 2)})
    with refuses("out_proj: MultiheadAttention reads this weight past any wrapper"):
        get_peft_model(base, BottleneckConfig(target_modules=["out_proj"]))
