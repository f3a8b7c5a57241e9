"""One answer to "is this layer quantized?", for every way in which a layer shows it."""

import sys
from types import SimpleNamespace

import peft
import pytest
import torch
from torch import nn

from intaglio.model.peft_layers import is_quantized, refuse_unscorable
from intaglio.peft_tuners.guards import refuse_quantized


class Params4bit(nn.Parameter):
    """As bitsandbytes' own: 4-bit weights in a tensor of any type, with what undoes the quantization beside them."""

    quant_state = None


class QuantLinear(nn.Module):
    """A layer that computes with other weights than its own parameters."""


def stored(parameter):
    layer = nn.Linear(4, 4, bias=False)
    layer.weight = parameter
    return layer


def frozen(tensor):
    return nn.Parameter(tensor, requires_grad=False)


def four_bits(dtype):
    parameter = Params4bit(torch.zeros(8, 1).to(dtype), requires_grad=False)
    parameter.quant_state = SimpleNamespace(quant_type="nf4")
    return stored(parameter)


def holding(kind, name):
    layer = QuantLinear()
    if kind == "buffer":
        layer.register_buffer(name, torch.zeros(2, dtype=torch.int32))
    elif kind == "empty buffer":
        layer.register_buffer(name, None)
    elif kind == "module":
        layer.add_module(name, nn.Identity())
    else:
        layer.register_parameter(name, frozen(torch.zeros(2)))
    return layer


def torchs_own():
    return type("Linear", (nn.Module,), {"__module__": "torch.ao.nn.quantized.dynamic.modules.linear"})()


QUANTIZED = {
    "integers": lambda: stored(frozen(torch.zeros(4, 4, dtype=torch.uint8))),
    "8-bit integers": lambda: stored(frozen(torch.zeros(4, 4, dtype=torch.int8))),
    "8-bit floats": lambda: stored(frozen(torch.zeros(4, 4).to(torch.float8_e4m3fn))),
    "4 bits in bytes": lambda: four_bits(torch.uint8),
    "4 bits in floats": lambda: four_bits(torch.bfloat16),
    "GPTQ, AWQ": lambda: holding("buffer", "qweight"),
    "GPTQ before its weights": lambda: holding("empty buffer", "qweight"),
    "packed": lambda: holding("buffer", "weight_packed"),
    "PyTorch's packed parameters": lambda: holding("module", "_packed_params"),
    "PyTorch's own": torchs_own,
    "HQQ": lambda: holding("parameter", "W_q"),
}


@pytest.mark.parametrize("case", QUANTIZED)
def test_quantized_layers_are_known_and_refused_by_both_faces(case):
    layer = QUANTIZED[case]()
    assert is_quantized(layer)
    model = nn.Module()
    model.add_module("layer", layer)
    with pytest.raises(ValueError, match=r"^layer: quantized"):
        refuse_quantized(model)
    with pytest.raises(ValueError, match=r"^layer\S*: quantized"):
        refuse_unscorable(model)


def test_what_peft_knows_is_quantized(monkeypatch):
    """A layer of a library that only PEFT recognises; PEFT is asked for no more than a yes or no."""
    asked = []

    def resolve(module, **kwargs):
        asked.append(kwargs["get_apply_tensor_subclass"])  # without it PEFT refuses torchao's layers with its own words
        return object() if isinstance(module, QuantLinear) else None

    monkeypatch.setattr(peft.utils.quantization_utils, "resolve_quantization_backend", resolve)
    assert is_quantized(QuantLinear())
    assert not is_quantized(nn.Linear(4, 4))
    assert None not in asked
    monkeypatch.delitem(sys.modules, "peft")
    assert not is_quantized(QuantLinear())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_floating_point_layers_are_not_quantized(dtype):
    layers = [nn.Linear(4, 4), nn.Embedding(4, 4), nn.LayerNorm(4), nn.BatchNorm1d(4), nn.Conv1d(2, 2, 1), nn.LSTM(2, 2)]
    assert not any(is_quantized(layer.to(dtype)) for layer in layers)
    assert not is_quantized(stored(Params4bit(torch.zeros(4, 4).to(dtype), requires_grad=False)))  # not yet quantized
