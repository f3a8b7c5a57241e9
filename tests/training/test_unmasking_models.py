"""The engine on what models are made of: checkpointing, tied, sparse and strided weights, any shape, compiled."""

import pytest
import torch
from torch import nn

from intaglio import ID3, Delta, Updates, attach
from support import tiny
from support.dense_unmasking import DenseUnmasking
from support.unmasking import adamw, assert_equal_weights, chosen, gradients, leaves, loss, normal, weights


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_bit(reentrant):
    """ID3 checklist 26 and 12, both kinds of activation checkpointing."""
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


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(
    "updates",
    [Updates(), Updates(clip="dense"), Updates(accumulation="exact"), Updates(accumulation="exact", clip="dense")],
    ids=lambda updates: f"{updates.accumulation}-{updates.clip}",
)
def test_checkpointing_loses_no_gradient_from_above_it(updates, reentrant):
    """Backward inside backward: what the head and the last norm have received before it stays in the choice."""
    results = []
    for checkpointing in (False, True):
        model = tiny.build("gqa_llama").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        tuner = attach(model, ID3(budget=203, steps=4), updates=updates)
        optimizer, norms = tuner.optimizer(adamw), []
        for step in range(6):
            for micro in range(1 if updates.accumulation == "none" else 2):
                loss(model, "gqa_llama", step, micro).backward()
            norms.append(tuner.clip_grad_norm_(1.0))
            optimizer.step()
            optimizer.zero_grad()
        results.append((chosen(tuner), torch.stack(norms), model))
    assert results[0][0] == results[1][0]
    assert "lm_head.weight" in results[0][0]
    assert torch.equal(results[0][1], results[1][1])
    assert_equal_weights(results[0][2], results[1][2])


class _Shared(nn.Module):
    """Two parameters whose gradients autograd puts into one storage."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(normal(4, 5)), nn.Parameter(normal(2, 10, seed=1))

    def forward(self, x):
        return ((self.a.view(20) + self.b.view(20)) * x).sum()


@pytest.mark.parametrize("accumulation", ["none", "exact"])
def test_gradients_in_one_storage(accumulation):
    """What is done to one of them must not reach the other."""
    passes = 1 if accumulation == "none" else 2
    dense = DenseUnmasking(_Shared(), ID3(budget=13, steps=4), adamw)
    model = _Shared()
    tuner = attach(model, ID3(budget=13, steps=4), updates=Updates(accumulation=accumulation))
    optimizer = tuner.optimizer(adamw)
    for step in range(6):
        sums = dict.fromkeys(("a", "b"), 0)
        for micro in range(passes):
            x = normal(20, seed=10 * step + micro + 2)
            dense.model(x).backward()
            model(x).backward()
            for name, parameter in dense.model.named_parameters():
                sums[name], parameter.grad = sums[name] + parameter.grad, None
        for name, parameter in dense.model.named_parameters():
            parameter.grad = sums[name]
        dense.update()
        optimizer.step()
        optimizer.zero_grad()
    assert_equal_weights(model, dense.model)


def test_zero_and_five_dimensions(tmp_path):
    """ID3 checklist 24: trained, saved, applied and reverted bit for bit."""
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
    """ID3 checklist 25: an embedding that gives sparse gradients, a weight stored transposed.

    Of small integers, so that no product rounds: processors sum a transposed matrix in another order.
    """
    results = []
    for plain in (True, False):
        table, weight = (
            nn.Embedding(9, 4, sparse=not plain, _weight=(3 * normal(9, 4, seed=1)).round()),
            (3 * normal(5, 4)).round(),
        )
        head = nn.Parameter(weight if plain else weight.t().contiguous().t())
        model = nn.Module()
        model.table, model.head = table, head
        tuner = attach(model, ID3(budget=12, steps=3))
        optimizer = tuner.optimizer(torch.optim.SGD, lr=0.25)
        for step in range(3):
            (table(torch.tensor([1, 3, 3, 8])) @ head.t() * (3 * normal(4, 5, seed=step)).round()).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append((chosen(tuner), model))
    assert head.stride() == (1, 5)
    assert results[0][0] == results[1][0]
    assert_equal_weights(results[0][1], results[1][1])


def test_a_compiled_model_gives_the_same():
    """ID3 checklist 34: hooks stay outside the compiled graph (backend aot_eager: the same kernels, so the same bits)."""
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
