"""Small stacks of layers with adapters, and loops over them, for the tests of methods that train layers in turn."""

import peft
import torch

from intaglio import Batches, attach
from support import tiny

NAME = "mha_llama"


def stack(layers=8, *, seed=0, dtype=torch.float32, **fields):
    """A Llama of some layers, in training mode."""
    torch.manual_seed(seed)
    model = tiny._llama(num_hidden_layers=layers, **fields)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.to(dtype).train()


def adapted(layers=8, *, config=None, seed=0, dtype=torch.float32, live=False, **fields):
    """The same with LoRA on it; `live`: every adapter tensor differs from where it starts."""
    model = peft.get_peft_model(stack(layers, seed=seed, dtype=dtype), config or lora(**fields)).train()
    if live:
        shake(model)
    return model


def lora(**fields):
    return peft.LoraConfig(**({"r": 4, "target_modules": ["q_proj", "down_proj"], "lora_dropout": 0.1} | fields))


def shake(model, seed=3):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def probe(batches=3, **fields):
    return Batches([tiny.batch(NAME, **({"seed": 50 + i} | fields)) for i in range(batches)])


def attached(model, method, **kwargs):
    """A tuner with a probe, where the method looks at data."""
    return attach(model, method, probe=probe() if method.needs_probe else None, **kwargs)


def update(model, optimizer, step, *, accumulation=1, clip=None):
    """One update, on batches of its own."""
    for micro in range(accumulation):
        (model(**tiny.batch(NAME, seed=1000 * step + micro)).loss / accumulation).backward()
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad()


def run(model, tuner, steps, *, optimizer=None, start=0, **kwargs):
    """AdamW updates number start + 1 … start + steps; returns the optimizer."""
    options = {key: kwargs.pop(key) for key in ("accumulation", "clip") if key in kwargs}
    optimizer = optimizer or tuner.optimizer(torch.optim.AdamW, **({"lr": 1e-2, "weight_decay": 0.1} | kwargs))
    for step in range(start, start + steps):
        torch.manual_seed(step)  # of the adapters' dropout
        update(model, optimizer, step, **options)
    return optimizer


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if not name.startswith("intaglio")}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def changed(before, after):
    return {key for key in before if not torch.equal(before[key], after[key])}


def layer_of(name):
    """Number of the layer that a parameter's name is in; None outside."""
    return int(name.split(".layers.")[1].split(".")[0]) if ".layers." in name else None
