"""Guards of our PEFT adapters: what they cannot wrap is refused by name before anything changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ..adapter.record import Record
from ..model.peft_layers import is_quantized
from .delta_layer import DeltaLayer
from .targets import around, owner

__all__ = ["check_called", "check_module", "check_parameter", "check_tied", "check_tokens", "refuse_nested", "refuse_quantized"]

_READ_ELSEWHERE = (nn.MultiheadAttention, nn.TransformerEncoderLayer)  # they hand their children's weights to fused kernels
_MAMBA_KERNELS = {"out_proj", "conv1d"}  # Mamba's fused kernels read these weights directly


def refuse_quantized(model: nn.Module) -> None:
    """Refuse to choose weights in a quantized model.

    Raises:
        ValueError: naming the first quantized module.
    """
    for path, module in model.named_modules():
        if is_quantized(module):
            raise ValueError(
                f"{path}: quantized ({type(module).__name__}); sparse training replaces weights and needs a floating-point "
                "base: load the model without quantization"
            )


def check_parameter(name: str, record: Record, parameter: nn.Parameter | None, base: str | None) -> None:
    """Refuse a model that lacks a parameter of the adapter, or has it in another form.

    Raises:
        ValueError: naming the parameter, what was expected and what was found.
    """
    if parameter is None:
        raise ValueError(f"{name}: the model has no such floating-point parameter (quantized?); this adapter's base is {base!r}")
    if not parameter.is_floating_point():
        raise ValueError(f"{name}: stored as {parameter.dtype} (quantized); load the model without quantization")
    if tuple(parameter.shape) != record.shape:
        raise ValueError(f"{name}: expected shape {list(record.shape)}, the model has {list(parameter.shape)}")
    if parameter.dtype != record.dtype:
        raise ValueError(
            f"{name}: trained on a {record.dtype} base, the model is {parameter.dtype}; load it with dtype={record.dtype}"
        )


def check_module(model: nn.Module, parameter: str) -> None:
    """Refuse a module that PEFT cannot wrap, or in which a wrapper would be passed over.

    Raises:
        ValueError: naming the parameter and the reason.
    """
    path = owner(parameter)
    if not path:
        raise ValueError(f"{parameter}: belongs to the model itself; PEFT wraps submodules only: use intaglio.Delta.apply_")
    module = model.get_submodule(path)
    if is_quantized(module):
        raise ValueError(f"{parameter}: quantized ({type(module).__name__}); load the model without quantization")
    if isinstance(module, nn.RNNBase) or "parametrizations" in path.split("."):
        raise ValueError(f"{parameter}: {type(module).__name__} keeps its own copies of weights; use intaglio.Delta.apply_")
    check_called(model, path)


def check_called(model: nn.Module, path: str) -> None:
    """Refuse a module whose weight is read without calling the module.

    Raises:
        ValueError: naming the module and who reads its weight.
    """
    parent = model.get_submodule(owner(path))
    mamba = "mamba" in str(getattr(getattr(model, "config", None), "model_type", ""))
    if isinstance(parent, _READ_ELSEWHERE) or (mamba and path.rpartition(".")[2] in _MAMBA_KERNELS):
        raise ValueError(
            f"{path}: {type(parent).__name__} reads this weight past any wrapper, so the adapter would be ignored; leave the "
            "module out, or use intaglio.Delta.apply_"
        )


def check_tied(name: str, full: str, *, left_out: bool) -> None:
    """Refuse to change one of two tied parameters while a restriction leaves the other's module out.

    Raises:
        ValueError: naming both.
    """
    if left_out:
        raise ValueError(
            f"{name}: is {full}, which the adapter changes, but exclude_modules or modules_to_save names its module; leave "
            "both out, or neither"
        )


def check_tokens(model: nn.Module, parameter: str, tokens: Any) -> None:
    """Refuse entries in an embedding whose rows `trainable_token_indices` trains.

    Raises:
        ValueError: naming the parameter.
    """
    if tokens is None:
        return
    path, get_embedding = owner(parameter), getattr(model, "get_input_embeddings", lambda: None)
    named = isinstance(tokens, Mapping) and any(path == key or path.endswith(f".{key}") for key in tokens)
    if named or model.get_submodule(path) is get_embedding():
        raise ValueError(f"{parameter}: trainable_token_indices trains rows of it; leave it out of the adapter (exclude_modules)")


def refuse_nested(model: nn.Module, places: Iterable[str]) -> None:
    """Refuse a module to wrap inside another wrapped one, which PEFT passes over.

    Raises:
        ValueError: naming both modules.
    """
    wrapped = {path for path, module in model.named_modules() if isinstance(module, DeltaLayer)} | set(places)
    for path in wrapped:
        for outer in around(path):
            if outer in wrapped:
                raise ValueError(
                    f"{path}: lies inside {outer}, whose own parameters an adapter changes too; PEFT cannot wrap both: use "
                    "intaglio.Delta.apply_"
                )
