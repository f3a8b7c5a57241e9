"""A folder that stock PEFT loads, proved before it is put in place; and what all exports ask of an adapter and its base."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
from torch import Tensor, nn

from ..adapter.delta import Delta
from ..adapter.folder import WEIGHTS
from ..model.structure import is_linear
from .proof import compare, tuned_answer
from .staging import mark, staged

if TYPE_CHECKING:
    from peft import PeftConfig

__all__ = [
    "EXACT",
    "address",
    "differences",
    "export_peft",
    "linear_owners",
    "load_stock",
    "missed",
    "refuse_parameters",
    "size_of",
    "target_modules",
    "write_card",
    "write_marker",
]


EXACT = "intaglio_exact.st"  # safetensors, by a name that no engine takes for weights


def export_peft(
    delta: Delta,
    model: Any,
    directory: str | os.PathLike[str],
    config: PeftConfig,
    tensors: Mapping[str, Tensor],
    *,
    tokenizer: Any = None,
    overwrite: bool = False,
    figures: Mapping[str, Any],
    exact: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Write config and tensors, load them with PEFT onto a copy of the base, compare in fp32, then rename into place.

    Args:
        delta: what is exported.
        model: the base; it is copied once and stays as it is.
        directory: the new folder.
        config: of the PEFT method.
        tensors: of adapter_model.safetensors.
        tokenizer: for prompts of text; without one prompts are drawn.
        overwrite: replace an earlier export.
        figures: for the result; `to` says what is exported.
        exact: what `missed` gives, written beside where there is any.

    Raises:
        ValueError: for another base, a target that exists, or an export that is not exact.
    """
    with staged(directory, overwrite=overwrite) as folder:
        safetensors.torch.save_file(dict(tensors), folder / WEIGHTS, {"format": "pt"})
        if exact:
            safetensors.torch.save_file(dict(exact), folder / EXACT)
        config.save_pretrained(str(folder))
        base, reference = tuned_answer(delta, model, tokenizer)
        check = compare(reference, load_stock(base, folder).get_base_model())
        write_card(folder, delta, figures["to"])
        return write_marker(folder, directory, delta, {**figures, **check})


def address(config: Any, delta: Delta, model: Any, targets: list[str]) -> Any:
    """A PEFT config that names its base, what the base is for, and the modules that it changes."""
    kind = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    config.task_type = kind if model.can_generate() else None
    config.base_model_name_or_path, config.inference_mode = delta.base, True
    config.target_modules = targets  # not given at the start, as PEFT makes a set of it, whose order on disk would be chance
    return config


def write_marker(folder: Path, directory: str | os.PathLike[str], delta: Delta, figures: Mapping[str, Any]) -> dict[str, Any]:
    """Leave the export's figures in its folder and return them, with the path it will have."""
    dtype = str(next(iter(delta.values.values())).dtype).removeprefix("torch.")
    sizes = {"bytes": size_of(folder), "compact_bytes": delta.nbytes}
    result = {**figures, **sizes, "base_dtype": dtype, "method": delta.method}
    mark(folder, result)
    return {"path": str(directory), **result}


def linear_owners(delta: Delta, model: nn.Module, kind: str) -> dict[str, tuple[str, nn.Module]]:
    """Parameter name → path and module of the linear layer that alone owns it.

    Raises:
        ValueError: naming the first parameter that is no such weight.
    """
    owners: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((path, module, name))
    parameters, problems, found = dict(model.named_parameters()), [], {}
    for name in delta.selection:
        if name not in parameters:
            raise ValueError(f"{name}: the model has no such parameter; this adapter's base is {delta.base!r}")
        (path, module, own), *others = owners[id(parameters[name])]
        if others:
            problems.append(f"{name}: shared with {others[0][0]} (tied weights)")
        elif own != "weight" or not is_linear(module):
            problems.append(f"{name}: not the weight of a linear layer but {own!r} of {type(module).__name__}")
        found[name] = path, module
    refuse_parameters(problems, kind, "use --to merged, which takes every adapter")
    return found


def refuse_parameters(problems: list[str], kind: str, advice: str) -> None:
    """Raise one `ValueError` that names the first problem and counts the others; none, no error."""
    if problems:
        more = f" (and {len(problems) - 1} more parameters)" if len(problems) > 1 else ""
        raise ValueError(f"cannot be exported as {kind}: {problems[0]}{more}; {advice}")


def target_modules(paths: set[str], model: nn.Module) -> list[str]:
    """Last names of modules, where they mean exactly `paths` in `model`, as every engine understands; else the paths."""
    last = {path.rpartition(".")[2] for path in paths}
    meant = {path for path, _ in model.named_modules() if path.rpartition(".")[2] in last}
    return sorted(last if meant == paths else paths)


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def differences(delta: Delta, model: nn.Module) -> dict[str, Tensor]:
    """Name → tuned minus base value in fp32, compact, on the CPU."""
    parameters = dict(model.named_parameters())
    found = {}
    for name, entries in delta.selection.items():
        base = entries.to(parameters[name].device).gather(parameters[name]).cpu()
        found[name] = delta.values[name].float().cpu() - base.float()
    return found


def missed(delta: Delta, model: nn.Module, changes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tuned values that base + change does not give in the base's type, which the way back needs; see `EXACT`.

    In bfloat16 and float16 there are none unless the factors are rounded; in fp32 a few, by a last bit: a value that shrinks
    to a fraction of the base's is no sum of two fp32 numbers.

    Returns:
        `NAME.index`, offsets into the flattened compact values, and `NAME.values`, for each parameter with any.
    """
    parameters, found = dict(model.named_parameters()), {}
    for name, entries in delta.selection.items():
        tuned, base = delta.values[name].cpu(), entries.to(parameters[name].device).gather(parameters[name]).cpu()
        index = ((base.float() + changes[name].float()).to(tuned.dtype) != tuned).flatten().nonzero().flatten()
        if index.numel():
            found |= {f"{name}.index": index, f"{name}.values": tuned.flatten()[index].contiguous()}
    return found


def load_stock(model: Any, folder: Path) -> Any:
    """`PeftModel.from_pretrained`, for evaluation."""
    from peft import PeftModel

    with warnings.catch_warnings():  # PEFT 0.21 asks transformers 5 for something by its old name
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        return PeftModel.from_pretrained(model, str(folder)).eval()


def write_card(folder: Path, delta: Delta, kind: str, how: str = "and checked against it at export") -> None:
    """Write the model card of a folder that PEFT loads."""
    fields = {"base": delta.base or "BASE", "kind": kind.upper(), "tag": kind, "method": json.dumps(delta.method), "how": how}
    (folder / "README.md").write_text(_CARD.format(**fields), encoding="utf-8")


_CARD = """---
library_name: peft
base_model: {base}
tags: [{tag}, intaglio]
---

# {kind} adapter for {base}

Exported by Intaglio from a sparse adapter (method `{method}`), {how}; the figures are in
`intaglio_export.json`. PEFT alone loads it:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base, "this/folder")
```
"""
