"""Layers in turn under torch.compile, layer by layer."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from intaglio import RST
from layer_tools import adapted, attached, layer_of, update


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_layers_are_compiled_few_times():
    """IST checklist 28: 24 masks, at most 4 graphs in all; gradients on exactly the active layers at each step."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = adapted(4, lora_dropout=0.0)
    tuner = attached(model, RST(layers=2))
    for layer in model.base_model.model.model.layers:
        layer.compile(backend=counter)
    optimizer = tuner.optimizer(torch.optim.SGD, lr=0.1)
    masks = set()
    for step in range(24):
        masks.add(tuple(tuner.rotation.active))
        seen = {}
        for slot in tuner.slots:
            slot.values.register_hook(lambda g, name=slot.name: seen.update({name: g})) if slot.values.requires_grad else None
        active = set(tuner.rotation.active)
        update(model, optimizer, step)
        assert {layer_of(name) for name in seen} == active or step == 0
    assert len(masks) == 6
    assert counter.frame_count <= 4
    torch._dynamo.reset()
