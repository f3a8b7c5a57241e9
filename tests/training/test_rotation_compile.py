"""Layers in turn under torch.compile, layer by layer."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from intaglio import RST
from support import tiny
from support.layers import NAME, adapted, attached, layer_of


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own look
def test_compiled_layers_are_compiled_few_times():
    """IST checklist 28: 24 masks, at most 4 graphs in all; gradients on exactly the active layers at each step."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = adapted(4, lora_dropout=0.0)
    model.config.use_cache = False  # a cache makes every layer a graph of its own
    tuner = attached(model, RST(layers=2))
    for layer in model.base_model.model.model.layers:
        layer.compile(backend=counter)
    optimizer = tuner.optimizer(torch.optim.SGD, lr=0.1)
    masks = set()
    for step in range(24):
        active = set(tuner.rotation.active)
        masks.add(tuple(active))
        model(**tiny.batch(NAME, seed=step)).loss.backward()
        assert {layer_of(slot.name) for slot in tuner.slots if slot.values.grad is not None} == active
        optimizer.step()
        optimizer.zero_grad()
    assert len(masks) == 6
    assert counter.frame_count <= 4
    torch._dynamo.reset()
