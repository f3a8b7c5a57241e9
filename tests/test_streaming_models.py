"""The engine on what models are made of: checkpointing, tied, sparse and strided weights, any shape, compiled."""

import pytest
import torch
from torch import nn

import tiny
from intaglio import ID3, Delta, attach
from unmasking_tools import adamw, assert_equal_weights, chosen, gradients, leaves, loss, normal, weights


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_bit(reentrant):
    """Checklist 26 and 12, both kinds of activation checkpointing."""
    results = []
    for checkpointing in (False, True):
        model = tiny.build("tied_llama").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        tuner = attach(model, ID3(budget=200, steps=5, whole=("model.norm.weight",)))
        optimizer = tuner.optimizer(adamw)
        for step in range(6):
            loss(model, "tied_llama", step).backward()
            assert all(slot.target.grad is None for slot in tuner.unmasking.slots.values())
            optimizer.step()
            optimizer.zero_grad()
        results.append(model)
        assert tuner.unmasking.chosen == 200
        assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_equal_weights(*results)


def test_zero_and_five_dimensions(tmp_path):
    """Checklist 24; defect 23: trained, saved, applied and reverted bit for bit."""
    shapes = ((), (2, 3, 1, 2, 2), (7,))
    model = leaves(*shapes)
    tuner = attach(model, ID3(budget=20, steps=4))
    optimizer = tuner.optimizer(adamw)
    for step in range(4):
        model.backward(torch.tensor(9.0), *gradients(model, step)[1:])
        optimizer.step()
        optimizer.zero_grad()
    assert {"0", "1", "2"} == set(chosen(tuner))
    tuner.save(tmp_path / "a")
    fresh, base = leaves(*shapes), weights(leaves(*shapes))
    delta = Delta.load(tmp_path / "a")
    delta.apply_(fresh)
    assert_equal_weights(fresh, tuner.detach())
    assert fresh.get_parameter("0") != base["0"]
    delta.revert_(fresh)
    assert all(torch.equal(p, base[name]) for name, p in weights(fresh).items())


def test_sparse_and_strided_gradients():
    """Checklist 25: an embedding that gives sparse gradients, a weight stored transposed."""
    results = []
    for plain in (True, False):
        torch.manual_seed(0)
        table, weight = nn.Embedding(9, 4, sparse=not plain), normal(5, 4)
        head = nn.Parameter(weight if plain else weight.t().contiguous().t())
        model = nn.Module()
        model.table, model.head = table, head
        tuner = attach(model, ID3(budget=12, steps=3))
        optimizer = tuner.optimizer(adamw)
        for step in range(3):
            (table(torch.tensor([1, 3, 3, 8])) @ head.t() * normal(4, 5, seed=step)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append((chosen(tuner), model))
    assert head.stride() == (1, 5)
    assert results[0][0] == results[1][0]
    assert_equal_weights(results[0][1], results[1][1])


def test_a_compiled_model_gives_the_same():
    """Checklist 34: hooks stay outside the compiled graph (backend aot_eager: the same kernels, so the same bits)."""
    results = []
    for compiled in (False, True):
        model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))
        with torch.no_grad():
            for seed, parameter in enumerate(model.parameters()):
                parameter.copy_(normal(*parameter.shape, seed=seed))
        tuner = attach(model, ID3(budget=30, steps=4))
        optimizer = tuner.optimizer(adamw)
        run = torch.compile(model, backend="aot_eager") if compiled else model
        for step in range(5):
            run(normal(8, 6, seed=step)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(model)
        assert tuner.unmasking.chosen == 30
    assert_equal_weights(*results)
