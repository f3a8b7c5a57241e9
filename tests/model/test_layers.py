"""Layers are found by structure in any model; what is outside them is said."""

import peft
import pytest
import transformers as tf
from torch import nn

from intaglio.model.layers import stacks
from support import tiny

SMALL = tiny.LLAMA | {"num_hidden_layers": 3}
PLAIN = {key: value for key, value in SMALL.items() if key != "intermediate_size"}
GPT = {"vocab_size": 96, "n_positions": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "pad_token_id": 0}
BLOOM = {"vocab_size": 96, "hidden_size": 32, "n_layer": 3, "n_head": 4}


def causal(family, **fields):
    return lambda: getattr(tf, f"{family}ForCausalLM")(getattr(tf, f"{family}Config")(**fields))


# name → (model, the path of its stacks, layers)
MODELS = {
    "llama": (causal("Llama", **SMALL), ["model.layers"], 3),
    "mistral": (causal("Mistral", **SMALL), ["model.layers"], 3),
    "mixtral": (causal("Mixtral", **SMALL, num_local_experts=2), ["model.layers"], 3),
    "qwen2": (causal("Qwen2", **SMALL), ["model.layers"], 3),
    "qwen3": (causal("Qwen3", **SMALL, head_dim=8), ["model.layers"], 3),
    "gemma": (causal("Gemma", **SMALL, head_dim=8), ["model.layers"], 3),
    "gemma2": (causal("Gemma2", **SMALL, head_dim=8), ["model.layers"], 3),
    "gemma3": (lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**SMALL, head_dim=8)), ["model.layers"], 3),
    "gpt2": (lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT)), ["transformer.h"], 3),
    "gptj": (causal("GPTJ", **GPT, rotary_dim=4), ["transformer.h"], 3),
    "bloom": (causal("Bloom", **BLOOM), ["transformer.h"], 3),
    "opt": (causal("OPT", **PLAIN, ffn_dim=48, word_embed_proj_dim=32), ["model.decoder.layers"], 3),
    "falcon": (causal("Falcon", **PLAIN), ["transformer.h"], 3),
    "mpt": (causal("Mpt", vocab_size=96, d_model=32, n_layers=3, n_heads=4, max_seq_len=64), ["transformer.blocks"], 3),
    "gpt_neox": (causal("GPTNeoX", **SMALL), ["gpt_neox.layers"], 3),
    "phi3": (causal("Phi3", **SMALL), ["model.layers"], 3),
    "olmo2": (causal("Olmo2", **SMALL), ["model.layers"], 3),
    "granite": (causal("Granite", **SMALL), ["model.layers"], 3),
    "t5": (lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5)), ["encoder.block", "decoder.block"], 4),
    "bert": (tiny.ENCODERS["bert"], ["bert.encoder.layer"], 2),
    "homemade": (tiny.Homemade, ["blocks"], 2),
}  # fmt: skip
each = pytest.mark.parametrize("name", MODELS)


def expected(paths, count):
    each = count // len(paths)
    return tuple(f"{path}.{i}" for path in paths for i in range(each))


@each
def test_layers_of_whole_models(name):
    """IST checklist 29: 20 architectures and a home-made module."""
    build, paths, count = MODELS[name]
    model = build()
    names = [key for key, _ in model.named_parameters()]
    layers = stacks(model, names)
    assert layers.paths == expected(paths, count)
    assert sorted([*layers.outside, *(key for group in layers.groups for key in group)]) == sorted(names)
    for path, group in zip(layers.paths, layers.groups, strict=True):
        assert set(group) == {f"{path}.{key}" for key, _ in model.get_submodule(path).named_parameters()}
    assert not any(key.startswith(tuple(f"{path}." for path in paths)) for key in layers.outside)


@each
def test_layers_of_an_adapter(name):
    """IST checklist 29: LoRA on every linear layer; BERT's pooler and classifier are outside."""
    build, paths, count = MODELS[name]
    target = {"homemade": ["mix", "wide"], "mixtral": ["q_proj", "o_proj"]}.get(name, "all-linear")
    extra = {"fan_in_fan_out": True} if name == "gpt2" else {}
    model = peft.get_peft_model(build(), peft.LoraConfig(r=2, target_modules=target, **extra))
    names = [key for key, p in model.named_parameters() if p.requires_grad]
    layers = stacks(model, names)
    assert layers.paths == tuple(f"base_model.model.{path}" for path in expected(paths, count))
    assert all("lora_" in key for group in layers.groups for key in group)
    if name == "bert":
        assert {key.split(".")[2] for key in layers.outside} == {"bert", "classifier"}
        assert any("pooler" in key for key in layers.outside)
    else:
        assert layers.outside == ()


def test_layers_that_hold_nothing_are_passed_over():
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[0, 2], modules_to_save=["lm_head"])
    model = peft.get_peft_model(MODELS["llama"][0](), config)
    layers = stacks(model, [key for key, p in model.named_parameters() if p.requires_grad])
    assert [path[-1] for path in layers.paths] == ["0", "2"]
    assert len(layers) == 2
    assert layers.outside == ("base_model.model.lm_head.modules_to_save.default.weight",)


class Odd(nn.Module):
    """A sequential of equal blocks, beside one that is no stack, inside a list of one."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([nn.Sequential(tiny.HomemadeBlock(), tiny.HomemadeBlock(), tiny.HomemadeBlock())])
        self.head = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def test_a_sequential_of_equal_children_is_a_stack():
    layers = stacks(Odd(), [key for key, _ in Odd().named_parameters()])
    assert layers.paths == ("parts.0.0", "parts.0.1", "parts.0.2")
    assert [key.split(".")[0] for key in layers.outside] == ["head"] * 4
    root = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert stacks(root, ["0.weight", "1.weight"]).groups == (("0.weight",), ("1.weight",))


def test_no_stack_is_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with pytest.raises(ValueError, match=r"model Sequential: no stack of layers found.*\(trained: 0\.weight, 0\.bias\)"):
        stacks(model, ["0.weight", "0.bias"])
    llama = MODELS["llama"][0]()
    with pytest.raises(ValueError, match="at least two members hold something to train"):
        stacks(llama, ["model.layers.0.mlp.up_proj.weight", "lm_head.weight"])
