"""The layers of a PEFT model; only here below `peft_tuners/` are they known. PEFT is imported only where a model uses it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..core.files import folder_beside, publish
from ..core.fingerprint import ATTACHED

__all__ = [
    "adapters_of",
    "damped",
    "dropouts",
    "held_by",
    "is_peft",
    "is_quantized",
    "load",
    "model_size",
    "refuse_prompts",
    "refuse_sharded",
    "refuse_unscorable",
    "save",
]


def is_peft(model: nn.Module) -> bool:
    """Whether `model` is a `PeftModel`."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def is_quantized(module: nn.Module) -> bool:
    """Whether a layer holds its weight in packed or integer form, by its looks, or by PEFT where that is in use."""
    torchs_own = type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.nn.quantized"))
    named = any("qweight" in name or "packed" in name for name in module._buffers)
    named = named or "_packed_params" in module._modules or "W_q" in module._parameters
    packed = any(_is_packed(parameter) for parameter in module.parameters(recurse=False))
    return torchs_own or named or packed or _has_quantization_backend(module)


def _is_packed(parameter: nn.Parameter) -> bool:
    # bitsandbytes may store its 4-bit weights as floats, so that they can be sharded; it then keeps their state beside them.
    stateful = getattr(parameter, "quant_state", None) is not None
    return stateful or not parameter.is_floating_point() or parameter.element_size() == 1


def _has_quantization_backend(module: nn.Module) -> bool:
    peft = sys.modules.get("peft")
    if peft is None:
        return False
    resolve = peft.utils.quantization_utils.resolve_quantization_backend
    return resolve(module, get_apply_tensor_subclass=type) is not None  # any value will do: only torchao's merging calls it


def model_size(model: nn.Module) -> int:
    """Number of weights of a model without what was put on it: adapters of any PEFT type, prompts, a tuner's values.

    Of a module that PEFT trains as a copy (`modules_to_save`) the original counts, and tied weights count once.
    """
    base = _of(model).get_base_model() if is_peft(model) else model
    return sum(parameter.numel() for parameter in {id(p): p for p in _base_parameters(base)}.values())


def _base_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    wrapped = _wrapped(module)
    if wrapped is not None:
        yield from _base_parameters(wrapped)
        return
    yield from module.parameters(recurse=False)
    for name, child in module.named_children():
        if name != ATTACHED:
            yield from _base_parameters(child)


def _wrapped(module: nn.Module) -> nn.Module | None:
    """The module of the base that one of PEFT's stands around."""
    if isinstance(module, _tuner_class()):
        return module._modules.get("base_layer")
    peft = sys.modules.get("peft")
    around = peft is not None and isinstance(module, peft.utils.other.AuxiliaryTrainingWrapper)
    return _of(module).original_module if around else None


def load(model: Any, directory: str | os.PathLike[str]) -> None:
    """Read a PeftModel's adapter folder into its active adapter.

    Raises:
        ValueError: where the folder's tensors are not those of the adapter.
    """
    from peft import load_peft_weights, set_peft_model_state_dict

    weights = load_peft_weights(str(directory), device="cpu")
    result = set_peft_model_state_dict(model, weights, adapter_name=model.active_adapter)
    if result.unexpected_keys:
        raise ValueError(f"{directory}: holds {result.unexpected_keys[0]}, which the adapter has not; is it another adapter's?")


def save(model: Any, directory: str | os.PathLike[str]) -> Path:
    """Write a PeftModel's own adapter folder, complete: a new one by one rename, else file by file.

    Returns:
        The folder.
    """
    target = Path(directory).resolve()
    with folder_beside(target) as folder:
        name = model.active_adapter
        model.save_pretrained(str(folder), selected_adapters=[name])
        publish(folder if name == "default" else folder / name, target)  # PEFT puts all others a level deeper
    return target


def refuse_sharded(model: nn.Module, why: str) -> None:
    """Refuse weights that are spread over processes (FSDP, ZeRO stage 3, tensor parallelism).

    Raises:
        ValueError: naming the first.
    """
    for name, parameter in model.named_parameters():
        kind = "ZeRO" if getattr(parameter, "ds_id", None) is not None else _kind(parameter)
        if kind in ("DTensor", "FlatParameter", "ZeRO"):
            raise ValueError(f"{name}: sharded over processes ({kind}); {why}: use one process, or plain data parallelism")


def _kind(parameter: nn.Parameter) -> str:
    return type(parameter.data).__name__ if is_traceable_wrapper_subclass(parameter) else type(parameter).__name__


def refuse_prompts(model: Any, method: str) -> None:
    """Refuse a PEFT model whose active adapter is a prompt: it has no parts in the layers.

    Raises:
        ValueError: naming the kind.
    """
    if is_peft(model) and model.active_peft_config.is_prompt_learning:
        kind = getattr(model.active_peft_config.peft_type, "value", model.active_peft_config.peft_type)
        raise ValueError(
            f"{method}: {kind} trains a prompt, not parts of the layers, so that there are no layers to choose from; use an "
            "adapter that acts in each layer, e.g. LoraConfig"
        )


def refuse_unscorable(model: nn.Module) -> None:
    """Refuse weights that have no dense gradient of their own.

    Raises:
        ValueError: naming the first quantized or sharded weight.
    """
    refuse_sharded(model, "entries are chosen by whole gradients")
    for name, parameter in model.named_parameters():
        kind = _kind(parameter)
        packed = is_traceable_wrapper_subclass(parameter) or _is_packed(parameter)
        if packed and (parameter.requires_grad or not is_peft(model)):
            raise ValueError(f"{name}: quantized ({kind}, {parameter.dtype}); {_UNQUANTIZED}")
    if not is_peft(model):
        for name, module in model.named_modules():
            if is_quantized(module):
                raise ValueError(f"{name}: quantized ({type(module).__name__}); {_UNQUANTIZED}")


_UNQUANTIZED = "single entries need a floating-point base: load it without quantization, or put LoRA on it and attach to that"


def adapters_of(model: nn.Module, parameters: Iterable[nn.Parameter]) -> dict[str, tuple[nn.Module, set[str]]]:
    """The PEFT layers that hold any of these parameters in an adapter: module path → (layer, names of those adapters)."""
    wanted, found = {id(parameter) for parameter in parameters}, {}
    for path, module in _tuner_layers(model):
        names = {name for name, held in _held(module) if any(id(p) in wanted for p in held)}
        if names:
            found[path] = (module, names)
    return found


def held_by(module: nn.Module) -> set[int]:
    """`id` of every parameter in a PEFT layer's adapters."""
    return {id(parameter) for _, held in _held(module) for parameter in held}


def dropouts(model: nn.Module) -> dict[str, list[nn.Module]]:
    """The dropout of PEFT layers' adapters, by path of the layer."""
    found: dict[str, list[nn.Module]] = {}
    for path, module in _tuner_layers(model):
        children = (child for name, child in module.named_children() if name != "base_layer")
        drops: list[nn.Module] = [m for c in children for m in c.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
        if drops:
            found[path] = drops
    return found


@contextmanager
def damped(layers: Iterable[tuple[nn.Module, set[str]]], factor: float) -> Iterator[None]:
    """Within, what some adapters add to their layers' responses is scaled: y = base + factor · (adapted − base).

    `base` is the response without these adapters, other active ones kept. That needs no scale of any kind: it holds for
    LoRA and its variants, IA3, OFT and bottlenecks alike, and an adapter that changes nothing is damped to exactly nothing.

    Args:
        layers: PEFT layers, each with the names of the adapters to damp.
        factor: β; 1 leaves all as it is.

    Raises:
        ValueError: for adapters that are merged into the weights, whose share cannot be told apart.
    """
    with ExitStack() as stack:
        for module, names in layers:
            if names & set(_of(module).merged_adapters):
                raise ValueError(f"{type(module).__name__}: its adapter is merged into the weights; unmerge it before training")
            stack.callback(module.register_forward_hook(_Damping(module, names, factor, stack), with_kwargs=True).remove)
        yield


class _Damping:
    """Forward hook of a PEFT layer: mixes its response with the one without some adapters.

    Where the base layer is called with the very input of the PEFT layer, as LoRA does, its response is taken from there;
    else the PEFT layer is called once more, without the adapters.
    """

    def __init__(self, module: nn.Module, names: set[str], factor: float, stack: ExitStack) -> None:
        self._factor, self._again = factor, False
        self._others = [name for name in _of(module).active_adapters if name not in names]
        self._seen: tuple[Any, Any, int] | None = None
        base = module._modules.get("base_layer")
        if base is not None and not self._others and not isinstance(base, _tuner_class()):
            stack.callback(base.register_forward_hook(self._look).remove)

    def _look(self, base: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        plain = isinstance(output, Tensor) and inputs and not parametrize.is_parametrized(base)
        self._seen = (inputs[0], output, output._version) if plain else None

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        if self._again:
            return None
        seen, self._seen = self._seen, None
        if seen is not None and inputs and seen[0] is inputs[0] and seen[1]._version == seen[2]:
            return self._mix(seen[1], output)
        self._again = True
        try:
            return self._mix(self._without(module, inputs, kwargs), output)
        finally:
            self._again, self._seen = False, None

    def _without(self, module: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The layer's response while none but the other adapters is active."""
        layer = _of(module)
        before = layer._active_adapter, layer._disable_adapters
        # The attributes themselves: PEFT's own switches also set `requires_grad`.
        layer._active_adapter, layer._disable_adapters = (self._others, before[1]) if self._others else (before[0], True)
        try:
            return module(*inputs, **kwargs)
        finally:
            layer._active_adapter, layer._disable_adapters = before

    def _mix(self, base: Any, adapted: Any) -> Any:
        if isinstance(adapted, tuple):
            return tuple(self._mix(b, a) for b, a in zip(base, adapted, strict=True))
        if not isinstance(adapted, Tensor) or not adapted.is_floating_point():
            return adapted
        return base + self._factor * (adapted - base)


def _of(module: nn.Module) -> Any:
    return module


def _tuner_class() -> type:
    peft = sys.modules.get("peft")
    return _Nothing if peft is None else peft.tuners.tuners_utils.BaseTunerLayer


class _Nothing:
    """A class without instances, for where PEFT is not imported and there are no PEFT layers."""


def _tuner_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    kind = _tuner_class()
    return ((path, module) for path, module in model.named_modules() if isinstance(module, kind))


def _held(module: nn.Module) -> Iterator[tuple[str, list[nn.Parameter]]]:
    """(adapter name, its parameters) of a PEFT layer."""
    for attribute in _of(module).adapter_layer_names:
        container = getattr(module, attribute, None)
        if isinstance(container, (nn.ModuleDict, nn.ParameterDict)):
            for name, part in container.items():
                yield name, [part] if isinstance(part, nn.Parameter) else list(part.parameters())
