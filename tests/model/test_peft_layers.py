"""What is known of PEFT models below PEFT: the size of the model under its adapters."""

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PrefixTuningConfig, VBLoRAConfig, get_peft_model

import intaglio.hf as hf
from intaglio import ID3, S2FT, attach
from intaglio.model.peft_layers import model_size
from support import tiny

CAUSAL = {"task_type": "CAUSAL_LM"}
CONFIGS = {
    "lora": lambda: LoraConfig(r=2, **CAUSAL),
    "dora on embeddings and attention": lambda: LoraConfig(
        r=2, use_dora=True, target_modules=["embed_tokens", "q_proj"], **CAUSAL
    ),
    "adalora, with parameters that are no layers'": lambda: AdaLoraConfig(init_r=2, target_r=1, total_step=9, **CAUSAL),
    "ia3": lambda: IA3Config(**CAUSAL),
    "vblora, with a bank of all layers": lambda: VBLoRAConfig(
        num_vectors=4, vector_length=8, target_modules=["q_proj"], **CAUSAL
    ),
    "bottleneck": lambda: hf.BottleneckConfig(bottleneck_size=2, **CAUSAL),
    "slots inside PEFT": lambda: hf.S2FTConfig(o=0.25, down=0.25, **CAUSAL),
    "a module trained as a copy": lambda: LoraConfig(r=2, modules_to_save=["lm_head", "norm"], **CAUSAL),
    "single tokens": lambda: LoraConfig(r=2, trainable_token_indices=[1, 2], **CAUSAL),
    "biases and a copy": lambda: hf.BottleneckConfig(bottleneck_size=2, bias="all", modules_to_save=["lm_head"], **CAUSAL),
    "a prompt": lambda: PrefixTuningConfig(num_virtual_tokens=3, **CAUSAL),
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", ["mha_llama", "tied_llama"])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
def test_the_size_of_a_model_is_that_of_its_base(kind, name):
    model = tiny.build(name)
    size = sum(p.numel() for p in model.parameters())
    assert model_size(model) == size
    peft_model = get_peft_model(model, CONFIGS[kind]())
    assert sum(p.numel() for p in peft_model.parameters()) > size
    assert model_size(peft_model) == size


@pytest.mark.parametrize("method", [S2FT(o=0.25, down=0.25), ID3(budget=50, steps=3)], ids=lambda method: method.name)
def test_a_tuners_values_are_not_the_models(method):
    model = tiny.build("gqa_llama")
    size = model_size(model)
    tuner = attach(model, method)
    assert model_size(model) == size
    tuner.detach()
    on_lora = get_peft_model(tiny.build("gqa_llama"), LoraConfig(r=2, **CAUSAL))
    attach(on_lora, ID3(budget=50, steps=3))
    assert model_size(on_lora) == size
    assert model_size(torch.nn.Linear(3, 2)) == 8
