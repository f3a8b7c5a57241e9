"""Small helpers for the tests of the PEFT face."""

import pytest
import torch
from peft import get_peft_model

from intaglio import Delta, attach
from intaglio.methods import build
from support import tiny

BF16, FP32 = torch.bfloat16, torch.float32
S2FT = {"o": 0.5, "down": 0.25}
RANDOM = {"name": "random", "budget": 0.05}


def delta_folder(folder, method, name="gqa_llama", dtype=FP32, seed=0):
    """An adapter trained by `attach` for two steps."""
    chooser = build(method)
    tuner = attach(tiny.build(name, dtype=dtype), chooser, probe=tiny.probe(name, chooser))
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
