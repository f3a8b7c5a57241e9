"""What the doctor's tests ask it, and adapters to ask about."""

import torch
from peft import LoraConfig, get_peft_model

from intaglio.core.entries import Slices
from intaglio.core.selection import Selection
from intaglio.doctor.examine import examine
from support import tiny

PARTS = {"down": ("mlp.down_proj", 1), "o": ("self_attn.o_proj", 1), "v": ("self_attn.v_proj", 0), "up": ("mlp.up_proj", 0)}
SERVER = "vllm serve {base} --enable-lora --max-lora-rank 8 --lora-target-modules o_proj down_proj"


def places(model, layers=(0, 1), **counts):
    """Slices of projections, by short name → how many, in the given layers."""
    parameters, found = dict(model.named_parameters()), {}
    for layer in layers:
        for part, count in counts.items():
            path, dim = PARTS[part]
            name = f"model.layers.{layer}.{path}.weight"
            found[name] = Slices(tuple(parameters[name].shape), dim, torch.arange(count))
    return Selection(found)


def one(engine, *adapters, **options):
    return examine([str(a) for a in adapters], engine, **options)["engines"][engine]


def refused(engine, *adapters, **options):
    """The reasons, of which there is at least one; nothing else is told then."""
    result = one(engine, *adapters, **options)
    assert result["refused"]
    assert result["command"] is None
    assert not result["first"]
    return " | ".join(result["refused"])


def foreign(folder, model=None, **config):
    """A LoRA made by PEFT alone."""
    settings = {"r": 8, "lora_alpha": 8, "target_modules": ["o_proj", "down_proj"]} | config
    peft = get_peft_model(model or tiny.build("gqa_llama"), LoraConfig(**settings))
    peft.save_pretrained(str(folder))
    return folder
