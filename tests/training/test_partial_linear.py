"""A layer with a partial product against autograd's full gradient, the oracle."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from intaglio import S2FT, attach
from intaglio.core.entries import Slices
from intaglio.core.selection import Selection
from intaglio.model.structure import describe
from intaglio.training.slots import Slots
from support import tiny

KINDS = list(itertools.product(["linear", "conv1d"], [0, 1], [True, False]))


def layer_and_slot(kind, dim, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    layer = nn.Linear(10, 7, bias=bias) if kind == "linear" else Conv1D(7, 10)
    layer = layer.to(dtype).requires_grad_(False)
    index = torch.tensor([0, 3, 6])
    model = nn.Sequential(layer)
    slots = Slots(model, Selection({"0.weight": Slices(tuple(layer.weight.shape), dim, index)}))
    return layer, slots["0.weight"], index


def run(layer, x, cotangent):
    y = layer(x)
    y.backward(cotangent)
    return y.detach()


@pytest.mark.parametrize(("kind", "dim", "bias"), KINDS)
@pytest.mark.parametrize("shape", [(10,), (5, 10), (2, 5, 10), (2, 3, 4, 10)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_slice_gradient_is_autograds(kind, dim, bias, shape, dtype, tolerance):
    """S2FT checklist 5 and 9: rows and columns, 1-D to 4-D inputs, 1e-6 in fp32 and 1e-12 in fp64."""
    layer, slot, index = layer_and_slot(kind, dim, bias, dtype)
    dense = copy.deepcopy(layer)
    for name in ("forward", "partial"):
        del dense.__dict__[name]
    dense.weight.requires_grad_(True)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    twin = x.detach().clone().requires_grad_(True)
    cotangent = torch.randn(*shape[:-1], 7, dtype=dtype)
    assert torch.equal(run(layer, x, cotangent), run(dense, twin, cotangent))
    torch.testing.assert_close(slot.values.grad, dense.weight.grad.index_select(dim, index), rtol=0, atol=tolerance)
    torch.testing.assert_close(x.grad, twin.grad, rtol=0, atol=tolerance)
    assert layer.weight.grad is None


@pytest.mark.parametrize(("kind", "dim", "bias"), KINDS)
def test_gradcheck(kind, dim, bias):
    """S2FT checklist 5: numerical gradients through the value that the forward really uses: the weight with the slot
    written in.
    """
    x = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)

    def f(x, values):
        layer, slot, _ = layer_and_slot(kind, dim, bias, torch.float64)
        slot.entries.scatter_(layer.weight, values.detach())
        slot._parameters["values"] = values
        return layer(x)

    values = layer_and_slot(kind, dim, bias, torch.float64)[1].values
    assert torch.autograd.gradcheck(f, (x, values.detach().clone().requires_grad_(True)))


def test_bias_that_trains_gets_its_gradient():
    layer, _, _ = layer_and_slot("linear", 1)
    layer.bias.requires_grad_(True)
    layer(torch.randn(2, 4, 10)).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((7,), 8.0))


def test_no_gradient_is_computed_for_what_needs_none():
    layer, slot, _ = layer_and_slot("linear", 1)
    x = torch.randn(4, 10)
    layer(x).sum().backward()
    assert x.grad is None
    slot.values.requires_grad_(False)
    assert not layer(x).requires_grad


class Kept:
    """Counts what autograd keeps for backward, by storage, parameters aside."""

    def __init__(self, parameters):
        self._parameters = {p.untyped_storage().data_ptr() for p in parameters}
        self.storages = {}

    def __enter__(self):
        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._parameters and tensor.is_floating_point():
                self.storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        self._hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error):
        self._hooks.__exit__(*error)

    @property
    def nbytes(self):
        return sum(self.storages.values())


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_kept_are_tokens_times_selected(kind, dtype):
    """S2FT checklist 7: exactly tokens × selected × itemsize, no storage of the full input."""
    layer, slot, index = layer_and_slot(kind, 1 if kind == "linear" else 0, dtype=dtype)
    x = torch.randn(2, 6, 10, dtype=dtype, requires_grad=True) * 1
    with Kept([layer.weight, layer.bias, slot.values]) as kept:
        y = layer(x)
    assert kept.nbytes == 2 * 6 * index.numel() * dtype.itemsize
    assert x.untyped_storage().data_ptr() not in kept.storages
    y.sum().backward()


def test_bytes_kept_by_the_projections_of_a_model():
    """The same inside a transformer: o and down add their selected columns, and nothing else, to a frozen model."""
    name, tokens = "gqa_llama", 3 * 12
    model, batch = tiny.build(name), tiny.batch(name)
    tuner = attach(model, S2FT(o=0.25, down=0.25))
    kept_by = {}
    for layer in describe(model):
        for role in ("o", "down"):
            path = layer.projections[role].parameter.removesuffix(".weight")
            module = model.get_submodule(path)
            forward = module.forward

            def counted(x, forward=forward, path=path):
                with Kept(model.parameters()) as kept:
                    y = forward(x)
                kept_by[path] = kept.nbytes
                return y

            module.forward = counted
    model(**batch).loss.backward()
    expected = {slot.name.removesuffix(".weight"): tokens * slot.entries.index.numel() * 4 for slot in tuner.slots}
    assert kept_by == expected
    assert len(expected) == 4


def test_autocast_keeps_no_copy_of_the_weight():
    """Under autocast only the narrow columns are kept; the weight is cast again in backward."""
    layer, slot, index = layer_and_slot("linear", 1)
    x = torch.randn(2, 6, 10, requires_grad=True) * 1
    with Kept([layer.weight, layer.bias, slot.values]) as kept, torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert kept.nbytes == 2 * 6 * index.numel() * 2
    y.sum().backward()
    assert slot.values.grad.dtype == torch.float32


def gradients(model, batch, **context):
    for parameter in model.parameters():
        parameter.grad = None
    model(**batch).loss.backward()
    return [slot.values.grad.clone() for slot in model.intaglio_slots]


@pytest.mark.parametrize("name", ["gqa_llama", "transposed_gpt2", "fused_phi3"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_bit(name, reentrant):
    """S2FT checklist 9: the slices' gradients under both kinds of activation checkpointing."""
    batch = tiny.batch(name)
    plain = tiny.build(name).train()
    attach(plain, S2FT(o=0.5, down=0.25))
    expected = gradients(plain, batch)
    model = tiny.build(name).train()
    attach(model, S2FT(o=0.5, down=0.25))
    model.config.use_cache = False
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    for got, want in zip(gradients(model, batch), expected, strict=True):
        assert torch.equal(got, want)


def test_checkpointed_layer_alone():
    layer, slot, _ = layer_and_slot("linear", 1)
    x = torch.randn(4, 10, requires_grad=True)
    layer(x).sum().backward()
    want = slot.values.grad.clone()
    slot.values.grad = None
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert torch.equal(slot.values.grad, want)


@pytest.mark.parametrize("name", ["gqa_llama", "qkv_bias_qwen2", "opt"])
def test_autocast_bf16_equals_the_dense_twin(name):
    """S2FT checklist 9: bf16 products, fp32 gradients, within bf16's rounding of the dense product's."""
    batch, method = tiny.batch(name), S2FT(v=0.5, o=0.5, up=0.25, down=0.25)
    grads = []
    for partial in (True, False):
        model = tiny.build(name)
        attach(model, method, partial=partial)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        grads.append([slot.values.grad for slot in model.intaglio_slots])
    for got, want in zip(*grads, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, rtol=2**-7, atol=2**-9 * want.abs().max().item())


# Stock GPT-2 raises this too: its loss logs a warning in the middle of the traced graph.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("name", ["gqa_llama", "transposed_gpt2", "opt"])
def test_compile_gives_the_same_gradients(name):
    """S2FT checklist 9: under torch.compile (backend aot_eager)."""
    batch = tiny.batch(name)
    model = tiny.build(name)
    tuner = attach(model, S2FT(v=0.5, o=0.5, up=0.25, down=0.25))
    expected = gradients(model, batch)
    for slot in tuner.slots:
        slot.values.grad = None
    torch.compile(model, backend="aot_eager")(**batch).loss.backward()
    for slot, want in zip(tuner.slots, expected, strict=True):
        torch.testing.assert_close(slot.values.grad, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shares", [{}, {"q": 0.25, "k": 0.5, "v": 0.5, "up": 0.3}])
@pytest.mark.parametrize("name", [n for n in tiny.DESCRIBED if n not in ("clip_text", "gemma4_shared", "gemma4_moe")])
def test_partial_and_dense_paths_agree(name, shares):
    """The fast path against its plain twin, over every architecture, three updates long."""
    weights = []
    for partial in (True, False):
        model = tiny.build(name, dtype=torch.float64)
        tuner = attach(model, S2FT(o=0.5, down=0.25, **shares), partial=partial)
        optimizer = tuner.optimizer(torch.optim.SGD, lr=0.1)
        for _ in range(3):
            model(**tiny.batch(name)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append(tuner.detach().state_dict())
    for key, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][key], rtol=0, atol=1e-12)
