"""The LoRA that an adapter is, as a GGUF file, which llama.cpp and the programs built on it load."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.delta import Delta
from ..model.structure import is_transposed
from .figures import exact
from .forms import Options
from .lora import factors, slices_of
from .peft_folder import differences, linear_owners, refuse_parameters, write_marker
from .proof import InexactExport, compare, tuned_answer
from .staging import staged

__all__ = ["ARCHITECTURES", "FILE", "Architecture", "architecture_of", "lines", "prepare", "read_gguf", "to_gguf"]

FILE = "adapter.gguf"


@dataclass(frozen=True)
class Architecture:
    """The way in which llama.cpp stores a model type.

    Attributes:
        name: GGUF's `general.architecture`.
        rotary: projection → field of the config with its number of heads, where the file holds the rows of each head with
            their two halves interleaved, as llama.cpp rotates neighbours and transformers rotates halves.
    """

    name: str
    rotary: Mapping[str, str] = field(default_factory=dict)


_HALVES = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
# transformers' model type → how llama.cpp's own converter writes it
ARCHITECTURES = {
    "llama": Architecture("llama", _HALVES),
    "mistral": Architecture("llama", _HALVES),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
}


def to_gguf(
    delta: Delta,
    model: Any,
    directory: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    tokenizer: Any = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write `adapter.gguf`, a LoRA that llama.cpp adds to a GGUF of the base.

    The factors are those of `to_lora`, each module with its own rank: llama.cpp scales by alpha / rank with one alpha for the
    whole file, and by 1 where alpha is 0, which is what is written. The file is read back with gguf's own reader, the
    order of rotary rows undone, the product compared with the change entry by entry, and the base with it added
    compared with the tuned model in fp32.

    Args:
        delta: rows or columns (`Slices`) of linear weights, e.g. S2FT's.
        model: the base, in the type the delta was trained on; unchanged afterwards.
        directory: the new folder.
        dtype: of the factors; default float32, exact for every base.
        tokenizer: for prompts of text in the check; default None, drawn tokens only.
        overwrite: replace an earlier export; default False.

    Returns:
        path, file, architecture, rank (the greatest), modules, bytes, compact_bytes, max_difference, tolerance, tokens.

    Raises:
        ValueError: for another kind of model than `ARCHITECTURES`; for what no LoRA can hold; for another base; where
            `directory` exists; where the result is not exact. `model` is unchanged then.

    Example:
        >>> to_gguf(Delta.load("adapter"), base, "gguf")["architecture"]
        'llama'

    Source: llama.cpp's `convert_lora_to_gguf.py` for names and order of rows.
    """
    slices = slices_of(delta.selection)
    architecture = architecture_of(model.config)
    owners = linear_owners(delta, model, "GGUF")
    names = _tensor_names(architecture, {path for path, _ in owners.values()}, model.config.num_hidden_layers)
    changes, pairs, ranks = differences(delta, model), {}, {name: entries.index.numel() for name, entries in slices.items()}
    for name, (path, module) in owners.items():
        a_RI, b_OR = factors(slices[name], changes[name], ranks[name], is_transposed(module))
        pairs[names[path]] = a_RI, b_OR[_order(architecture, path, model.config, len(b_OR))]
    with staged(directory, overwrite=overwrite) as folder:
        _write(folder / FILE, architecture, pairs, dtype, delta.base)
        found = _restored(folder / FILE, architecture, {names[path]: path for path, _ in owners.values()}, model.config)
        check = _check(delta, model, changes, owners, found, tokenizer)
        (folder / "README.md").write_text(_CARD.format(base=delta.base or "BASE", file=FILE), encoding="utf-8")
        figures = {"to": "gguf", "file": FILE, "architecture": architecture.name}
        figures |= {"rank": max(ranks.values()), "modules": len(owners)}
        return write_marker(folder, directory, delta, {**figures, **check})


def prepare(delta: Delta, options: Options) -> dict[str, Any]:
    """The arguments of `to_gguf`; refuses what no LoRA holds."""
    slices_of(delta.selection)
    return {"dtype": getattr(torch, options.dtype or "float32")}


def lines(figures: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What the command shows of the figures."""
    yield f"GGUF LoRA for {figures['architecture']}", f"rank {figures['rank']} in {figures['modules']} modules"
    yield from exact(figures)


def architecture_of(config: Any) -> Architecture:
    """How llama.cpp stores the model of this config.

    Raises:
        ValueError: naming the model type, where it is none of `ARCHITECTURES`.
    """
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"cannot be exported as GGUF: a model of type {kind!r}; the order of its rows in GGUF is not known here. Known are "
            f"{', '.join(ARCHITECTURES)}. Use --to merged, and convert the model with llama.cpp's convert_hf_to_gguf.py"
        )
    return ARCHITECTURES[kind]


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, tuple[Tensor, Tensor]]]:
    """Read a GGUF LoRA.

    Returns:
        (fields by key, weight's name → (A `[rank, in]`, B `[out, rank]`) in fp32, rows as in the file).

    Raises:
        ValueError: where the file is no LoRA, or damaged.
    """
    gguf = _gguf()
    try:
        reader = gguf.GGUFReader(path)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise ValueError(f"{path}: not a GGUF file, or damaged ({error})") from error
    fields = {key: reader.fields[key].contents() for key in reader.fields}
    if fields.get("general.type") != "adapter" or fields.get("adapter.type") != "lora":
        raise ValueError(f"{path}: a GGUF file, but no LoRA adapter (its general.type is {fields.get('general.type')!r})")
    tensors = {t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}
    names = [name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")]
    if {f"{name}.lora_{letter}" for name in names for letter in "ab"} != tensors.keys():
        raise ValueError(f"{path}: damaged: holds tensors that are no pairs of lora_a and lora_b")
    return fields, {name: (tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]) for name in names}


def _gguf() -> Any:
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise ValueError("GGUF files need the package gguf: pip install gguf") from error
    return gguf


def _tensor_names(architecture: Architecture, paths: set[str], layers: int) -> dict[str, str]:
    """Module path → name of its weight in GGUF, by gguf's own map."""
    gguf = _gguf()
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    known = gguf.get_tensor_name_map(kind, layers)
    found = {path: known.get_name(path) for path in sorted(paths)}
    refuse_parameters(
        [f"{p}: GGUF's {architecture.name} has no such weight" for p, n in found.items() if n is None], "GGUF", "use --to merged"
    )
    return {path: f"{name}.weight" for path, name in found.items()}


def _order(architecture: Architecture, path: str, config: Any, rows: int) -> Tensor:
    """The base's row that each row of a weight in GGUF holds, int64 `[rows]`.

    Of a head with rows a₀ … a_h b₀ … b_h (its two rotary halves) GGUF holds a₀ b₀ a₁ b₁ … a_h b_h.
    """
    heads = architecture.rotary.get(path.rpartition(".")[2])
    if heads is None:
        return torch.arange(rows)
    return torch.arange(rows).view(getattr(config, heads), 2, -1).transpose(1, 2).flatten()


def _write(
    path: Path, architecture: Architecture, pairs: Mapping[str, tuple[Tensor, Tensor]], dtype: torch.dtype, base: str | None
) -> None:
    gguf = _gguf()
    kind = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    raw = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, architecture.name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])
    writer.add_description(f"Exported by Intaglio for {base or 'an unnamed base'}")
    for name, pair in sorted(pairs.items()):
        for letter, tensor in zip("ab", pair, strict=True):
            data = gguf.quants.quantize(tensor.contiguous().numpy(), raw)
            writer.add_tensor(f"{name}.lora_{letter}", data, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _restored(file: Path, architecture: Architecture, paths: Mapping[str, str], config: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Module path → its factors as the file has them, rows in the base's order."""
    fields, pairs = read_gguf(file)
    if fields["adapter.lora.alpha"] != 0 or fields["general.architecture"] != architecture.name or pairs.keys() != paths.keys():
        raise InexactExport(f"{file.name}: holds other fields or tensors than were written")
    found = {}
    for name, (a_RI, b_OR) in pairs.items():
        back = _order(architecture, paths[name], config, len(b_OR)).argsort()
        found[paths[name]] = a_RI, b_OR[back]
    return found


def _check(
    delta: Delta,
    model: Any,
    changes: Mapping[str, Tensor],
    owners: Mapping[str, tuple[str, nn.Module]],
    found: Mapping[str, tuple[Tensor, Tensor]],
    tokenizer: Any,
) -> dict[str, Any]:
    """Compare the product of the factors with the change, entry by entry, then the models."""
    base, reference = tuned_answer(delta, model, tokenizer)
    for name, (path, module) in owners.items():
        a_RI, b_OR = found[path]
        product = (b_OR @ a_RI).T if is_transposed(module) else b_OR @ a_RI
        expected = torch.zeros(delta.selection[name].shape)
        delta.selection[name].scatter_(expected, changes[name])
        difference = (product - expected).abs().max().item()
        if difference != 0.0:
            raise InexactExport(
                f"the export is not exact: {name} differs by {difference:.1e} in the file; factors in float32 do not round"
            )
        weight = base.get_parameter(name)
        weight.data += product.to(weight.device)
    return compare(reference, base)


_CARD = """---
base_model: {base}
tags: [gguf, lora, intaglio]
---

# GGUF LoRA for {base}

Exported by Intaglio from a sparse adapter, and checked against it at export; the figures are in `intaglio_export.json`.
llama.cpp adds it to a GGUF of the base:

```
llama-server -m BASE.gguf --lora {file}
```
"""
