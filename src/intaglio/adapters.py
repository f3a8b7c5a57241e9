"""What a PEFT model looks like; the only place below `hf/` that knows. PEFT is imported only where a model uses it."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["is_peft", "is_quantized", "load", "refuse_unscorable", "save"]


def is_peft(model: nn.Module) -> bool:
    """Whether `model` is a `PeftModel`."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def is_quantized(module: nn.Module) -> bool:
    """Whether a layer holds its weight in packed or integer form."""
    packed = type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.nn.quantized"))
    packed = packed or any("qweight" in name or "packed" in name for name, _ in module.named_buffers(recurse=False))
    return packed or any(not p.is_floating_point() or p.element_size() == 1 for p in module.parameters(recurse=False))


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
    """Write a PeftModel's own adapter folder, complete; each file appears by one rename.

    Returns:
        The folder.
    """
    target = Path(directory).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        name = model.active_adapter
        model.save_pretrained(str(temporary), selected_adapters=[name])
        written = temporary if name == "default" else temporary / name  # PEFT puts all others a level deeper
        target.mkdir(exist_ok=True)
        for path in sorted(p for p in written.rglob("*") if p.is_file()):
            place = target / path.relative_to(written)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def refuse_unscorable(model: nn.Module) -> None:
    """Refuse weights that have no dense gradient of their own.

    Raises:
        ValueError: naming the first quantized or sharded weight.
    """
    for name, parameter in model.named_parameters():
        kind = type(parameter.data).__name__ if is_traceable_wrapper_subclass(parameter) else type(parameter).__name__
        if kind in ("DTensor", "FlatParameter"):
            raise ValueError(
                f"{name}: sharded over processes ({kind}); entries are chosen by whole gradients: use one process, or plain data "
                "parallelism"
            )
        packed = is_traceable_wrapper_subclass(parameter) or not parameter.is_floating_point() or parameter.element_size() == 1
        if packed and (parameter.requires_grad or not is_peft(model)):
            raise ValueError(f"{name}: quantized ({kind}, {parameter.dtype}); {_UNQUANTIZED}")
    if not is_peft(model):
        for name, module in model.named_modules():
            if is_quantized(module):
                raise ValueError(f"{name}: quantized ({type(module).__name__}); {_UNQUANTIZED}")


_UNQUANTIZED = "single entries need a floating-point base: load it without quantization, or put LoRA on it and attach to that"
