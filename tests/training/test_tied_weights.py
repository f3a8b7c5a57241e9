"""A weight that is an embedding and an output head: the same bits as autograd's own sum, in one tensor."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from intaglio import ID3, SNIP, Updates, attach
from intaglio.training import candidates as scan
from intaglio.training import tied_weights as tied
from support import tiny
from support.unmasking import adamw, assert_equal_weights, both, chosen, loss, normal, offsets


class _Tied(nn.Module):
    """Looks tokens up, and says which comes next."""

    def __init__(self, rows=40, width=8, padding=None, dtype=torch.float32):
        super().__init__()
        self.table, self.head = nn.Embedding(rows, width, padding_idx=padding), nn.Linear(width, rows, bias=False)
        self.table.weight = self.head.weight = nn.Parameter(normal(rows, width, dtype=dtype))

    def forward(self, ids):
        return F.cross_entropy(self.head(self.table(ids).tanh()).flatten(0, -2).float(), ids.roll(1).flatten())


IDS = torch.tensor([[1, 3, 3, 0, 3, 7], [0, 0, 9, 39, 1, 3]])


def whole_gradient(model, run, attached):
    """The gradient of the tied weight that hooks see."""
    seen = []
    weight = model.table.weight
    weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    if attached:
        attach(model, ID3(budget=5, steps=5))
        assert "forward" in model.head.__dict__
    run(model)
    assert len(seen) == 1
    return seen[0]


RUNS = {
    "one pass": lambda model: model(IDS).backward(),
    "a sum of two passes": lambda model: (model(IDS) + model(IDS.flip(0) // 2)).backward(),
    "embedding twice": lambda model: (model.head(model.table(IDS) * model.table(IDS // 3)).square().sum()).backward(),
    "head twice": lambda model: sum(model.head(part).square().sum() for part in model.table(IDS).tanh()).backward(),
    "embedding alone": lambda model: model.table(IDS).square().sum().backward(),
    "head alone": lambda model: model.head(normal(5, 8).to(model.head.weight)).square().sum().backward(),
    "one vector": lambda model: model.head(model.table(IDS[0, 0])).square().sum().backward(),
    "weight used by hand": lambda model: (model(IDS) + (model.table.weight * 3).square().sum()).backward(),
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("padding", [None, 0])
def test_the_same_gradient(run, dtype, padding):
    """Tokens that come several times, and padding."""
    plain, own = (whole_gradient(_Tied(padding=padding, dtype=dtype), RUNS[run], attached) for attached in (False, True))
    assert bool(plain.any())
    assert torch.equal(own, plain)


@pytest.mark.parametrize("chunks", [1, 2])
def test_the_same_gradient_under_autocast(chunks):
    def run(model):
        with torch.autocast("cpu", torch.bfloat16):
            sum(model(part) for part in IDS.chunk(chunks)).backward()

    assert torch.equal(*(whole_gradient(_Tied(), run, attached) for attached in (False, True)))


def test_the_gradient_of_a_gradient():
    def run(model):
        (gradient,) = torch.autograd.grad(model(IDS), model.head.weight, create_graph=True)
        gradient.square().sum().backward()

    assert torch.equal(*(whole_gradient(_Tied(), run, attached) for attached in (False, True)))


def test_function_transforms():
    """torch.func differentiates it, in both directions and for each sample."""
    results = []
    for attached in (False, True):
        model = _Tied()
        if attached:
            attach(model, ID3(budget=5, steps=5))
        weight = {"table.weight": model.table.weight.detach()}  # the head's with it
        call = partial(torch.func.functional_call, model)
        each = torch.func.vmap(torch.func.grad(call), (None, 0))(weight, IDS)
        along = torch.func.jvp(partial(call, args=(IDS,)), (weight,), ({"table.weight": normal(40, 8, seed=3)},))[1]
        results.append([*each.values(), along])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def _peak(run):
    """Most bytes alive at a time, above those at the start."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@pytest.mark.parametrize("updates", [Updates(), Updates(accumulation="lean")], ids=lambda updates: updates.accumulation)
def test_one_tensor_instead_of_three(updates, monkeypatch):
    """ID3 checklist 12 and 26: the embedding's rows are added to the head's gradient, in place."""
    monkeypatch.setattr(scan, "CHUNK", 1 << 12)
    sizes = []
    for attached in (False, True):
        model = _Tied(4000, 64)
        if attached:
            attach(model, ID3(budget=50, steps=5), updates=updates)
        sizes.append(_peak(model(IDS).backward) / (4 * model.head.weight.numel()))
    plain, own = sizes
    assert 3 <= plain < 3.7
    assert 1 <= own < 1.7


@pytest.mark.parametrize("run", ["a sum of two passes", "embedding twice", "head twice"])
def test_one_tensor_for_several_uses(run):
    """The sum of a further head's gradient comes in place too, beside that gradient itself."""
    model = _Tied(4000, 64)
    tied.install([model.table, model.head])
    most = _peak(lambda: RUNS[run](model)) / (4 * model.head.weight.numel())
    assert most < (1.7 if run == "embedding twice" else 2.7)


def test_only_plain_layers_that_share_and_only_while_attached():
    class Special(nn.Linear):
        pass

    weight = nn.Parameter(normal(40, 8))
    model = nn.ModuleDict({"tied": _Tied(), "alone": nn.Linear(8, 40), "table": nn.Embedding(40, 8)})
    model["special"], model["busy"] = Special(8, 40, bias=False), nn.Linear(8, 40)
    model["sparse"], model["norm"] = nn.Embedding(40, 8, sparse=True), nn.Embedding(40, 8, max_norm=1.0)
    model["often"] = nn.Embedding(40, 8, scale_grad_by_freq=True)
    for name in ("special", "busy", "sparse", "norm", "often"):
        model[name].weight = weight
    model["busy"].forward = model["busy"].forward  # somebody stands in between
    tuner = attach(model, ID3(budget=5, steps=5))
    routed = [name for name, module in model.named_modules() if "forward" in module.__dict__]
    assert routed == ["tied.table", "tied.head", "busy"]
    tuner.detach()
    assert [name for name, module in model.named_modules() if "forward" in module.__dict__] == ["busy"]
    assert not any("tie" in module.__dict__ for module in model.modules())
    model["tied"](IDS).backward()


def test_frozen_embeddings_stay_out():
    model = _Tied()
    model.extra = nn.Linear(8, 8)
    model.head.weight.requires_grad_(False)
    attach(model, ID3(budget=5, steps=5))
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_copy_and_a_failed_backward_share_nothing():
    """What a backward left behind is no part of the next one, in the model or in a copy of it."""
    model = _Tied()
    attach(model, ID3(budget=5, steps=5))
    other = copy.deepcopy(model)
    assert other.table.tie is other.head.tie
    assert other.table.tie is not model.table.tie
    kept = torch.autograd.grad(model(IDS), model.head.weight)[0]  # what a tie might find is alive
    before = kept.clone()
    model.table(IDS).sum().backward()
    other.table(IDS).sum().backward()
    assert torch.equal(kept, before)


class _Fail(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("out of memory")


def test_after_a_backward_that_failed():
    """Between the head's gradient and the embedding's."""

    def run(model):
        with pytest.raises(RuntimeError, match="out of memory"):
            model.head(_Fail.apply(model.table(IDS))).sum().backward()
        model(IDS).backward()

    assert torch.equal(*(whole_gradient(_Tied(), run, attached) for attached in (False, True)))


@pytest.mark.parametrize(
    ("part", "reentrant"), [("table", True), ("table", False), ("whole", True), ("whole", False), ("head", False)]
)
def test_the_same_gradient_under_checkpointing(part, reentrant):
    """Of the embedding, of both, of the head (where a reentrant one gives a weight two gradients, with or without us)."""
    anchor = torch.zeros((), requires_grad=True)

    def run(model):
        again = partial(checkpoint, use_reentrant=reentrant)
        if part == "whole":
            again(lambda _: model(IDS), anchor).backward()
        elif part == "table":
            again(lambda _: model.table(IDS), anchor).square().sum().backward()
        else:
            again(model.head, model.table(IDS).tanh()).square().sum().backward()

    assert torch.equal(*(whole_gradient(_Tied(), run, attached) for attached in (False, True)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", [ID3(budget=313, steps=5), SNIP(budget=100)], ids=lambda method: method.name)
def test_a_tied_model_equals_the_dense_oracle(method, dtype):
    name = "tied_llama"
    tuner, optimizer, dense = both(name, method, dtype=dtype)
    for step in range(6):
        loss(tuner.model, name, step).backward()
        loss(dense.model, name, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        dense.update()
        assert chosen(tuner) == offsets(dense.selection)
    assert "model.embed_tokens.weight" in chosen(tuner)
    assert_equal_weights(tuner.model, dense.model)


def test_a_compiled_tied_model_gives_the_same():
    """ID3 checklist 26 and 34: tied weights under torch.compile (on a CPU; CUDA graphs are not tried)."""
    results = []
    for compiled in (False, True):
        model = tiny.build("tied_llama")
        tuner = attach(model, ID3(budget=200, steps=3))
        optimizer = tuner.optimizer(adamw)
        run = torch.compile(model, backend="aot_eager") if compiled else model
        for step in range(4):
            run(**tiny.batch("tied_llama", seed=step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(model)
    assert_equal_weights(*results)
